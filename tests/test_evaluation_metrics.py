"""Official metrics (expected values were computed with the official scorers) and the statistics of rows."""

import math
from random import Random

import pytest
from scipy import stats

from attnsieve import UserError
from attnsieve.evaluation import metrics
from attnsieve.evaluation.ledger import summary
from attnsieve.evaluation.statistics import paired_p_value, sign_test, standard_error, student_p_value
from attnsieve.evaluation.tasks import lv_eval
from attnsieve.evaluation.tasks.questions import Query


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The cat sat on the mat. It was blue.", "A cat sat. On the mat it was red.", 0.5555555505555557),
        ("one two three four", "four three two one", 0.24999999500000009),
        ("x. ", "x y", 0.4999999950000001),
        ("same words here", "same words here", 0.999999995),
        ("", "x", 0.0),
        ("...", "x", 0.0),
        ("x", "", 0.0),
    ],
)
def test_rouge_l_is_that_of_the_package(prediction, answer, score):
    assert metrics.rouge_l(prediction, answer) == pytest.approx(score, abs=1e-12)


def test_word_f1():
    words = metrics.english_words
    assert words("The cat's  hat, an Egg!") == ["cats", "hat", "egg"]
    assert metrics.f1(words("the happy cat of Rome"), words("a cat in Rome")) == pytest.approx(4 / 7)
    assert metrics.f1([], ["x"]) == 0


def test_numbers_and_lines():
    assert metrics.last_integer("12 then 0045.") == 45
    assert metrics.last_integer("none") is None
    assert metrics.number_share("Paragraph 3, or 4, or 3", "3") == pytest.approx(2 / 3)
    assert metrics.number_share("none", "3") == 0
    assert metrics.code_similarity("# c\nreturn a + b\nx", "return b + a") == 0.83
    assert metrics.code_similarity("\n\nreturn a", "return a") == 1
    assert metrics.string_match_all("It is ABC and d", ["abc", "d", "e", "f"]) == 0.5


def test_classification_skips_as_the_official_loop_does():
    classes = ["cat", "sat", "cat sat", "dog"]
    # "cat" is removed as a part of the answer, and the loop then skips "sat", which stays and halves the score.
    assert metrics.classification("a cat sat", "cat sat", classes) == 0.5
    assert metrics.classification("dog", "dog", classes) == 1
    assert metrics.classification("dog cat", "dog", classes) == 0.5
    assert metrics.classification("a b abc", "abc", ["a", "x", "b", "c", "abc"]) == 0.5
    assert metrics.classification("dog", "cat sat", classes) == 0


def test_lv_eval_wants_its_keywords_recalled():
    query = Query("?", ("the Rome of",), extra={"keywords": "of Rome city old new"})
    assert lv_eval.english("with the of", query) == 0  # common words are no hits
    assert lv_eval.english("Rome", query) == pytest.approx(2 / 3)  # one of five keywords is just enough
    assert lv_eval.english("Rome", Query("?", ("Rome",), extra={"keywords": "Rome a1 b1 c1 d1 e1"})) == 0
    assert lv_eval.english("with the of", Query("?", ("the Rome of",), extra={"keywords": None})) == 0.5


def test_chinese_metrics(monkeypatch):
    # One character a word: what jieba would cut is not what is tested here.
    monkeypatch.setattr(metrics, "cut_chinese", list)
    monkeypatch.setattr(lv_eval, "cut_chinese", list)
    assert metrics.chinese_words("猫, 坐。") == ["猫", "坐"]
    query = Query("?", ("猫坐在垫",), extra={"keywords": None})
    assert lv_eval.chinese("猫", query) == 0  # one of four keywords is below 0.4
    assert lv_eval.chinese("猫坐", query) == pytest.approx(2 / 3)
    assert lv_eval.plain_chinese("猫", query) == pytest.approx(2 / 5)
    assert lv_eval.chinese_rouge("的猫坐", Query("?", ("猫坐的",))) == pytest.approx(1, abs=1e-6)


def test_missing_jieba_is_named(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install jieba"):
        metrics.cut_chinese("猫")


def test_student_p_values_equal_scipys():
    for freedom in [*range(1, 40), 200, 501]:
        for t in (0.0, 0.1, 1.0, -2.5, 3.3, 9.0):
            assert student_p_value(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)


def test_sign_test_equals_scipys():
    for better in range(9):
        for worse in range(9):
            expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
            assert sign_test(better, worse) == pytest.approx(expected, abs=1e-12)


def test_the_paired_test_fits_the_differences():
    assert paired_p_value([1, 0, 0, -1, 1, 1, 1]) == sign_test(4, 1)
    random = Random(0)
    values = [random.gauss(0.3, 1) for _ in range(17)]
    assert paired_p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-12)
    assert paired_p_value([0.5]) is None
    assert paired_p_value([0.5, 0.5]) is None
    assert paired_p_value([0.0, 0.0]) == 1


def test_standard_error():
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_summaries_pair_item_by_item():
    fields = summary([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert fields["value"] == pytest.approx(7 / 3)
    assert fields["dense_value"] == 1
    assert fields["paired_difference"] == pytest.approx(4 / 3)
    assert fields["paired_stderr"] == pytest.approx(stats.sem([0, 1, 3]))
    assert fields["p_value"] == pytest.approx(stats.ttest_rel([1, 2, 4], [1, 1, 1]).pvalue)
    assert summary([1.0], None)["stderr"] is None
    assert summary([1.0], None)["p_value"] is None
