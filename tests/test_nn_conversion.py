"""Dense models turned into DMA: the same function up to keep_window_size, a sliding window beyond."""

from __future__ import annotations

import pytest
import torch
import transformers as tr

from attnsieve import UserError
from attnsieve.nn import convert
from tests.nn_tiny import SIZES, distinct_tokens, shake

FAMILIES = {
    "llama": lambda **x: tr.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True, **x),
    "mistral": lambda **x: tr.MistralConfig(**SIZES, **{"sliding_window": None, **x}),
    "qwen3": lambda **x: tr.Qwen3Config(**SIZES, head_dim=12, **x),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dense_ones_up_to_the_budget_and_a_window_beyond(family):
    dense = shake(tr.AutoModelForCausalLM.from_config(FAMILIES[family]())).eval()
    ids = distinct_tokens(2, 30)
    converted = convert(dense, 12)
    assert not converted.training
    assert not converted.model.layers[0].self_attn.A.any()
    expected = dense(ids).logits
    torch.testing.assert_close(converted(ids).logits[:, :12], expected[:, :12], atol=2e-5, rtol=1e-4)
    index = torch.arange(30)
    window = (index[None, :] <= index[:, None]) & (index[:, None] < index[None, :] + 12)
    masked = dense(ids, attention_mask=window[None, None].expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(converted(ids).logits, masked, atol=2e-5, rtol=1e-4)


def test_changes_reach_the_configuration_and_weights_are_copies():
    dense = shake(tr.AutoModelForCausalLM.from_config(FAMILIES["llama"]())).to(torch.bfloat16)
    converted = convert(dense, 12, window=3, initial_A=0.5)
    assert converted.config.rule.window == 3
    assert converted.model.layers[1].self_attn.A.tolist() == [0.5, 0.5]
    assert converted.dtype == torch.bfloat16
    with torch.no_grad():
        converted.model.layers[0].mlp.up_proj.weight.zero_()
    assert dense.model.layers[0].mlp.up_proj.weight.any()
    assert converted.lm_head.weight is converted.model.embed_tokens.weight


def test_drawing_is_seeded_and_leaves_the_global_state_alone():
    dense = tr.AutoModelForCausalLM.from_config(FAMILIES["qwen3"]())
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    drawn = [convert(dense, 4, seed=s).model.layers[0].self_attn.dt_proj.weight for s in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_what_the_frame_cannot_compute_is_refused():
    gpt = tr.AutoModelForCausalLM.from_config(tr.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    sliding = tr.AutoModelForCausalLM.from_config(FAMILIES["mistral"](sliding_window=4))
    for model, word in ((gpt, "gpt2"), (sliding, "sliding window of 4")):
        with pytest.raises(UserError, match=word):
            convert(model, 4)
