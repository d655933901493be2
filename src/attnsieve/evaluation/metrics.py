"""Official metrics of the benchmarks, each in 0 .. 1 for one prediction, rewritten from their definitions."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from attnsieve.errors import require

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『"
    "』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def last_integer(prediction: str) -> int | None:
    """The last run of digits, which LongEval takes for the answer."""
    found = re.findall(r"\d+", prediction)
    return int(found[-1]) if found else None


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER: the share of answers that the prediction contains, in any case."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def english_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD's normalisation)."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_words(text: str) -> list[str]:
    """Words as jieba cuts them, lower-case, without punctuation and spaces. Raises UserError where jieba is missing."""
    bare = (_bare_chinese(word) for word in cut_chinese(text))
    return [word for word in bare if word]


def cut_chinese(text: str) -> list[str]:
    """jieba's words. Raises UserError where jieba is missing."""
    require(find_spec("jieba") is not None, "scoring Chinese answers needs jieba; run: pip install jieba")
    import jieba  # type: ignore[import-untyped,unused-ignore]

    return list(jieba.cut(text, cut_all=False))


def normalized_chinese(text: str) -> list[str]:
    """As `chinese_words`, empty words kept."""
    return [_bare_chinese(word) for word in cut_chinese(text)]


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over bags of words."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * same / (len(prediction) + len(answer)) if same else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F of the Python package `rouge` 1.0.1: sentences end at full stops, longest common subsequences are joined over
    sentences, and words count once. 0 where either side is empty.

    The package looks for subsequences by recursion, and where two sentences have some 990 words together, Python's limit ends it:
    the official scripts then count 0. Here the score is the one that the package gives without that limit.
    """
    predicted, wanted = _sentences(prediction), _sentences(answer)
    if not predicted or not wanted:
        return 0.0
    common = {word for sentence in wanted for other in predicted for word in _subsequence(sentence, other)}
    precision, recall = (len(common) / len(set().union(*side)) for side in (predicted, wanted))
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, answer: str, classes: Iterable[str]) -> float:
    """LongBench: one over the number of class names in the prediction, if the right one is among them."""
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        # As in the official loop, which removes from the list it walks over, the name after a removed one is not looked at.
        if named[place] in answer and named[place] != answer:
            named.pop(place)
        place += 1
    return 1 / len(named) if answer in named else 0.0


def number_share(prediction: str, answer: str) -> float:
    """LongBench: the share of the prediction's numbers that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """LongBench: difflib's ratio, in whole percent, of the first line that is neither comment nor fence. (Where python-Levenshtein
    is installed, which LongBench does not ask for, fuzzywuzzy and so the official script take another ratio.)"""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def _bare_chinese(word: str) -> str:
    punctuation = string.punctuation + CHINESE_PUNCTUATION
    return "".join("".join(letter for letter in word.lower() if letter not in punctuation).split())


def _sentences(text: str) -> list[list[str]]:
    # A part of spaces alone counts as one empty word, as it does in the package.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One longest common subsequence."""
    rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            rows[i][j] = rows[i - 1][j - 1] + 1 if a == b else max(rows[i - 1][j], rows[i][j - 1])
    found: list[str] = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
