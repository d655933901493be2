"""Items: prompts to the letter, lengths filled, seeds, and scoring of what a model writes."""

import itertools
import json
import re
from random import Random

import pytest

from attnsieve import Plan, UserError
from attnsieve.evaluation.rehearsal import rehearsal
from attnsieve.evaluation.scoring import AnswerScore
from attnsieve.evaluation.tasks import TASKS, make_task, make_tasks, questions
from attnsieve.evaluation.tasks import aligned as aligned_module
from attnsieve.evaluation.tasks.aligned import aligned
from attnsieve.evaluation.tasks.language import buckets
from attnsieve.evaluation.tasks.longeval import topics
from attnsieve.evaluation.tasks.needle import VARIANTS, _item, needle_task
from attnsieve.evaluation.text import TextSource
from attnsieve.evaluation.tokens import encode
from attnsieve.hf import apply, fingerprint
from tests.evaluation_tiny import model, tokenizer

ESSAY = TextSource("essay", lambda _: "One fish swims. Two birds sing! Did three cats sleep? Four dogs ran home. " * 40)
QUESTIONS = [name for name in TASKS if name not in ("perplexity", "fidelity")]


def made(name: str):
    return needle_task(name, ESSAY) if name in VARIANTS else make_task(name)


def longest(tokens, item) -> int:
    return max(len(encode(tokens, query.prompt + query.gap + query.answers[0])) for query in item.queries)


@pytest.mark.parametrize("name", QUESTIONS)
def test_items_fill_the_length_and_follow_the_seed(name):
    task, tokens, length = made(name), tokenizer(), 4000
    first, second = task.items(tokens, length, 2, seed=5)
    assert first != second
    assert [first, second] == task.items(tokens, length, 2, seed=5)
    assert [first] == task.items(tokens, length, 1, seed=5)
    assert first != task.items(tokens, length, 1, seed=6)[0]
    room = length - (task.generation.max_new_tokens if task.generation else 0)
    for item in (first, second):
        # Byte-level tokens make units large: a conversation has some 800.
        assert 0.7 * room < longest(tokens, item) <= room
    assert task.ids(tokens, first) == encode(tokens, first.queries[0].prompt)


@pytest.mark.parametrize("name", QUESTIONS)
def test_too_short_lengths_are_refused(name):
    with pytest.raises(UserError, match="longer length"):
        made(name).items(tokenizer(), 20, 1, 0)


def test_key_value_prompts():
    (item,) = make_task("kv").items(tokenizer(), 600, 1, 0)
    document = item.queries[0].prompt
    lines = dict(re.findall(r"^([a-z]+-[a-z]+): (\d{5})$", document, re.MULTILINE))
    assert len(lines) == item.metadata["lines"]
    assert len(set(lines.values())) == len(lines)
    assert len(item.queries) == 8
    assert len({query.prompt for query in item.queries}) == 8
    for query in item.queries:
        key = re.search(r"\d\n\n([a-z]+-[a-z]+): $", query.prompt)[1]
        assert query.answers == (lines[key],)


def test_passkey_prompts():
    for item in make_task("passkey").items(tokenizer(), 1500, 5, 0):
        (query,) = item.queries
        assert query.prompt.count(f"The pass key is {query.answers[0]}. Remember it. {query.answers[0]} is the pass key.") == 1
        assert query.prompt.endswith("What is the pass key? The pass key is ")


def test_lines_prompts_are_the_official_ones():
    (item,) = make_task("longeval-lines").items(tokenizer(), 2000, 1, 0)
    (query,) = item.queries
    official = (
        r"Below is a record of lines I want you to remember\. Each line begins with 'line <line index>' and contains a "
        r"'<REGISTER_CONTENT>' at the end of the line as a numerical value\. For each line index, memorize its corresponding "
        r"<REGISTER_CONTENT>\. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
        r"certain line index\. Now the record start:\n\n(line [a-z]+-[a-z]+: REGISTER_CONTENT is <\d+>\n)+\nNow the record is "
        r"over\. Tell me what is the <REGISTER_CONTENT> in line ([a-z]+-[a-z]+)\? I need the number\."
    )
    found = re.fullmatch(official, query.prompt)
    assert f"line {found[2]}: REGISTER_CONTENT is <{query.answers[0]}>\n" in query.prompt


def test_the_prefix_variant_is_another_task():
    (item,) = make_task("longeval-lines-prefix").items(tokenizer(chat=True), 2000, 1, 0)
    assert len(item.queries) == 8
    for query in item.queries:
        key = re.search(r"in line (\S+)\? I need the number\. Line <(\S+)>: <REGISTER_CONTENT> is <$", query.prompt)
        assert key[1] == key[2]
        assert f"line {key[1]}: REGISTER_CONTENT is <{query.answers[0]}>\n" in query.prompt
        assert not query.prompt.startswith("<s>")


def test_generated_tasks_use_the_chat_template():
    for name in ("longeval-lines", "longeval-topics"):
        (item,) = make_task(name).items(tokenizer(chat=True), 2000, 1, 0)
        assert item.queries[0].prompt.startswith("<s>[user] Below is a record")
        assert item.queries[0].prompt.endswith("[bot] ")


@pytest.mark.parametrize(
    ("text", "right"), [("It is 12, no, 345.", 1.0), ("345 or 12", 0.0), ("I do not know", 0.0), ("0345", 1.0)]
)
def test_the_last_integer_counts(text, right):
    query = questions.Query("?", ("345",))
    assert make_task("longeval-lines").generation.score(text, query) == right


def test_topics_from_the_official_file(tmp_path):
    path = tmp_path / "conversations.jsonl"
    rows = [
        {"topic": f"The art of {n}", "conversation": f"USER: I would like to discuss the art of {n}. \n"} for n in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = topics(path)
    assert task.variant.startswith("official ")
    (item,) = task.items(tokenizer(), 1500, 1, 0)
    first = re.search(r"Now the record start. USER: I would like to discuss the art of (\d+)", item.queries[0].prompt)[1]
    assert item.queries[0].answers == (f"The art of {first}",)
    assert f"conversation on {len(item.metadata['topics'])} different topics" in item.queries[0].prompt
    with pytest.raises(UserError, match="30 conversations"):
        task.items(tokenizer(), 9000, 1, 0)
    for bad in ('{"topic": "x"}', "[" * 100_000, '{"topic": "The", "conversation": "x"}', '{"topic": "x", "conversation": 1}'):
        path.write_text(bad)
        with pytest.raises(UserError, match="conversation"):
            topics(path)
    with pytest.raises(UserError, match="no file"):
        topics(tmp_path / "absent.jsonl")


def test_topics_are_matched_without_articles_and_case():
    score = make_task("longeval-topics").generation.score
    query = questions.Query("?", ("The history of  brave wolfs",))
    assert score("the first topic was 'History of Brave wolfs'.", query) == 1
    assert score("history of wolfs", query) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_needles_are_in_the_haystack_and_the_prompt_is_rulers(name):
    variant = VARIANTS[name]
    (item,) = made(name).items(tokenizer(), 3500, 1, 1)
    (query,) = item.queries
    assert len(query.answers) == variant.values * variant.asked
    for answer in query.answers:
        assert len(re.findall(rf"One of the special magic {variant.value_kind} for \S+ is: {answer}\.", query.prompt)) == 1
    needles = len(re.findall(r"One of the special magic", query.prompt))
    assert needles == variant.keys * variant.values if variant.haystack != "needle" else needles > 10
    one = len(query.answers) == 1
    kind = variant.value_kind.removesuffix("s" if one else "")
    hidden = f"A special magic {kind} is hidden" if one else f"Some special magic {kind} are hidden"
    assert query.prompt.startswith(
        f"{hidden} within the following text. Make sure to memorize it. I will quiz you about the {kind}"
    )
    asked = "What is the" if one else "What are all the"
    end = (
        rf"\n{asked} special magic {kind} for (.+) mentioned in the provided text\? The special magic {kind} for \1 mentioned "
    )
    assert re.search(end + f"in the provided text {'is' if one else 'are'}$", query.prompt)
    if variant.value_kind == "numbers":
        assert all(re.fullmatch(r"\d{7}", answer) for answer in query.answers)
    if variant.haystack == "essay":
        assert "One fish swims. " in query.prompt or "Two birds sing! " in query.prompt


def test_several_needles_share_the_question():
    (item,) = made("needle-multiquery").items(tokenizer(), 3000, 1, 0)
    keys = re.search(r"What are all the special magic numbers for (.+?) mentioned", item.queries[0].prompt)[1]
    assert re.fullmatch(r"\S+, \S+, \S+, and \S+", keys)
    generation = made("needle-multiquery").generation
    assert generation.score(f"They are {item.queries[0].answers[2]}.", item.queries[0]) == 0.25
    assert (generation.metric, generation.max_new_tokens) == ("string_match", 128)


def test_no_other_needle_has_the_key_that_is_asked_for():
    # Of 400 documents with 400 lines, six had one where the lines' keys were drawn without looking at the hidden one.
    for seed in range(400):
        prompt = _item(VARIANTS["needle-multikey-2"], lambda _: [], Random(seed), 400).queries[0].prompt
        key = re.search(r"What is the special magic number for (\S+) mentioned", prompt)[1]
        assert prompt.count(f" for {key} is: ") == 1


def test_needle_values_are_forced_after_the_space():
    assert not made("needle-multivalue").forced
    (item,) = made("needle-single-2").items(tokenizer(), 3000, 1, 0)
    assert item.queries[0].gap == " "


def test_measures_are_means_over_the_queries(monkeypatch):
    answers = iter([AnswerScore(1.0, True), AnswerScore(2.0, False), AnswerScore(6.0, False), AnswerScore(1.0, True)])
    monkeypatch.setattr(
        questions, "score_documents", lambda model, tokenizer, asked: ([next(answers) for _ in q] for q in asked)
    )
    item = questions.Item(tuple(questions.Query(f"{n}", ("1",)) for n in range(4)))
    (seen,) = questions.forced_answers(None, None, [item])
    assert seen.measures == {"exact_match": 0.5, "answer_nll": 2.5}
    texts = iter(["4", "5", "4", "4"])
    monkeypatch.setattr(questions, "generate", lambda *_: next(texts))
    generation = questions.Generation("hit", lambda text, query: float(text == "4"), 5)
    assert questions.generated_measures(None, None, item, generation) == {"hit": 0.75}


def test_a_task_runs_on_a_model():
    task, tokens = made("needle-single-1"), tokenizer()
    (item,) = task.items(tokens, 1200, 1, 0)
    seen = task.observe(model(), tokens, item)
    assert set(seen.measures) == {"exact_match", "answer_nll", "string_match"}
    assert task.measure(seen, seen) == seen.measures | {"answer_kl": 0.0}
    assert task.inspect(model(), None, item) == {}


@pytest.mark.parametrize("name", ["kv", "longeval-lines-prefix", "passkey"])
def test_aligned_items_share_shapes(name):
    task, tokens = aligned(make_task(name)), tokenizer()
    items = task.items(tokens, 2000, 6, 3)
    assert items == task.items(tokens, 2000, 6, 3)
    assert items != task.items(tokens, 2000, 6, 4)
    assert (task.name, task.variant) == (name, "aligned spread")
    assert len({item.queries[0].prompt for item in items}) == 6
    assert all(1400 < longest(tokens, item) <= 2000 for item in items)
    asked = [[query.prompt[query.prompt.rindex("\n") :] for query in item.queries] for item in items]
    assert all(1 <= len(queries) <= 8 for queries in asked)
    assert len({len(encode(tokens, rest)) for queries in asked for rest in queries}) == 1
    sizes = [longest(tokens, item) for item in items]
    assert len(set(sizes)) <= 3
    assert len(list(itertools.groupby(sizes))) == len(set(sizes))


def test_aligned_questions_are_spread_over_the_document():
    task, tokens = aligned(make_task("kv")), tokenizer()
    places = [
        query.prompt.index(query.answers[0]) / len(query.prompt)
        for item in task.items(tokens, 4000, 6, 0)
        for query in item.queries
    ]
    assert sum(place < 0.3 for place in places) > len(places) / 6
    assert sum(place > 0.7 for place in places) > len(places) / 6


def test_aligned_items_that_are_all_too_long_say_so(monkeypatch):
    task = aligned(make_task("kv"))
    monkeypatch.setattr(aligned_module.Budget, "most", lambda *_: 100)
    with pytest.raises(UserError, match="longer length"):
        task.items(tokenizer(), 300, 2, 0)


@pytest.mark.parametrize(
    "pattern", ["dense()", "sink(1) | window(8) | probed_keys(mass=0.5)", "window(4) | vertical_slash(mass=0.5)"]
)
def test_aligned_items_are_scored_like_any(pattern):
    task, tokens = aligned(make_task("kv")), tokenizer()
    items = task.items(tokens, 700, 3, 0)
    with apply(model(), Plan.uniform(fingerprint(model()), pattern)):
        together = [seen.measures for seen in task.observe_all(model(), tokens, items)]
        alone = [task.observe(model(), tokens, item).measures for item in items]
    assert together == [pytest.approx(one, abs=1e-6) for one in alone]


@pytest.mark.parametrize("name", ["kv", "longeval-lines-prefix"])
def test_a_rehearsal_is_a_document_with_questions_and_answers(name):
    tokens = tokenizer()
    ids = rehearsal(tokens, name, 3000, 7)
    assert len(ids) == 3000
    assert ids == rehearsal(tokens, name, 3000, 7)
    text = tokens.decode(ids)
    form = r"\n\n(\w+-\w+): (\d{5})(?=\n)" if name == "kv" else r"Line <(\S+)>: <REGISTER_CONTENT> is <(\d+)(?=\n)"
    answered = re.findall(form, text)
    assert len(answered) >= 4
    for key, value in answered:
        assert (f"{key}: {value}\n" if name == "kv" else f"line {key}: REGISTER_CONTENT is <{value}>") in text[:2600]
    with pytest.raises(UserError, match="rehearse"):
        rehearsal(tokens, "passkey", 3000, 7)


def test_buckets_double():
    assert buckets(100) == [(0, 100)]
    assert buckets(256) == [(0, 256)]
    assert buckets(1500) == [(0, 256), (256, 512), (512, 1024), (1024, 1500)]


@pytest.mark.parametrize(("name", "hint"), [("kvv", "kv"), ("needle-single-4", "needle-single"), ("squad", "known: kv")])
def test_unknown_tasks_are_named(name, hint):
    with pytest.raises(UserError, match=hint):
        make_task(name)


def test_an_option_goes_to_the_tasks_that_read_it_and_is_refused_where_none_does(tmp_path):
    (tmp_path / "book.txt").write_text("Once upon a time. " * 99)
    one, other = make_tasks(["kv", "perplexity"], text=tmp_path / "book.txt")
    assert (one.name, other.name, other.variant[:5]) == ("kv", "perplexity", "book@")
    for name, option in (("kv", "data"), ("needle-single-1", "text"), ("fidelity", "data"), ("longbench:trec", "text")):
        with pytest.raises(UserError, match=f"{option} 'x' was given, but none of the tasks {name} reads it"):
            make_task(name, **{option: "x"})


@pytest.mark.parametrize("name", ["needle-single-1", "needle-single-2", "passkey"])
def test_what_is_hidden_lies_at_all_depths(name):
    hidden = "The pass key is" if name == "passkey" else "One of the special magic"
    items = made(name).items(tokenizer(), 1600, 24, 0)
    depths = [item.queries[0].prompt.index(hidden) / len(item.queries[0].prompt) for item in items]
    assert min(depths) < 0.35
    assert max(depths) > 0.6
    assert len({round(depth, 1) for depth in depths}) > 4
