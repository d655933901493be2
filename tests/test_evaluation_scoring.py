"""Encoding, the split between prompt and answer, filling a length, likelihoods and generation."""

import copy
from random import Random
from string import ascii_lowercase

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralForCausalLM

from attnsieve import UserError
from attnsieve.evaluation.scoring import _batches, fork, generate, log_probs_at, score_documents, spread
from attnsieve.evaluation.tokens import Budget, as_chat, cut_middle, encode, shared_length, split_answer
from tests.evaluation_tiny import SIZES, model, tokenizer


def brute_force(network, tokens, prompt, answer) -> tuple[float, bool]:
    """Likelihood of an answer by one plain forward pass over everything."""
    start, rest = split_answer(tokens, prompt, answer)
    with torch.no_grad():
        logits = network(torch.tensor([start + rest]), use_cache=False).logits[0, len(start) - 1 : -1]
    chosen = logits.log_softmax(-1)[torch.arange(len(rest)), rest]
    return -float(chosen.mean()), logits.argmax(-1).tolist() == rest


def test_bos_is_added_once():
    plain, with_bos = tokenizer(), tokenizer(bos=True)
    assert encode(plain, "ab") == encode(with_bos, "ab")[1:]
    assert encode(with_bos, "ab")[0] == with_bos.bos_token_id
    assert encode(with_bos, "<s>ab") == encode(with_bos, "ab")
    assert encode(with_bos, "") == [with_bos.bos_token_id]


def test_special_tokens_before_a_text_are_added_and_those_behind_it_are_not():
    # GLM's tokenizers put two tokens before a text, others an EOS behind it.
    tokens, plain = tokenizer(), encode(tokenizer(), "ab")
    tokens.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    special = [(token, tokens.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>", "<s>", "</s>")]
    for before, behind in ((["[gMASK]", "<sop>"], ""), (["<s>"], "</s>"), ([], "</s>")):
        template = f"{' '.join(before)} $A {behind}".strip()
        tokens.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        start = tokens.convert_tokens_to_ids(before)
        assert encode(tokens, "ab") == encode(tokens, "".join(before) + "ab") == start + plain
        assert encode(tokens, "") == start


def test_what_the_tokenizer_joins_belongs_to_the_answer():
    tokens = tokenizer()
    prompt, answer = split_answer(tokens, "the ", "cat")
    assert tokens.decode(answer) == " cat"
    assert prompt + answer == encode(tokens, "the cat")
    prompt, answer = split_answer(tokens, "key: ", "123")
    assert tokens.decode(answer) == "123"


def test_an_empty_answer_is_refused():
    with pytest.raises(UserError, match="answer"):
        split_answer(tokenizer(), "key: ", "")


def test_shared_length():
    assert shared_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert shared_length([[1], [2]]) == 0
    assert shared_length(["abc", "abd"]) == 2


@pytest.mark.parametrize("length", [40, 41, 97, 500])
def test_a_budget_is_filled_to_less_than_two_units(length):
    tokens, unit = tokenizer(), len("line 17\n")
    render = lambda n: "head\n" + "".join(f"line {i % 90 + 10}\n" for i in range(n))  # noqa: E731
    units = Budget(tokens, length).most(render, least=1, guess=7)
    used = len(encode(tokens, render(units)))
    assert length - 2 * unit < used <= length


def test_a_budget_ends_with_units_of_random_size():
    tokens = tokenizer()
    for seed in range(200):
        render = lambda n, seed=seed: "".join(Random(f"{seed}/{n}").choices(["x", "yyyyy", "z" * 17], k=n))  # noqa: E731
        units = Budget(tokens, 100).most(render, least=2, guess=Random(seed).randint(1, 60))
        assert len(encode(tokens, render(units))) <= 100


def test_a_budget_that_is_too_small_says_so():
    with pytest.raises(UserError, match="longer length"):
        Budget(tokenizer(), 10).most(lambda n: "x" * (20 + n), least=1, guess=1)


def test_chat_and_cutting():
    assert as_chat(tokenizer(), "hello") == "hello"
    assert as_chat(tokenizer(chat=True), "hello") == "<s>[user] hello\n[bot] "
    for template in ("{% for x in %}", "{{ raise_exception('a system turn is missing') }}", {"rag": "x"}):
        broken = tokenizer()
        broken.chat_template = template
        with pytest.raises(UserError, match=r"chat template does not take a single turn of a user \(\w+: .*\): mend"):
            as_chat(broken, "hello")
    tokens = tokenizer(bos=True)
    assert cut_middle(tokens, "0123456789", 11) == "0123456789"
    assert cut_middle(tokens, "0123456789", 7) == "01789"


def score_answers(network, tokens, questions):
    (scores,) = score_documents(network, tokens, [questions])
    return scores


def test_tokens_that_the_model_does_not_know_are_refused():
    network, tokens = model(), tokenizer()
    tokens.add_tokens(["gold"])
    for questions in ([("all that is gold ", "12")], [("gold: ", "12"), ("gold; ", "13")]):
        with pytest.raises(UserError, match="the model knows 0 to 260; use its own tokenizer"):
            score_answers(network, tokens, questions)
    with pytest.raises(UserError, match="use its own tokenizer"):
        generate(network, tokens, "gold", 2)
    with pytest.raises(UserError, match="no tokens of the text"):
        generate(network, tokens, "", 2)


@pytest.mark.parametrize("asked", [1, 4])
def test_likelihood_equals_one_plain_pass(asked):
    network, tokens = model(), tokenizer()
    document = "".join(f"key{n}: {n * 1237 % 1000}\n" for n in range(30))
    questions = [(f"{document}key{n}: ", str(n * 1237 % 1000)) for n in (1, 5, 17, 29)[:asked]]
    for (prompt, answer), score in zip(questions, score_answers(network, tokens, questions), strict=True):
        nll, exact = brute_force(network, tokens, prompt, answer)
        assert score.nll == pytest.approx(nll, abs=1e-6)
        assert score.exact == exact


def test_documents_go_through_as_batches_with_the_same_scores(monkeypatch):
    network, tokens = model(), tokenizer()
    documents = []
    for number in range(5):
        text = "".join(f"key{n}: {(n + number) * 1237 % 1000:03d}\n" for n in range(10 + number // 3))
        documents.append([(f"{text}\nkey{n}: ", str(n * 1237 % 1000)) for n in (1, 2, 10 + number // 4)])
    documents.append([("one question: ", "12")])
    sizes = []
    forward = network.forward

    def counted(ids, *rest, **options):
        sizes.append(tuple(ids.shape))
        return forward(ids, *rest, **options)

    monkeypatch.setattr(network, "forward", counted)
    found = list(score_documents(network, tokens, documents))
    assert [len(scores) for scores in found] == [3, 3, 3, 3, 3, 1]
    assert sizes[0][0] == 3
    assert max(batch for batch, _ in sizes) == 6
    monkeypatch.undo()
    for questions, scores in zip(documents, found, strict=True):
        for (prompt, answer), score in zip(questions, scores, strict=True):
            nll, exact = brute_force(network, tokens, prompt, answer)
            assert score.nll == pytest.approx(nll, abs=1e-6)
            assert score.exact == exact
            assert score.logits.shape[0] == len(split_answer(tokens, prompt, answer)[1])


def test_a_batch_has_room_for_its_longest_document():
    short, long = [([1] * 10, [2]), ([1] * 11, [2])], [([1] * 10, [2]), ([1] * 30, [2])]
    assert [len(batch) for batch in _batches([short] * 6, 33)] == [3, 3]
    assert [len(batch) for batch in _batches([long, short, short, long], 60)] == [2, 2]
    assert [len(batch) for batch in _batches([short, short, short, long], 60)] == [3, 1]


def greedy(network, ids: list[int], count: int) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            made.append(int(network(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def test_the_greedy_answer_is_exact_and_another_is_not():
    network, tokens = model(), tokenizer()
    # Random models write bytes that are no text; some prompt gives an answer that encodes to what was written.
    for prompt in (f"prompt {n} " for n in range(100)):
        written = greedy(network, encode(tokens, prompt), 2)
        answer = tokens.decode(written)
        if encode(tokens, prompt + answer) == encode(tokens, prompt) + written:
            break
    else:
        pytest.fail("no usable prompt")
    right, wrong = score_answers(network, tokens, [(prompt, answer), (prompt, "zz" if answer[0] != "z" else "yy")])
    assert right.exact
    assert not wrong.exact
    assert right.nll < wrong.nll


def test_a_prompt_that_is_the_start_of_another():
    network, tokens = model(), tokenizer()
    questions = [("abc", "1"), ("abcde", "2")]
    for (prompt, answer), score in zip(questions, score_answers(network, tokens, questions), strict=True):
        assert score.nll == pytest.approx(brute_force(network, tokens, prompt, answer)[0], abs=1e-6)


def test_sliding_caches_are_shared_rightly():
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, vocab_size=len(tokenizer()), num_hidden_layers=2, sliding_window=16)
    network, tokens = MistralForCausalLM(config).double().eval(), tokenizer()
    document = "".join(f"key{n}: {n}\n" for n in range(20))
    questions = [(f"{document}key{n}: ", str(n)) for n in (3, 12)]
    for (prompt, answer), score in zip(questions, score_answers(network, tokens, questions), strict=True):
        assert score.nll == pytest.approx(brute_force(network, tokens, prompt, answer)[0], abs=1e-6)


def test_a_fork_leaves_the_cache_alone():
    network = model()
    with torch.no_grad():
        cache = network(torch.arange(2, 40)[None], use_cache=True).past_key_values
        before = [layer.keys.clone() for layer in cache.layers]
        network(torch.arange(5, 9)[None], past_key_values=fork(cache))
    assert cache.get_seq_length() == 38
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert fork(None) is None


def test_generation_is_greedy_whatever_the_checkpoint_says():
    network, tokens = copy.deepcopy(model()), tokenizer()
    network.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    prompt = "write "
    expected = greedy(network, encode(tokens, prompt), 6)
    wanted = tokens.decode(expected, skip_special_tokens=True)
    if 1 in expected:
        wanted = tokens.decode(expected[: expected.index(1)])
    assert generate(network, tokens, prompt, 6) == wanted
    assert network.generation_config.do_sample


def test_generation_stops_at_the_stop_text():
    network, tokens = model(), tokenizer()
    whole = generate(network, tokens, "write ", 12)
    stop = whole[4]
    assert generate(network, tokens, "write ", 12, stop=stop) == whole[: whole.index(stop) + 1]


def test_generation_stops_at_the_checkpoints_own_stop_strings():
    network, tokens = copy.deepcopy(model()), tokenizer()
    whole = generate(network, tokens, "write ", 12)
    network.generation_config.stop_strings = [whole[4]]
    assert generate(network, tokens, "write ", 12) == whole[: whole.index(whole[4]) + 1]


def test_generation_does_not_begin_with_the_stop_text():
    network, tokens = model(), tokenizer()
    firsts = {prompt: generate(network, tokens, prompt, 1) for prompt in ascii_lowercase}
    prompt, stop = next((prompt, first) for prompt, first in firsts.items() if first.isascii())
    assert generate(network, tokens, prompt, 1, stop=stop) != stop


def test_log_probs_at_positions_equal_the_whole_pass():
    network = model()
    ids = list(range(2, 60))
    positions = spread(len(ids), 7)
    with torch.no_grad():
        whole = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert torch.allclose(log_probs_at(network, ids, positions).double(), whole[positions], atol=1e-5)


@pytest.mark.parametrize(("length", "most"), [(1, 5), (5, 5), (100, 7), (7, 6), (4096, 256)])
def test_spread_positions(length, most):
    positions = spread(length, most)
    assert len(positions) == min(length, most)
    assert positions[-1] == length - 1
    assert positions[0] >= 0
    assert len(set(positions.tolist())) == len(positions)
    gaps = positions.diff()
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_nan_weights_are_reported():
    broken = copy.deepcopy(model())
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="weights"):
        score_answers(broken, tokenizer(), [("abc", "1")])
    with pytest.raises(UserError, match="NaN"):
        log_probs_at(broken, [2, 3, 4], spread(3, 3))
