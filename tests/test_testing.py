"""The error budget: room for what must be rounded, no more."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, compile_layout
from attnsieve.backends import portable
from attnsieve.backends.call import Call
from attnsieve.patterns import dense
from attnsieve.testing import assert_within_budget, error_budget


def one_key(seed: int, dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 8, 1, 64, generator=generator).to(dtype) for _ in range(3))
    return Call(q, k, v, compile_layout([dense()] * 8, 1), Spans.full(1, 1, 1), 64**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lse_of_one_key_has_room_for_its_roundings(dtype):
    """With one key the output has no error, the score has: kernels add the products in another order, and count in base 2."""
    for seed in range(50):
        call = one_key(seed, dtype)
        scale = torch.tensor(call.scale * 1.4426950408889634, dtype=dtype)
        in_base_2 = ((call.q * call.k).flip(-1).sum(-1) * scale) * torch.tensor(2.0, dtype=dtype).log()
        assert_within_budget(call.v, in_base_2, call)
        assert_within_budget(*portable.run(call), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_wrong_lse_of_one_key_is_beyond_the_budget(dtype):
    call = one_key(0, dtype)
    out, lse = portable.run(call)
    assert error_budget(call).lse < 32 * torch.finfo(dtype).eps
    for wrong in (lse * (1 + 32 * torch.finfo(dtype).eps), lse + 0.1):
        with pytest.raises(AssertionError, match="LSE error"):
            assert_within_budget(out, wrong, call)


def test_what_dense_attention_errs_is_doubled():
    call = one_key(0, torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    assert error_budget(call).out == pytest.approx(eps)
    keys = replace(call, k=call.k.repeat(1, 1, 9, 1), v=torch.randn(1, 8, 9, 64).bfloat16(), spans=Spans.full(1, 1, 9))
    assert eps < error_budget(keys).out < 4 * eps
