"""The gate: a kernel's result on sampled rows against the float64 oracle, within the error budget of the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnsieve.backends import reference
from attnsieve.backends.call import Call
from attnsieve.spans import Spans
from attnsieve.testing import error_budget, in_float64, relative_error


class WrongResult(AssertionError):
    """A kernel failed its oracle: its time means nothing."""


@dataclass(frozen=True)
class Verdict:
    """Relative error of the output and what it may be."""

    error: float
    budget: float


def check_rows(call: Call, out: Tensor, lse: Tensor | None, rows: int = 12) -> Verdict:
    """Compare about `rows` query rows of every head; raises WrongResult beyond the budget or where LSE or zeros disagree.

    `lse` is None for kernels that give none. For a call whose batch row 0 is one sequence with its queries last. Memory is
    O(rows x n).
    """
    sample = _sample(call, rows)
    slots = sample.spans.k_len - 1 - (call.k.shape[2] - call.q.shape[2])
    exact_out, exact_lse = reference.run(in_float64(sample))
    got_out = out[:1, :, slots]
    budget = error_budget(sample)
    verdict = Verdict(relative_error(got_out, exact_out), budget.out)
    if verdict.error > verdict.budget:
        raise WrongResult(f"error of the output {verdict.error:.2e}; budget {verdict.budget:.2e}")
    if lse is None:
        return verdict
    got_lse = lse[:1, :, slots]
    empty = exact_lse == -torch.inf
    if not torch.equal(got_lse.isneginf(), empty):
        raise WrongResult("LSE is -inf in other rows than the oracle's")
    lse_error = relative_error(got_lse[~empty], exact_lse[~empty])
    if lse_error > budget.lse:
        raise WrongResult(f"error of the LSE {lse_error:.2e}; budget {budget.lse:.2e}")
    return verdict


def _sample(call: Call, rows: int) -> Call:
    """The same attention for a few queries of batch row 0, each a sequence of its own."""
    n, q_len = call.k.shape[2], call.q.shape[2]
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.randint(0, q_len, (max(1, rows - 4),), generator=generator).tolist()
    slots = sorted({0, q_len // 2, q_len - 1, min(q_len - 1, 129), *chosen})
    spans = Spans.of([(0, s, 1, 0, n - q_len + slot + 1) for s, slot in enumerate(slots)], call.q.device)
    bias = None if call.key_bias is None else call.key_bias[:1].detach()
    q, k, v = call.q[:1, :, slots].detach(), call.k[:1].detach(), call.v[:1].detach()
    return replace(call, q=q, k=k, v=v, spans=spans, key_bias=bias)


def check_gradients(call: Call, d_out: Tensor, grads: tuple[Tensor | None, ...]) -> dict[str, Verdict]:
    """Compare gradients of q, k, v and key_bias with the oracle's; O(n^2) memory, for short calls.

    The budget of each is twice the error of dense causal attention's gradient in the same dtype, plus one rounding.
    """
    exact = _gradients(in_float64(call), d_out, lambda leaf: reference.run(leaf)[0])
    dense_exact = _gradients(in_float64(call), d_out, _dense)
    dense = _gradients(call, d_out, _dense)
    verdicts = {}
    for name, got, want, rounded, ideal in zip(("q", "k", "v", "bias"), grads, exact, dense, dense_exact, strict=True):
        if got is None or want is None or rounded is None or ideal is None:
            continue
        verdict = Verdict(relative_error(got, want), 2 * relative_error(rounded, ideal) + torch.finfo(call.q.dtype).eps)
        if verdict.error > verdict.budget:
            raise WrongResult(f"error of d{name} {verdict.error:.2e}; budget {verdict.budget:.2e}")
        verdicts[name] = verdict
    return verdicts


def _gradients(call: Call, d_out: Tensor, run: Callable[[Call], Tensor]) -> list[Tensor | None]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in (call.q, call.k, call.v, call.key_bias)]
    q, k, v, bias = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    out = run(replace(call, q=q, k=k, v=v, key_bias=bias))
    kept = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(out, kept, d_out.to(out.dtype)))
    return [None if leaf is None else next(grads) for leaf in leaves]


def _dense(call: Call) -> Tensor:
    """Causal attention of one whole sequence a batch row with its bias, softmax in float32 at least, products in the dtype."""
    work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    k, v = (tensor.repeat_interleave(call.group, dim=1) for tensor in (call.k, call.v))
    scores = (call.q @ k.mT).to(work) * call.scale
    if call.key_bias is not None:
        scores = scores + call.key_bias.to(work).repeat_interleave(call.group, dim=1)[:, :, None]
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(scores.shape[-1] - scores.shape[-2])
    return scores.masked_fill(~causal, -torch.inf).softmax(-1).to(call.q.dtype) @ v
