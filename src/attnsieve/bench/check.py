"""The gate: a kernel's result on sampled rows against the float64 oracle, within the error budget of the tests."""

from __future__ import annotations

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


def check_rows(call: Call, out: Tensor, lse: Tensor, rows: int = 12) -> Verdict:
    """Compare about `rows` query rows of every head; raises WrongResult beyond the budget or where LSE or zeros disagree.

    For a call whose batch row 0 is one sequence with its queries last. Memory is O(rows x n).
    """
    sample = _sample(call, rows)
    slots = sample.spans.k_len - 1 - (call.k.shape[2] - call.q.shape[2])
    exact_out, exact_lse = reference.run(in_float64(sample))
    got_out, got_lse = out[:1, :, slots], lse[:1, :, slots]
    budget = error_budget(sample)
    errors = [relative_error(got_out, exact_out)]
    empty = exact_lse == -torch.inf
    if not torch.equal(got_lse.isneginf(), empty):
        raise WrongResult("LSE is -inf in other rows than the oracle's")
    errors.append(relative_error(got_lse[~empty], exact_lse[~empty]))
    if max(errors) > budget:
        raise WrongResult(f"errors of output and LSE {errors[0]:.2e}, {errors[1]:.2e}; budget {budget:.2e}")
    return Verdict(errors[0], budget)


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
