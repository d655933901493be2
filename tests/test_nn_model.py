"""DmaForCausalLM as a transformers model: Doge's twin, Auto classes, generation, padding, packing, leaks."""

from __future__ import annotations

import pytest
import torch
import transformers as tr

from attnsieve import UserError
from attnsieve.nn import DmaCache, DmaConfig, DmaForCausalLM
from tests.nn_tiny import SIZES, distinct_tokens, dma, doge

MID = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 64}
CONFIGS = [
    {},
    {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    {**MID, "keep_window_size": 40},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=["tiny", "biases", "rope", "mid"])
@pytest.mark.parametrize(
    ("dtype", "implementation", "tolerance"),
    [(torch.float32, "eager", 1e-4), (torch.float64, "eager", 2e-4), (torch.float64, "sdpa", 1e-7)],
    ids=["float32-eager", "float64-eager", "float64-sdpa"],  # eager Doge takes its softmax in float32 always
)
def test_doge_checkpoints_load_and_give_its_logits_and_gradients(changes, dtype, implementation, tolerance, tmp_path):
    theirs = doge(dtype, **changes)
    theirs.set_attn_implementation(implementation)
    ids = distinct_tokens(1, 12)
    if not torch.allclose(theirs(ids[:, :6]).logits, theirs(ids).logits[:, :6], atol=1e-3):
        pytest.skip("this transformers' Doge sees the future (transformers issue 48821)")
    theirs.save_pretrained(tmp_path)
    ours = DmaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    window = ours.config.keep_window_size
    for n in (window - 1, window, 3 * window):
        ids = distinct_tokens(2, n)
        losses = []
        for model in (theirs, ours):
            model.zero_grad()
            losses.append(model(ids, labels=ids, use_cache=False))
            losses[-1].loss.backward()
        torch.testing.assert_close(losses[1].logits, losses[0].logits, atol=tolerance / 5, rtol=tolerance)
        mine = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            error = (parameter.grad - mine[name].grad).norm() / parameter.grad.norm().clamp_min(1e-3)
            # A's gradient is a small difference of large sums, which rounding reaches magnified.
            assert error < tolerance * (5 if name.endswith(".A") else 1), name


def test_doge_loads_in_sdpa_too_and_left_padding_agrees():
    theirs, ours = doge(), dma()
    ours.load_state_dict(theirs.state_dict())
    ids = distinct_tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    theirs.set_attn_implementation("sdpa")
    expected, actual = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[0], expected[0], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(actual[1, 7:], expected[1, 7:], atol=3e-5, rtol=1e-4)


def test_mixture_of_experts_is_refused(tmp_path):
    tr.DogeConfig(**SIZES, is_moe=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="experts"):
        DmaConfig.from_pretrained(tmp_path)


def test_auto_classes_save_and_load(tmp_path):
    model = dma(window=3, sinks=1, initial_A=0.25)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = tr.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DmaForCausalLM
    assert loaded.config.rule == model.config.rule
    ids = distinct_tokens(1, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_new_model_starts_as_the_configuration_says():
    model = tr.AutoModelForCausalLM.from_config(DmaConfig(**SIZES, initial_A=0.25))
    layer = model.model.layers[0]
    assert layer.self_attn.A.tolist() == [0.25, 0.25]
    assert bool((layer.input_residual == 1).all())
    assert 0.01 < layer.self_attn.dt_proj.weight.detach().std() < 0.03


@pytest.mark.parametrize("options", [{}, {"window": 3, "sinks": 2}])
def test_generation_with_the_bounded_cache_equals_no_cache_and_a_full_cache(options):
    model = dma(torch.float64, **options)
    ids = distinct_tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    request = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "output_logits": True}
    request["return_dict_in_generate"] = True
    bounded = model.generate(ids, **request)
    assert isinstance(bounded.past_key_values, DmaCache)
    longer = model.generate(ids, **{**request, "max_new_tokens": 60})
    assert bounded.past_key_values.nbytes == longer.past_key_values.nbytes > 0
    for other in ({"use_cache": False}, {"past_key_values": tr.DynamicCache()}):
        expected = model.generate(ids, **request, **other)
        assert torch.equal(bounded.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(bounded.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_beams_equal_beams_without_cache():
    model = dma(torch.float64)
    request = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    expected = model.generate(distinct_tokens(2, 11), use_cache=False, **request)
    assert torch.equal(model.generate(distinct_tokens(2, 11), **request), expected)


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_by_number_or_flags():
    model, ids = dma(torch.float64), distinct_tokens(3, 11)
    expected = model(ids, use_cache=False).logits[[0, 2], -1:]
    for rows in (torch.tensor([0, 2]), torch.tensor([True, False, True])):
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        cache.batch_select_indices(rows)
        got = model(ids[rows, -1:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("helper", ["prompt", "dma", "llama"])
def test_assisted_decoding_equals_plain_decoding(helper):
    """Drafts that are not accepted are taken back, by the model and by a DMA model that drafts."""
    model, ids = dma(torch.float64, window=2), distinct_tokens(1, 20)
    model.generation_config.pad_token_id = 0
    ids = torch.cat([ids, ids[:, :7]], dim=1)
    plain = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **plain)
    if helper == "prompt":
        asked = {"prompt_lookup_num_tokens": 4}
    elif helper == "llama":
        llama = tr.LlamaForCausalLM(tr.LlamaConfig(**SIZES)).eval().double()
        asked = {"assistant_model": llama}
    else:
        drafter = dma(torch.float64, keep_window_size=5)
        drafter.load_state_dict({name: 1.05 * value for name, value in model.state_dict().items()})
        asked = {"assistant_model": drafter}
    out = model.generate(ids, **plain, **asked)
    assert isinstance(out.past_key_values, DmaCache)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_chunked_prefill_and_a_continued_cache_equal_one_pass():
    model, ids = dma(torch.float64, window=2), distinct_tokens(2, 50)
    whole = model(ids).logits
    cache, parts = DmaCache(model.config), []
    for first, last in ((0, 9), (9, 10), (10, 31), (31, 50)):
        parts.append(model(ids[:, first:last], past_key_values=cache).logits)
    assert cache.get_seq_length() == 50
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_padding_on_either_side_and_packing_equal_each_text_alone():
    model = dma(torch.float64, window=2)
    texts = [distinct_tokens(1, n, seed=n)[0] for n in (23, 14)]
    alone = [model(text[None]).logits[0] for text in texts]
    for left in (True, False):
        ids, mask = torch.zeros(2, 23, dtype=torch.long), torch.zeros(2, 23, dtype=torch.long)
        for row, text in enumerate(texts):
            place = slice(23 - len(text), 23) if left else slice(0, len(text))
            ids[row, place], mask[row, place] = text, 1
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        for row, expected in enumerate(alone):
            torch.testing.assert_close(logits[row][mask[row].bool()], expected, atol=1e-6, rtol=1e-5)
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    packed = model(torch.cat(texts)[None], position_ids=positions[None], use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-6, rtol=1e-5)


def test_no_logit_sees_the_future():
    model, ids = dma(), distinct_tokens(1, 60)
    before = model(ids).logits
    for t in (1, 30, 59):
        changed = ids.clone()
        changed[:, t:] = distinct_tokens(1, 60, seed=5)[:, t:]
        torch.testing.assert_close(model(changed).logits[:, :t], before[:, :t], atol=1e-6, rtol=1e-6)
        assert not torch.equal(model(changed).logits[:, t:], before[:, t:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    plain, saving = dma().train(), dma().train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = distinct_tokens(2, 30)
    for model in (plain, saving):
        assert model(ids).past_key_values is None  # training makes no cache, whatever use_cache says
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, at=name: f"{at}: {text}")


def test_hidden_states_labels_and_logits_to_keep():
    model, ids = dma(), distinct_tokens(2, 12)
    out = model(ids, labels=ids, output_hidden_states=True)
    assert out.past_key_values is None
    assert len(out.hidden_states) == 3
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, out.logits[:, -1:])


def test_what_cannot_be_honoured_is_refused():
    model, ids = dma(attention_dropout=0.1), distinct_tokens(2, 12)
    with pytest.raises(UserError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(UserError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(UserError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 5, 24]))
    with pytest.raises(UserError, match="dropout"):
        model.train()(ids)
    model.eval()
    with pytest.raises(UserError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="scaled_dot_product"):
        model.set_attn_implementation("sdpa")
    cache = DmaCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(UserError, match="activate_past_recording"):
        cache.crop(-1)
    model.config.keep_window_size = 9
    with pytest.raises(UserError, match="keep_window_size=8"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention": "linear"}, "attention must be"),
        ({"keep_window_size": 0}, "keep_window_size"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"attention": "mha", "num_key_value_heads": 2}, "KV heads"),
        ({"attention": "swa"}, "sliding_window"),
        ({"attention": "nsa", "nsa_stride": 7}, "nsa_stride"),
        ({"attention": "nsa", "nsa_stride": 0}, "nsa_stride must be at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"head_dim": 1}, "head_dim must be even"),
        ({"attention": "mla", "num_key_value_heads": None, "mla_rope_width": 3}, "mla_rope_width must be even"),
        ({"attention": "mla", "mla_rope_width": 0}, "mla_rope_width must be at least 1"),
        ({"attention": "mla", "mla_q_rank": -1}, "mla_q_rank must be at least 0"),
        ({"attention": "nsa", "nsa_selected": 2}, "nsa_selected must be at least 3"),
        ({"attention": "nsa", "nsa_window": -1}, "nsa_window must be at least 1"),
        ({"rope_parameters": "linear"}, "rope_parameters must be names and values"),
        ({"hidden_act": "nope"}, "no activation 'nope'"),
        ({"hidden_dropout": 2}, "hidden_dropout must be from 0 to 1"),
        ({"hidden_dropout": float("nan")}, "hidden_dropout must be from 0 to 1"),
        ({"initializer_range": -1.0}, "initializer_range must be a number from 0"),
        ({"pad_token_id": 99999}, "pad_token_id must be one of the"),
        ({"pad_token_id": 1.5}, "pad_token_id must be a whole number"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id must be a whole number"),
    ],
)
def test_bad_configurations_are_refused(changes, word):
    with pytest.raises(UserError, match=word):
        DmaConfig(**{**SIZES, **changes})
