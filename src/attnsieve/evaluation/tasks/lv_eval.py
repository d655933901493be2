"""LV-Eval (arXiv 2402.05136): eleven sets at five length levels, with the official prompts, metrics and word lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnsieve.errors import require
from attnsieve.evaluation.metrics import chinese_words, cut_chinese, english_words, f1, normalized_chinese, rouge_l
from attnsieve.evaluation.tasks.questions import Generation, Query
from attnsieve.evaluation.tasks.records import RecordTask, content_digest, read_records

HUB = "Infinigence/LVEval"
LEVELS = ("16k", "32k", "64k", "128k", "256k")
LEAST_RECALL_ENGLISH, LEAST_RECALL_CHINESE = 0.2, 0.4

# Words that do not count as recalled (the official lists).
_COMMON_ENGLISH = (
    "and to of in her was with for it from is that his he by she they or at because be on are their what as had were about "
    "being this who but have has when which does"
)
COMMON_ENGLISH = frozenset(_COMMON_ENGLISH.split())
_COMMON_CHINESE = (
    "的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 会 元 主要 "
    "以及 通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 "
    "亿元 万元 上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度"
)
COMMON_CHINESE = frozenset(_COMMON_CHINESE.split())


def recalled_f1(prediction: Sequence[str], answer: Sequence[str], keywords: Sequence[str], common: frozenset[str]) -> float:
    """F1 if enough keywords are in the prediction, else 0. Common words are no hits, yet they count among the keywords.

    0 where keywords hold no word, only marks or articles; the official scorer divides by zero there.
    """
    least = LEAST_RECALL_ENGLISH if common is COMMON_ENGLISH else LEAST_RECALL_CHINESE
    hits = Counter(prediction) & Counter(keywords)
    recalled = sum(count for word, count in hits.items() if word not in common)
    return f1(prediction, answer) if keywords and recalled / len(keywords) >= least else 0.0


def english(prediction: str, query: Query) -> float:
    """Word F1 under keyword recall; plain F1 where a record names no keywords."""
    words, answer = english_words(prediction), english_words(query.answers[0])
    keywords = query.extra["keywords"]
    return recalled_f1(words, answer, english_words(keywords), COMMON_ENGLISH) if keywords else f1(words, answer)


def chinese(prediction: str, query: Query) -> float:
    """Word F1 under keyword recall; the answer's words are the keywords where a record names none."""
    words, answer = chinese_words(prediction), chinese_words(query.answers[0])
    keywords = query.extra["keywords"] or query.answers[0]
    return recalled_f1(words, answer, chinese_words(keywords), COMMON_CHINESE)


def chinese_rouge(prediction: str, query: Query) -> float:
    """ROUGE-L over the words that are not common."""
    texts = (" ".join(cut_chinese(text)) for text in (prediction, query.answers[0]))
    kept = [" ".join(word for word in normalized_chinese(text) if word not in COMMON_CHINESE) for text in texts]
    return rouge_l(*kept)


def plain_english(prediction: str, query: Query) -> float:
    """Word F1."""
    return f1(english_words(prediction), english_words(query.answers[0]))


def plain_chinese(prediction: str, query: Query) -> float:
    """Word F1 on jieba's words."""
    return f1(chinese_words(prediction), chinese_words(query.answers[0]))


HOTPOT_PROMPT = (
    "Answer the question based on the given passages. Questions and answers are only relevant to some passages. Only "
    "give me the answer and do not output any other explanation and evidence.\n\nArticle: {context}\n\nPlease answer "
    "the following question based on the above passages. Questions and answers are only relevant to some passages. "
    "Only give me the answer and do not output any other explanation and evidence.\n\nQuestion: {input}\nAnswer:"
)
PASSAGE_PROMPT = (
    "Please answer the following question based on the given passages. Questions and answers are only relevant to "
    "one passage. Only give me the answer and do not output any other explanation and evidence.\n\nArticle: "
    "{context}\n\nPlease answer the following question based on the above passages. Questions and answers are only "
    "relevant to one passage. Only give me the answer and do not output any other explanation and evidence.\n\n"
    "Question: {input}\nAnswer:"
)
FACT_PROMPT = (
    "Please answer the following questions based on the given article.\n\nArticle: {context}\n\nPlease answer the "
    "following questions based on the above article.\n\nQuestion: {input}\nAnswer:"
)
FACT_PROMPT_ZH = (
    "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n现在请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
)
PASSAGE_PROMPT_ZH = (
    "请阅读以下文章并用中文回答问题，问题和答案只与其中一篇文章有关。"
    "只需要直接给出问题的答案，不要输出其他任何解释和证据。\n\n文章：{context}\n\n"
    "请基于上面的文章回答下面的问题，问题和答案只与其中一篇文章有关。"
    "只需要直接给出问题的答案，不要输出其他任何解释和证据。\n\n问题：{input}\n回答："
)
ARTICLE_PROMPT_ZH = (
    "请根据下面给定的文章回答问题，问题和答案只与其中一篇文章有关。\n\n文章：{context}\n\n"
    "现在请基于上述文章回答下面的问题，问题和答案只与其中一篇文章有关。\n\n问题：{input}\n回答："
)

# Prompt, metric, score and new tokens of each set.
SETS: dict[str, tuple[str, str, Callable[[str, Query], float], int]] = {
    "hotpotwikiqa_mixup": (HOTPOT_PROMPT, "f1", english, 64),
    "loogle_SD_mixup": (PASSAGE_PROMPT, "f1", english, 64),
    "loogle_CR_mixup": (PASSAGE_PROMPT, "f1", english, 64),
    "loogle_MIR_mixup": (PASSAGE_PROMPT, "f1", english, 64),
    "multifieldqa_en_mixup": (PASSAGE_PROMPT, "f1", english, 64),
    "multifieldqa_zh_mixup": (PASSAGE_PROMPT_ZH, "f1", chinese, 64),
    "factrecall_en": (FACT_PROMPT, "f1", plain_english, 16),
    "factrecall_zh": (FACT_PROMPT_ZH, "f1", plain_chinese, 16),
    "cmrc_mixup": (ARTICLE_PROMPT_ZH, "f1", chinese, 64),
    "lic_mixup": (ARTICLE_PROMPT_ZH.replace("现在请", "请现在"), "f1", chinese, 64),
    "dureader_mixup": (ARTICLE_PROMPT_ZH, "rouge_l", chinese_rouge, 64),
}


def lv_eval_task(name: str, source: str | Path = HUB) -> RecordTask:
    """The task "lv-eval:SET_LEVEL", such as "lv-eval:cmrc_mixup_16k", from a folder of JSON lines or the hub.

    Levels count words (characters in Chinese); prompts beyond the evaluated length lose their middle. The chat template is the
    tokenizer's, as in `longbench_task`. Raises UserError for an unknown set or level.
    """
    subset, _, level = name.rpartition("_")
    require(
        subset in SETS and level in LEVELS,
        f"no LV-Eval set {name!r}; expected SET_LEVEL with a set of {', '.join(SETS)} and a level of {', '.join(LEVELS)}",
    )
    template, metric, score, new_tokens = SETS[subset]
    records = lambda: read_records(source, f"{name}.jsonl", f"{subset}.zip")  # noqa: E731
    variant = content_digest(Path(source) / f"{name}.jsonl")
    return RecordTask(f"lv-eval:{name}", records, template, _query, Generation(metric, score, new_tokens), variant=variant)


def _query(prompt: str, record: Mapping[str, Any]) -> Query:
    # Only the first answer counts, as in the official scorer.
    return Query(prompt, (str(record["answers"][0]),), extra={"keywords": record.get("answer_keywords")})
