"""LongBench (arXiv 2308.14508): 21 sets with the official prompts and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attnsieve.errors import require
from attnsieve.evaluation.metrics import (
    chinese_words,
    classification,
    code_similarity,
    cut_chinese,
    english_words,
    f1,
    number_share,
    rouge_l,
)
from attnsieve.evaluation.tasks.questions import Generation, Query
from attnsieve.evaluation.tasks.records import RecordTask, content_digest, read_records

HUB = "zai-org/LongBench"
ARCHIVE = "data.zip"
# Sets with examples in the prompt, and code: the official script gives them to chat models without a template.
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
# Of the sets with examples only the answer's first line counts.
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")

# Score of a prediction for one answer of a record whose class names are given.
Score = Callable[[str, str, list[str]], float]


class Set(NamedTuple):
    """A set's metric, score, number of new tokens and prompt."""

    metric: str
    score: Score
    new_tokens: int
    template: str


def longbench_task(name: str, source: str | Path = HUB) -> RecordTask:
    """The task "longbench:SET", such as "longbench:hotpotqa", from a folder of JSON lines or the hub.

    Prompts beyond the evaluated length lose their middle. Differences from the official script: the chat template is the
    tokenizer's, its system prompt included, where the script has one for each of the models it names; on samsum the model's own
    EOS tokens end an answer, where the script knows the tokenizer's alone. Raises UserError for an unknown set.
    """
    require(name in SETS, f"no LongBench set {name!r}; expected one of {', '.join(SETS)}")
    chosen = SETS[name]
    generation = Generation(chosen.metric, _best(name, chosen.score), chosen.new_tokens, "\n" if name == "samsum" else None)
    records = lambda: read_records(source, f"{name}.jsonl", ARCHIVE)  # noqa: E731
    variant = content_digest(Path(source) / f"{name}.jsonl")
    chat = name not in PLAIN
    return RecordTask(f"longbench:{name}", records, chosen.template, _query, generation, chat=chat, variant=variant)


def _query(prompt: str, record: Mapping[str, Any]) -> Query:
    return Query(prompt, tuple(map(str, record["answers"])), extra={"classes": record.get("all_classes") or []})


def _best(name: str, score: Score) -> Callable[[str, Query], float]:
    """The best score over the answers."""

    def best(prediction: str, query: Query) -> float:
        text = prediction.lstrip("\n").split("\n")[0] if name in FIRST_LINE else prediction
        return max(score(text, answer, query.extra["classes"]) for answer in query.answers)

    return best


def _f1(prediction: str, answer: str, _: list[str]) -> float:
    return f1(english_words(prediction), english_words(answer))


def _f1_zh(prediction: str, answer: str, _: list[str]) -> float:
    return f1(chinese_words(prediction), chinese_words(answer))


def _rouge(prediction: str, answer: str, _: list[str]) -> float:
    return rouge_l(prediction, answer)


def _rouge_zh(prediction: str, answer: str, _: list[str]) -> float:
    return rouge_l(" ".join(cut_chinese(prediction)), " ".join(cut_chinese(answer)))


def _count(prediction: str, answer: str, _: list[str]) -> float:
    return number_share(prediction, answer)


def _paragraph(prediction: str, answer: str, _: list[str]) -> float:
    found = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    require(found is not None, f"the answer {answer!r:.60} of a retrieval record names no paragraph")
    assert found is not None
    return number_share(prediction, found[1])


def _code(prediction: str, answer: str, _: list[str]) -> float:
    return code_similarity(prediction, answer)


PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)

# The prompts are the official ones to the letter, their slips included.
SETS = {
    "narrativeqa": Set(
        "f1",
        _f1,
        128,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: "
        "{context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if "
        "possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    "qasper": Set(
        "f1",
        _f1,
        128,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a single "
        "phrase or sentence if possible. If the question cannot be answered based on the information in the article, "
        'write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do '
        "not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as "
        "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
        'on the information in the article, write "unanswerable". If the question is a yes/no question, answer '
        '"yes", "no", or "unanswerable". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:',
    ),
    "multifieldqa_en": Set(
        "f1",
        _f1,
        64,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_zh": Set(
        "f1",
        _f1_zh,
        64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，"
        "只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    "hotpotqa": Set("f1", _f1, 32, PASSAGES),
    "2wikimqa": Set("f1", _f1, 32, PASSAGES),
    "musique": Set("f1", _f1, 32, PASSAGES),
    "dureader": Set(
        "rouge_l",
        _rouge_zh,
        128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    "gov_report": Set(
        "rouge_l",
        _rouge,
        512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": Set(
        "rouge_l",
        _rouge,
        512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
        "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one "
        "or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Set(
        "rouge_l",
        _rouge,
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a "
        "one-page summary of all the news.\n\nSummary:",
    ),
    "vcsum": Set(
        "rouge_l",
        _rouge_zh,
        512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    "trec": Set(
        "accuracy",
        classification,
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    ),
    "triviaqa": Set(
        "f1",
        _f1,
        32,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
        "following are some examples.\n\n{context}\n\n{input}",
    ),
    "samsum": Set(
        "rouge_l",
        _rouge,
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    ),
    "lsht": Set("accuracy", classification, 64, "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}"),
    "passage_count": Set(
        "accuracy",
        _count,
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
        "how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
        "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
        "on.\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": Set(
        "accuracy",
        _paragraph,
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
        "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that "
        'the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    ),
    "passage_retrieval_zh": Set(
        "accuracy",
        _paragraph,
        32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n"
        '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
    ),
    "lcc": Set("similarity", _code, 64, "Please complete the code given below. \n{context}Next line of code:\n"),
    "repobench-p": Set("similarity", _code, 64, "Please complete the code given below. \n{context}{input}Next line of code:\n"),
}
