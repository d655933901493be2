"""profile sees what eager attention computes, disturbs nothing, and refuses texts and models it cannot read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from attnsieve import UserError
from attnsieve.hf import apply, fingerprint, measure, profile
from attnsieve.hf.texts import documents_of
from attnsieve.plan import Plan
from tests.hf_tiny import FAMILIES, GQA, SIZES, VOCAB, logits, tiny, tokens

QUIET = {"progress": False}


@torch.no_grad()
def eager_maps(model, ids):
    model.set_attn_implementation("eager")
    return torch.stack(model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions)[:, 0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_equal_eager_output_attentions(family):
    model = tiny(family)
    ids = tokens(24)
    seen = profile(model, [ids], pcl=24, lengths=(), **QUIET)
    torch.testing.assert_close(seen.maps, eager_maps(model, ids), atol=1e-6, rtol=0)
    assert seen.fingerprint == fingerprint(model)
    assert seen.provenance["documents"] == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_long_statistics_equal_eager(family):
    model = tiny(family)
    pcl, length = 8, 30
    texts = [tokens(length + 5, seed=1), tokens(length, seed=2), tokens(length - 1, seed=3)]
    seen = profile(model, texts, pcl=pcl, lengths=(length,), **QUIET).long[0]
    maps = [eager_maps(model, text[:length])[..., pcl:, :] for text in texts[:2]]
    columns = sum(part.sum(-2) for part in maps)
    torch.testing.assert_close(seen.column_mass, columns, atol=1e-5, rtol=0)
    distance = torch.arange(pcl, length)[:, None] - torch.arange(length)
    offsets = torch.stack([sum(part[..., distance == d].sum(-1) for part in maps) for d in range(length)], dim=-1)
    torch.testing.assert_close(seen.offset_mass, offsets, atol=1e-5, rtol=0)
    assert seen.rows == 2 * (length - pcl)


def test_means_run_over_the_documents_that_reach_a_row():
    model = tiny("qwen3")
    long, short = tokens(12, seed=1), tokens(5, seed=2)
    seen = profile(model, [[long.tolist(), short.tolist()]], pcl=12, lengths=(), **QUIET)
    expected = eager_maps(model, long)
    expected[..., :5, :5] = (expected[..., :5, :5] + eager_maps(model, short)) / 2
    torch.testing.assert_close(seen.maps, expected, atol=1e-6, rtol=0)
    assert seen.rows_seen.tolist() == [2] * 5 + [1] * 7


def test_every_spelling_of_a_batch_gives_the_same_profile():
    model = tiny("llama")
    long, short = tokens(10, seed=1), tokens(7, seed=2)
    pad = torch.zeros(3, dtype=torch.long)
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    left = {"input_ids": torch.stack([long, torch.cat([pad, short])]), "attention_mask": mask}
    right = {"input_ids": torch.stack([long, torch.cat([short, pad])]), "attention_mask": mask.flip(1)}
    spellings = [
        [long, short],
        [long.tolist(), short[None]],
        [[long.tolist(), short.tolist()]],
        [left],
        [right],
        [{"input_ids": long.tolist()}, {"input_ids": [short.tolist()]}],
    ]
    seen = [profile(model, spelling, pcl=10, lengths=(), **QUIET) for spelling in spellings]
    for other in seen[1:]:
        torch.testing.assert_close(other.maps, seen[0].maps, atol=1e-6, rtol=0)
        assert other.provenance["token_digest"] == seen[0].provenance["token_digest"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = tiny("llama", dtype)
    ids = tokens(16)
    seen = profile(model, [ids], pcl=16, lengths=(), **QUIET)
    assert seen.maps.dtype == torch.float32
    torch.testing.assert_close(seen.maps, eager_maps(model, ids), atol=4 * torch.finfo(dtype).eps + 1e-6, rtol=0)


def test_profiling_leaves_the_model_as_it_was():
    model = tiny("gemma3")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids = tokens(1, 20)
    model.set_attn_implementation("sdpa")
    before, attributes = logits(model, ids), set(model.model.layers[1].self_attn.__dict__)
    profile(model, [tokens(9)], pcl=9, lengths=(), **QUIET)
    assert torch.equal(logits(model, ids), before)
    assert set(model.model.layers[1].self_attn.__dict__) == attributes
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


def test_activations_are_those_of_the_model():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    seen = []
    hook = model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model.model(input_ids=tokens(1, 11), use_cache=False)
    profile(model, [tokens(11)], pcl=11, lengths=(), **QUIET)
    hook.remove()
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no text"),
        ([[]], "empty text"),
        ([tokens(9), torch.zeros(0, dtype=torch.long)], "batch 1 holds an empty text"),
        ([[[3, 4], []]], "empty text"),
        ([{"input_ids": [[3, 4]], "attention_mask": [[0, 0]]}], "empty text"),
        ([tokens(8)], "longest text has 8 tokens"),
        (["once upon"], "tokenize"),
        ([["once", "upon"]], "tokenize"),
        ([torch.rand(9)], "whole numbers"),
        ([[3, VOCAB]], f"0 to {VOCAB - 1}"),
        ([[-1, 3]], "-1 to 3"),
        ([torch.zeros(1, 1, 9, dtype=torch.long)], r"\[batch, tokens\]"),
        ([{"text": "a"}], "needs input_ids"),
        ([{"input_ids": [3, 4, 5], "attention_mask": [1, 0, 1]}], "inside a text"),
        ([{"input_ids": [3], "position_ids": [0]}], "position_ids"),
        (tokens(9).tolist(), "got the number .*: put the text in a list"),
        (tokens(9).numpy(), "got the number .*: put the text in a list"),
        ({"input_ids": tokens(9)}, "got one dict: put it in a list"),
        ("once upon", "got one str: put it in a list"),
        (
            [{"input_ids": [3, 4], "attention_mask": ["yes", "no"]}],
            "cannot read attention_mask from list .*; expected 1 for tokens",
        ),
        ([{"input_ids": [[3, 4], [5, 6]], "attention_mask": [[1, 1], [1]]}], "cannot read attention_mask"),
        ([{"input_ids": tokens(9), "attention_mask": torch.ones(8)}], r"attention_mask \(8,\) does not fit input_ids \(9,\)"),
    ],
)
def test_unreadable_texts_are_refused_before_any_computation(batches, message):
    model = tiny("llama")
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message):
        profile(model, batches, pcl=9, lengths=(), **QUIET)


@pytest.mark.parametrize(
    "sizes", [{"pcl": 8.5}, {"pcl": "8"}, {"lengths": 16}, {"lengths": (16.0,)}, {"lengths": "16"}], ids=str
)
def test_sizes_that_are_no_whole_numbers_are_refused(sizes):
    with pytest.raises(UserError, match="pcl is a whole number"):
        profile(tiny("llama"), [tokens(40)], **({"pcl": 8, "lengths": (16,)} | sizes), **QUIET)


def test_documents_keep_their_batches():
    groups = documents_of([[3, 4], [[5], [6, 7, 8]]], VOCAB)
    assert [[document.tolist() for document in group] for group in groups] == [[[3, 4]], [[5], [6, 7, 8]]]


def test_probed_lengths_count_as_needed_length():
    with pytest.raises(UserError, match="longest text has 20 tokens, a capture length or probed length is 21"):
        profile(tiny("llama"), [tokens(20)], pcl=9, lengths=(21,), **QUIET)
    with pytest.raises(UserError, match="nothing to capture"):
        profile(tiny("llama"), [tokens(20)], pcl=9, lengths=(), maps=False, **QUIET)


def test_texts_beyond_the_positions_of_a_model_are_refused():
    config = GPT2Config(vocab_size=VOCAB, n_layer=1, n_embd=8, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for run in (
        lambda n: profile(model, [tokens(20)], pcl=n, lengths=(), **QUIET),
        lambda n: profile(model, [tokens(20)], pcl=4, lengths=(n,), **QUIET),
        lambda n: measure(model, [tokens(4), tokens(n)], ["window(3)"], **QUIET),
    ):
        run(16)
        with pytest.raises(UserError, match="17 tokens are more than the model's 16 positions"):
            run(17)


@pytest.mark.parametrize("layer", [0, 1])
def test_nan_is_reported_with_its_layer_and_the_model_restored(layer):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[layer].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=f"layer {layer} has NaN"):
        profile(model, [tokens(9)], pcl=9, lengths=(), **QUIET)
    assert not hasattr(model.model.layers[0].self_attn, "_attnsieve")
    assert model.config._attn_implementation == "eager"


def test_sums_that_cannot_fit_are_refused_up_front():
    model = tiny("llama")
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(UserError, match="GiB"):
        profile(model, [tokens(600)], pcl=512, lengths=(), memory_limit=1 << 20, **QUIET)


def test_layers_whose_softmax_is_not_plain_are_refused():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, **GQA, head_dim=4))
    with pytest.raises(UserError, match=r"layer 0 cannot be profiled \(softcap.*\): write a plan by hand"):
        profile(model, [tokens(9)], pcl=9, lengths=(), **QUIET)


def test_a_model_under_a_plan_is_not_profiled():
    model = tiny("llama")
    with (
        apply(model, Plan.uniform(fingerprint(model), "window(4)"), backend="reference"),
        pytest.raises(UserError, match="already active"),
    ):
        profile(model, [tokens(9)], pcl=9, lengths=(), **QUIET)


def test_progress_can_be_seen_and_silenced(capsys):
    model = tiny("llama")
    profile(model, [tokens(9)], pcl=9, lengths=())
    assert "profile" in capsys.readouterr().err
    profile(model, [tokens(9)], pcl=9, lengths=(), **QUIET)
    assert capsys.readouterr().err == ""
