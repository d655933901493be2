"""LV-Eval and LongBench from small files written here: prompts, truncation, sampling, archives, bad files."""

import json
import zipfile

import pytest

from attnsieve import UserError
from attnsieve.evaluation import evaluate
from attnsieve.evaluation.tasks import longbench, lv_eval, make_task, records
from attnsieve.evaluation.tokens import encode
from tests.evaluation_tiny import model, tokenizer


def record(n: int, **more) -> dict:
    return {
        "input": f"Who is number {n}?",
        "context": f"{{Number}} {n} is Ada. " + "More words. " * 30,
        "answers": ["Ada", "Bob"],
        "answer_keywords": "Ada",
        "all_classes": ["Ada", "Bob"],
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    lines = "\n".join(json.dumps(record(n)) for n in range(6)) + "\n\n"
    for name in ("hotpotwikiqa_mixup_16k", "factrecall_en_16k", "hotpotqa", "trec", "samsum", "passage_retrieval_en"):
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_prompts_hold_the_record(folder):
    tokens = tokenizer(chat=True)
    task = make_task("longbench:hotpotqa", data=folder)
    (item,) = task.items(tokens, 2000, 1, 0)
    (query,) = item.queries
    assert query.prompt.startswith("<s>[user] Answer the question based on the given passages.")
    assert "{Number}" in query.prompt
    assert query.prompt.endswith("Question: " + query.prompt.split("Question: ")[-1])
    assert query.answers == ("Ada", "Bob")


def test_sets_with_examples_take_no_chat_template(folder):
    tokens = tokenizer(chat=True)
    for name in longbench.PLAIN[:3:2]:  # trec and samsum
        (item,) = make_task(f"longbench:{name}", data=folder).items(tokens, 2000, 1, 0)
        assert not item.queries[0].prompt.startswith("<s>")


def test_long_prompts_lose_their_middle(folder):
    task = make_task("lv-eval:hotpotwikiqa_mixup_16k", data=folder)
    (item,) = task.items(tokenizer(), 300, 1, 0)
    prompt = item.queries[0].prompt
    assert len(encode(tokenizer(), prompt)) == 300
    assert prompt.startswith("Answer the question based on the given passages.")
    assert prompt.endswith("\nAnswer:")


def test_items_are_drawn_by_the_seed(folder):
    task = make_task("longbench:hotpotqa", data=folder)
    first = task.items(tokenizer(), 2000, 4, 0)
    assert first == task.items(tokenizer(), 2000, 4, 0)
    assert first != task.items(tokenizer(), 2000, 4, 1)
    assert len({item.queries[0].prompt for item in first}) == 4
    with pytest.raises(UserError, match="6 records"):
        task.items(tokenizer(), 2000, 7, 0)


def test_rows_of_other_files_have_other_names(folder, tmp_path):
    for name in ("longbench:hotpotqa", "lv-eval:factrecall_en_16k"):
        file = folder / f"{name.split(':')[1]}.jsonl"
        before = make_task(name, data=folder).variant
        assert len(before) == 8
        file.write_text(json.dumps(record(0)) + "\n")
        assert before != make_task(name, data=folder).variant != ""
    conversations = tmp_path / "talks.jsonl"
    conversations.write_text(json.dumps({"topic": "tea", "conversation": "b"}))
    assert make_task("longeval-topics", data=conversations).variant.startswith("official ")
    assert make_task("longeval-topics").variant == "synthetic"


def test_a_file_for_a_folder_and_no_room_for_a_prompt_are_refused(folder):
    with pytest.raises(UserError, match=r"is a file: give the folder that holds trec\.jsonl"):
        make_task("longbench:trec", data=folder / "trec.jsonl").items(tokenizer(), 64, 1, 0)
    with pytest.raises(UserError, match="cuts prompts to 1 tokens, of which nothing is left"):
        make_task("longbench:trec", data=folder).items(tokenizer(), 1, 1, 0)


def test_scores_follow_the_set(folder):
    def score(name: str, text: str) -> float:
        task = make_task(name, data=folder)
        (item,) = task.items(tokenizer(), 2000, 1, 0)
        return task.generation.score(text, item.queries[0])

    assert score("longbench:hotpotqa", "It is Bob") == pytest.approx(1 / 2)  # the best of both answers
    assert score("lv-eval:hotpotwikiqa_mixup_16k", "It is Bob") == 0  # the first answer alone, keyword not recalled
    assert score("lv-eval:hotpotwikiqa_mixup_16k", "It is Ada") == pytest.approx(1 / 2)
    assert score("lv-eval:factrecall_en_16k", "Ada") == 1
    assert score("longbench:trec", "\nAda\nor Bob") == 1  # the first line alone
    with pytest.raises(UserError, match="names no paragraph"):
        score("longbench:passage_retrieval_en", "Paragraph 3")


def test_new_tokens_and_stop(folder):
    assert make_task("lv-eval:factrecall_en_16k", data=folder).generation.max_new_tokens == 16
    assert make_task("longbench:samsum", data=folder).generation.stop == "\n"
    assert all(chosen.new_tokens in (32, 64, 128, 512) for chosen in longbench.SETS.values())
    assert len(longbench.SETS) == 21
    assert len(lv_eval.SETS) == 11


def test_a_model_is_scored(folder):
    task = make_task("longbench:trec", data=folder)
    (item,) = task.items(tokenizer(), 500, 1, 0)
    assert set(task.observe(model(), tokenizer(), item)) == {"accuracy"}
    assert task.ids(tokenizer(), item) == encode(tokenizer(), item.queries[0].prompt)


def test_archives_from_the_hub(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    archive = tmp_path / "hotpotwikiqa_mixup.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.write(folder / "hotpotwikiqa_mixup_16k.jsonl", "hotpotwikiqa_mixup/hotpotwikiqa_mixup_16k.jsonl")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **_: asked.append(names) or str(archive))
    assert len(make_task("lv-eval:hotpotwikiqa_mixup_16k").items(tokenizer(), 500, 6, 0)) == 6
    assert asked == [("Infinigence/LVEval", "hotpotwikiqa_mixup.zip")]
    with pytest.raises(UserError, match=r"holds no hotpotwikiqa_mixup_32k\.jsonl"):
        make_task("lv-eval:hotpotwikiqa_mixup_32k").items(tokenizer(), 500, 1, 0)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"download data\.zip"):
        make_task("longbench:hotpotqa", data="nobody/nothing").items(tokenizer(), 500, 1, 0)


BAD = [
    "not json",
    "[" * 100_000,
    '{"input": "x"}',
    '{"input": "x", "context": "y", "answers": []}',
    "[1]",
    json.dumps(record(1, answers=[None])),
    json.dumps(record(1, context="half a letter: \ud83d")),
    json.dumps(record(1, answer_keywords=["Ada"])),
    json.dumps(record(1, all_classes=[1])),
]


@pytest.mark.parametrize("line", BAD)
def test_bad_records_are_named_by_line(tmp_path, line):
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(record(1)) + "\n" + line)
    with pytest.raises(UserError, match="line 2"):
        make_task("longbench:hotpotqa", data=tmp_path).items(tokenizer(), 500, 1, 0)


def test_files_may_begin_with_a_byte_order_mark_and_hold_any_separator(tmp_path):
    lines = [json.dumps(record(n, input="one\u2028two"), ensure_ascii=False) for n in range(2)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [found["input"] for found in records.read_records(tmp_path, "a.jsonl", "a.zip")] == ["one\u2028two"] * 2
    talks = json.dumps({"topic": "tea", "conversation": "USER: one\u2028two"}, ensure_ascii=False)
    (tmp_path / "talks.jsonl").write_text(talks + "\n", encoding="utf-8")
    assert make_task("longeval-topics", data=tmp_path / "talks.jsonl").variant.startswith("official")


def test_files_in_other_encodings_and_texts_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(record(0, input="é"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        records.read_records(tmp_path, "a.jsonl", "a.zip")
    (tmp_path / "a.jsonl").write_text(json.dumps(record(0, input=None)))
    with pytest.raises(UserError, match="line 1: input and context must be text"):
        records.read_records(tmp_path, "a.jsonl", "a.zip")


def test_unknown_sets_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="no LongBench set"):
        make_task("longbench:squad")
    for name in ("hotpotwikiqa_mixup", "hotpotwikiqa_mixup_8k", "squad_16k"):
        with pytest.raises(UserError, match="no LV-Eval set"):
            make_task(f"lv-eval:{name}")
    with pytest.raises(UserError, match="no file"):
        records.read_records(tmp_path, "hotpotqa.jsonl", "data.zip")


def test_prompts_leave_room_for_the_template_and_the_answer(folder):
    task, tokens = make_task("longbench:hotpotqa", data=folder), tokenizer(chat=True)
    (item,) = task.items(tokens, 300, 1, 0)
    assert task.tokens(tokens, item) == len(task.ids(tokens, item)) + 32
    # The record has fewer tokens than the length: nothing is cut, and all of it fits.
    assert len(evaluate(model(), tokens, {}, [task], [1500], 1, progress=False)) == 1
    (folder / "hotpotqa.jsonl").write_text(json.dumps(record(0, context="word " * 1200)))
    with pytest.raises(
        UserError, match=r"hotpotqa at length 4096 has a text of \d+ tokens, .* more than the model's 4096 positions"
    ):
        evaluate(model(), tokens, {}, [make_task("longbench:hotpotqa", data=folder)], [4096], 1, progress=False)
