"""The adapter on a GPU: caches that compile, layouts on the device, sums beside the model."""

import pytest
import torch
from transformers import StaticCache

from attnsieve.hf import apply, profile
from tests.hf_tiny import close, logits, mixed_plan, oracle, tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("backend", ["reference", "portable", "auto"])
def test_pieces_equal_the_whole(backend):
    model = tiny("llama", head_dim=16)
    plan, ids = mixed_plan(model), tokens(2, 40)
    expected = oracle(model, plan, ids)
    model.cuda()
    cache = StaticCache(config=model.config, max_cache_len=48)
    with apply(model, plan, backend=backend, strict=True):
        pieces = ids.cuda().split([17, 9, 1, 13], dim=1)
        got = torch.cat([logits(model, piece, past_key_values=cache) for piece in pieces], dim=1)
    close(got.cpu(), expected, TOLERANCE)


def test_compiled_static_generation_of_a_padded_batch():
    model = tiny("llama", head_dim=16).cuda()
    ids = tokens(2, 20).cuda()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with apply(model, mixed_plan(model), backend="reference", strict=True):
        expected = model.generate(ids, **options)
        got = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, expected)


def test_profile_equals_the_cpu():
    model, texts = tiny("qwen3"), [tokens(30), tokens(21, seed=1)]
    expected = profile(model, texts, pcl=16, lengths=(24,), progress=False)
    seen = profile(model.cuda(), texts, pcl=16, lengths=(24,), progress=False)
    close(seen.maps, expected.maps, TOLERANCE)
    close(seen.long[0].offset_mass, expected.long[0].offset_mass, TOLERANCE)
