"""The one tolerance of the tests: an error budget derived from dense attention in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnsieve.backends import reference
from attnsieve.backends.call import Call

# Between q and k and an LSE, where kernels count in powers of two: q k, scale * log2 e, their product, bias * log2 e, the sum of
# both, log2 of the weights' sum, the peak added to it, ln 2, the product with it.
_LSE_ROUNDINGS = 9


@dataclass(frozen=True)
class Budget:
    """What the output and the LSE may differ from the float64 oracle, relative to its norm."""

    out: float
    lse: float


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`; NaN and inf count as infinite error."""
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    scale = exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float(((value.double() - exact.double()).norm() / scale).detach())


def in_float64(call: Call) -> Call:
    """The same call with exact copies of its inputs in float64."""
    return _cast(call, torch.float64)


def error_budget(call: Call) -> Budget:
    """What a backend may differ from the float64 oracle: twice the error of dense attention in the same dtype on the same
    inputs, whose probabilities are rounded to that dtype before they meet V, plus one rounding of the output. For float64
    inputs, where no finer oracle exists, that error is measured in float32, scaled by the ratio of the roundings, and allowed to
    both sides.

    The LSE may be as wrong as the output, whose weights it sums. With few keys those hardly err, with one they are 1, and the
    scores still do: so it may always have twice the error of dense attention's LSE plus its own roundings, in float32 at least.
    """
    measured = torch.float32 if call.q.dtype == torch.float64 else call.q.dtype
    exact = _dense(in_float64(call), torch.float64)
    rounded = _dense(_cast(call, measured), measured)
    eps = torch.finfo(call.q.dtype).eps
    ratio = eps / torch.finfo(measured).eps
    sides = 2 if call.q.dtype == torch.float64 else 1
    out_error, lse_error = (2 * ratio * relative_error(*pair) for pair in zip(rounded, exact, strict=True))
    own_roundings = _LSE_ROUNDINGS * min(eps, torch.finfo(torch.float32).eps) / 2
    out = sides * (out_error + eps)
    return Budget(out, max(out, sides * (lse_error + own_roundings)))


def _cast(call: Call, dtype: torch.dtype) -> Call:
    bias = None if call.key_bias is None else call.key_bias.to(dtype)
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), key_bias=bias)


def _dense(call: Call, probabilities: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and LSE of causal attention of the call's sequences, softmax in float32 at least, probabilities rounded to a dtype."""
    work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    outs, lses = [], []
    for b, q0, nq, k0, nk in call.spans.rows():
        k, v = (tensor[b, :, k0 : k0 + nk].repeat_interleave(call.group, dim=0) for tensor in (call.k, call.v))
        scores = call.q[b, :, q0 : q0 + nq].to(work) @ k.to(work).mT * call.scale
        causal = torch.ones(nq, nk, dtype=torch.bool, device=k.device).tril(nk - nq)
        scores = scores.masked_fill(~causal, -torch.inf)
        weights = scores.softmax(-1).to(probabilities)
        outs.append((weights.to(work) @ v.to(work)).to(probabilities).flatten())
        lses.append(scores.logsumexp(-1).flatten())
    return torch.cat(outs), torch.cat(lses)


def assert_within_budget(out: Tensor, lse: Tensor, call: Call) -> None:
    """Raise AssertionError unless `out` and `lse` match the float64 oracle of `call` within the error budget."""
    exact_out, exact_lse = reference.run(in_float64(call))
    budget = error_budget(call)
    error = relative_error(out, exact_out)
    assert error <= budget.out, f"output error {error:.3e} uses {error / budget.out:.0%} of the budget {budget.out:.3e}"
    empty = exact_lse == -torch.inf
    assert torch.equal(lse.isneginf(), empty), "rows that keep nothing must have LSE -inf, and no others"
    assert not out.masked_select(empty[..., None]).any(), "rows that keep nothing must output 0"
    lse_error = relative_error(lse[~empty], exact_lse[~empty])
    assert lse_error <= budget.lse, (
        f"LSE error {lse_error:.3e} uses {lse_error / budget.lse:.0%} of the budget {budget.lse:.3e}"
    )
