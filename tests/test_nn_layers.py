"""The comparison layers: equal to public models or to their definition, causal, and the same with and without a cache."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tr

from attnsieve import UserError
from attnsieve.nn import DmaConfig, DmaForCausalLM
from attnsieve.nn.configuration import ATTENTIONS
from attnsieve.nn.layers import Pass
from attnsieve.nn.layers.nsa import NativeSparseAttention
from tests.nn_tiny import SIZES, distinct_tokens, dma, shake

OPTIONS = {
    "dma": {"keep_window_size": 8, "window": 2},
    "mha": {"num_key_value_heads": None},
    "mqa": {"num_key_value_heads": None},
    "gqa": {},
    "swa": {"sliding_window": 7},
    "mla": {"num_key_value_heads": None, "mla_kv_rank": 12, "mla_rope_width": 4},
    "nsa": {"nsa_block": 4, "nsa_stride": 2, "nsa_selected_block": 8, "nsa_selected": 4, "nsa_window": 5},
}


def model_of(attention: str, dtype: torch.dtype = torch.float64, **changes) -> DmaForCausalLM:
    return dma(dtype, attention=attention, **OPTIONS[attention], **changes)


def test_every_attention_is_tested():
    assert set(OPTIONS) == set(ATTENTIONS)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_logit_sees_the_future(attention):
    model, ids = model_of(attention), distinct_tokens(1, 60)
    before = model(ids, use_cache=False).logits
    for t in (1, 17, 40, 59):
        changed = ids.clone()
        changed[:, t:] = distinct_tokens(1, 60, seed=5)[:, t:]
        after = model(changed, use_cache=False).logits
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_chunks_and_steps_equal_one_pass(attention):
    model, ids = model_of(attention), distinct_tokens(2, 40)
    whole, cache, parts = model(ids, use_cache=False).logits, None, []
    for first, last in [(0, 3), (3, 20), *((t, t + 1) for t in range(20, 40))]:
        out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "nsa"])
def test_padding_and_packing_equal_each_text_alone(attention):
    model = model_of(attention)
    texts = [distinct_tokens(1, n, seed=n)[0] for n in (21, 12)]
    alone = [model(text[None], use_cache=False).logits[0] for text in texts]
    ids = torch.stack([texts[0], F.pad(texts[1], (9, 0))])
    mask = torch.stack([torch.ones(21), F.pad(torch.ones(12), (9, 0))])
    for cached in (False, True):
        padded = model(ids, attention_mask=mask, use_cache=cached).logits
        torch.testing.assert_close(padded[1, 9:], alone[1], atol=1e-5, rtol=1e-5)
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    packed = model(torch.cat(texts)[None], position_ids=positions[None], use_cache=False)
    torch.testing.assert_close(packed.logits[0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    steps = {"max_new_tokens": 15, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **steps)
    assert torch.equal(together[1, 9:], model.generate(texts[1][None], **steps)[0])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_learns_and_checkpointing_agrees(attention):
    ids, grads = distinct_tokens(2, 40), []
    for save in (False, True):
        model = model_of(attention).train()
        if save:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.any(), name
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_saving_and_loading(attention, tmp_path):
    model, ids = model_of(attention, torch.float32), distinct_tokens(1, 20)
    model.save_pretrained(tmp_path)
    loaded = tr.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gqa_without_norms_is_llama_and_swa_is_mistral():
    ids, sizes = distinct_tokens(2, 40), {**SIZES, "rms_norm_eps": 1e-6}
    llama = shake(tr.LlamaForCausalLM(tr.LlamaConfig(**sizes))).eval().double()
    mistral = shake(tr.MistralForCausalLM(tr.MistralConfig(**sizes, sliding_window=7))).eval().double()
    for theirs, changes in ((llama, {"attention": "gqa"}), (mistral, {"attention": "swa", "sliding_window": 7})):
        ours = DmaForCausalLM(DmaConfig(**sizes, **changes, qk_norm=False)).eval().double()
        missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert not unexpected
        assert all(name.endswith("residual") for name in missing)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_mla_equals_its_equations():
    layer = model_of("mla", mla_q_rank=6).model.layers[0].self_attn
    model = model_of("mla", mla_q_rank=6)
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(9)[None])
    out = layer(hidden, Pass(cos, sin), None)
    rotate = lambda x: x * cos[0] + torch.cat([-x[:, 2:], x[:, :2]], dim=1) * sin[0]  # noqa: E731
    q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(hidden)))[0].view(9, 4, 12)
    down = layer.kv_a_proj(hidden)[0]
    up = layer.kv_b_proj(layer.kv_a_layernorm(down[:, :12])).view(9, 4, 16)
    heads = []
    for h in range(4):
        query = torch.cat([q[:, h, :8], rotate(q[:, h, 8:])], dim=1)
        key = torch.cat([up[:, h, :8], rotate(down[:, 12:])], dim=1)
        scores = query @ key.T / math.sqrt(12)
        causal = torch.ones(9, 9, dtype=torch.bool).tril()
        heads.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ up[:, h, 8:])
    torch.testing.assert_close(out[0], layer.o_proj(torch.cat(heads, dim=1)), atol=1e-6, rtol=1e-6)


def nsa_branches(layer: NativeSparseAttention, q, q_rope, k, v):
    """The three branches by the paper's equations: every row, head and block in a loop; tensors [heads, n, D]."""
    c, n, group = layer.config, q.shape[1], q.shape[0] // k[0].shape[0]
    out = torch.zeros(3, *q.shape, dtype=q.dtype)
    blocks = range(0, n - c.nsa_block + 1, c.nsa_stride)
    for h in range(k[0].shape[0]):
        compressed = [
            [phi(x[h, None, None, b : b + c.nsa_block])[0, 0, 0] for b in blocks]
            for phi, x in ((layer.compress_k, k[0]), (layer.compress_v, v[0]))
        ]
        for i in range(n):
            done = [m for m, b in enumerate(blocks) if b + c.nsa_block - 1 <= i]
            importance = torch.zeros(-(-n // c.nsa_selected_block), dtype=q.dtype)
            for a in range(h * group, (h + 1) * group):
                if done:
                    keys = torch.stack([compressed[0][m] for m in done])
                    weights = (keys @ q[a, i] / math.sqrt(q.shape[2])).softmax(0)
                    out[0, a, i] = weights @ torch.stack([compressed[1][m] for m in done])
                    for m, weight in zip(done, weights, strict=True):
                        for token in range(blocks[m], blocks[m] + c.nsa_block, c.nsa_stride):
                            importance[token // c.nsa_selected_block] += weight.detach()
            own = i // c.nsa_selected_block
            fixed = {0, own, max(own - 1, 0)}
            others = sorted(set(range(own + 1)) - fixed, key=lambda j: -float(importance[j]))
            chosen = fixed | set(others[: c.nsa_selected - len(fixed)])
            selected = [j for j in range(i + 1) if j // c.nsa_selected_block in chosen]
            newest = list(range(max(0, i - c.nsa_window + 1), i + 1))
            for a in range(h * group, (h + 1) * group):
                for branch, keep in ((1, selected), (2, newest)):
                    weights = (k[branch][h, keep] @ q_rope[a, i] / math.sqrt(q.shape[2])).softmax(0)
                    out[branch, a, i] = weights @ v[branch][h, keep]
    return out


@pytest.mark.parametrize("n", [2, 13, 50])
def test_nsa_branches_equal_their_equations(n):
    layer = model_of("nsa").model.layers[0].self_attn
    layer.compress_k.position.data.normal_()
    q, q_rope = (torch.randn(4, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    k, v = ([torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)] for _ in range(2))
    batched = [tuple(x[None] for x in xs) for xs in (k, v)]
    branches = torch.stack(layer._branches(q[None], q_rope[None], *batched))[:, 0]
    expected, weight = nsa_branches(layer, q, q_rope, k, v), torch.randn_like(branches)
    torch.testing.assert_close(branches, expected, atol=1e-10, rtol=1e-8)
    leaves = [q, q_rope, *k, *v]
    ours, theirs = (torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True) for out in (branches, expected))
    for one, other, leaf in zip(ours, theirs, leaves, strict=True):
        torch.testing.assert_close(*(torch.zeros_like(leaf) if g is None else g for g in (one, other)), atol=1e-10, rtol=1e-8)


def test_nsa_equals_the_reference_of_flash_linear_attention():
    """Where both know the case: compressed and selected blocks are the same ones."""
    reference = pytest.importorskip("fla.ops.nsa.naive", reason="pip install fla-core einops")
    sizes = {"nsa_block": 8, "nsa_stride": 8, "nsa_selected_block": 8, "nsa_selected": 4}
    layer = dma(torch.float64, attention="nsa", **sizes).model.layers[0].self_attn
    n, rows = 72, torch.arange(72)
    q, k, v = (torch.randn(2, heads, n, 8) for heads in (4, 2, 2))
    k_cmp, v_cmp = torch.randn(2, 2, 2, n // 8, 8)
    theirs = lambda *tensors: (tensor.transpose(1, 2) for tensor in tensors)  # noqa: E731
    ours, weights = layer._compression(q, rows, k_cmp, v_cmp)
    expected, _ = reference.naive_nsa_compression(*theirs(q, k_cmp, v_cmp), 8, 8**-0.5)
    torch.testing.assert_close(ours, expected.transpose(1, 2))
    chosen = layer.choose_blocks(weights, rows, n)
    indices = reference.naive_nsa_topk(*theirs(q, k_cmp), 4, 8, 8**-0.5)
    listed = F.one_hot(torch.where(indices < 0, 9, indices), 10).amax(-2)[..., :9].bool()
    assert torch.equal(chosen, listed.transpose(1, 2))
    selected = reference.naive_nsa_selection(*theirs(q, k, v), indices, 8)
    torch.testing.assert_close(layer._selection(q, rows, chosen, k, v), selected.transpose(1, 2))


def test_nsa_chunks_of_queries_change_nothing(monkeypatch):
    model, ids = model_of("nsa"), distinct_tokens(1, 45)
    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr("attnsieve.nn.layers.nsa.QUERIES", 7)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_nsa_refuses_padding():
    with pytest.raises(UserError, match="unpadded"):
        model_of("nsa")(distinct_tokens(1, 9), attention_mask=torch.tensor([[0] + [1] * 8]), use_cache=False)
