"""The one tolerance of the tests: an error budget derived from dense attention in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnsieve.backends import reference
from attnsieve.backends.call import Call


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`; NaN and inf count as infinite error."""
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    scale = exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((value.double() - exact.double()).norm() / scale)


def in_float64(call: Call) -> Call:
    """The same call with exact copies of its inputs in float64."""
    return _cast(call, torch.float64)


def error_budget(call: Call) -> float:
    """What a backend may differ from the float64 oracle: twice the error of dense attention in the same dtype on the same
    inputs, whose probabilities are rounded to that dtype before they meet V, plus one rounding of the output. For float64
    inputs, where no finer oracle exists, that error is measured in float32, scaled by the ratio of the roundings, and allowed to
    both sides."""
    measured = torch.float32 if call.q.dtype == torch.float64 else call.q.dtype
    exact = _dense(in_float64(call), torch.float64)
    rounded = _dense(_cast(call, measured), measured)
    ratio = torch.finfo(call.q.dtype).eps / torch.finfo(measured).eps
    sides = 2 if call.q.dtype == torch.float64 else 1
    return sides * (2 * relative_error(rounded, exact) * ratio + torch.finfo(call.q.dtype).eps)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    bias = None if call.key_bias is None else call.key_bias.to(dtype)
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), key_bias=bias)


def _dense(call: Call, probabilities: torch.dtype) -> Tensor:
    """Causal attention of the call's sequences, softmax in float32 at least, probabilities rounded to a dtype."""
    work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    outs = []
    for b, q0, nq, k0, nk in call.spans.rows():
        k, v = (tensor[b, :, k0 : k0 + nk].repeat_interleave(call.group, dim=0) for tensor in (call.k, call.v))
        scores = call.q[b, :, q0 : q0 + nq].to(work) @ k.to(work).mT * call.scale
        causal = torch.ones(nq, nk, dtype=torch.bool, device=k.device).tril(nk - nq)
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1).to(probabilities)
        outs.append((weights.to(work) @ v.to(work)).to(probabilities).flatten())
    return torch.cat(outs)


def assert_within_budget(out: Tensor, lse: Tensor, call: Call) -> None:
    """Raise AssertionError unless `out` and `lse` match the float64 oracle of `call` within the error budget."""
    exact_out, exact_lse = reference.run(in_float64(call))
    budget = error_budget(call)
    error = relative_error(out, exact_out)
    assert error <= budget, f"output error {error:.3e} uses {error / budget:.0%} of the budget {budget:.3e}"
    empty = exact_lse == -torch.inf
    assert torch.equal(lse.isneginf(), empty), "rows that keep nothing must have LSE -inf, and no others"
    assert not out.masked_select(empty[..., None]).any(), "rows that keep nothing must output 0"
    lse_error = relative_error(lse[~empty], exact_lse[~empty])
    assert lse_error <= budget, f"LSE error {lse_error:.3e} uses {lse_error / budget:.0%} of the budget {budget:.3e}"
