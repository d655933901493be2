"""Measure attention calls: prefill, decode, forward and backward, and what building their schedules takes.

Every function checks the kernel against the oracle first and raises `WrongResult` instead of returning a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnsieve.attention import attend
from attnsieve.backends.call import Call
from attnsieve.bench.check import Verdict, check_gradients, check_rows
from attnsieve.bench.masks import mask
from attnsieve.bench.rows import Row
from attnsieve.bench.timing import Times, measure
from attnsieve.layout import Layout
from attnsieve.spans import Spans

_BASELINES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Gradients are checked on a call this long: their oracle takes memory in its square.
_CHECKED_LENGTH = 2048


@dataclass(frozen=True)
class Case:
    """One shape. `shared`: the heads of a KV group share their mask. `bias`: with a key bias, as in DMA."""

    mask: str
    n: int
    q_len: int | None = None
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    shared: bool = False
    bias: bool = False

    def call(self) -> Call:
        """Random inputs and the mask, on the GPU."""
        q_len = self.n if self.q_len is None else self.q_len
        torch.manual_seed(0)
        make = lambda heads, length: torch.randn(1, heads, length, self.head_dim, device="cuda", dtype=self.dtype)  # noqa: E731
        q, k, v = make(self.q_heads, q_len), make(self.kv_heads, self.n), make(self.kv_heads, self.n)
        layout = mask(self.mask, self.n, self.kv_heads if self.shared else self.q_heads, "cuda")
        bias = torch.randn(1, self.kv_heads, self.n, device="cuda") if self.bias else None
        return Call(q, k, v, layout, Spans.full(1, q_len, self.n, "cuda"), self.head_dim**-0.5, bias)


def prefill(case: Case, backend: str, baseline: str | None = "cudnn") -> Row:
    """Forward pass over a whole sequence, or a chunk of it, with a cached schedule."""
    call = case.call()
    out, lse = _attend(call, backend)
    verdict = check_rows(call, out, lse)
    del out, lse
    times, peak = _measured(lambda: _attend(call, backend))
    return _row("prefill", case, backend, call, times, peak, _dense(call, baseline), verdict)


def decode(case: Case, backend: str, baseline: str | None = "cudnn") -> Row:
    """One query against n keys, replayed from a CUDA graph, caches cold."""
    call = replace(case, q_len=1).call()
    out, lse = _attend(call, backend)
    verdict = check_rows(call, out, lse, rows=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _attend(call, backend)
    times, peak = _measured(graph.replay)
    return _row("decode", replace(case, q_len=1), backend, call, times, peak, _dense(call, baseline), verdict)


def forward_backward(case: Case, backend: str, baseline: str | None = "cudnn") -> Row:
    """Forward and gradients of q, k, v and the bias."""
    short = _with_gradients(replace(case, n=min(case.n, _CHECKED_LENGTH)).call())
    d_out = torch.randn_like(short.q)
    verdicts = check_gradients(short, d_out, _gradients(short, backend, d_out))
    worst = max(verdicts.values(), key=lambda verdict: verdict.error / verdict.budget)
    call = _with_gradients(case.call())
    d_out = torch.randn_like(call.q)
    times, peak = _measured(lambda: _gradients(call, backend, d_out))
    dense = None if baseline is None else (baseline, measure(lambda: _dense_gradients(call, baseline, d_out), 500).p50)
    return _row("forward_backward", case, backend, call, times, peak, dense, worst)


def schedule(case: Case, backend: str, build: Callable[[Layout], object]) -> Row:
    """Building what a backend derives from a layout, nothing cached."""
    call = case.call()
    layout = call.layout
    times, peak = _measured(lambda: build(replace(layout, schedules={})))
    return _row("layout", case, backend, call, times, peak, None, None)


def _attend(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    result = attend(
        call.q,
        call.k,
        call.v,
        call.layout,
        spans=call.spans,
        scale=call.scale,
        key_bias=call.key_bias,
        backend=backend,
        return_lse=True,
    )
    assert isinstance(result, tuple)
    return result


def _with_gradients(call: Call) -> Call:
    leaves = (None if x is None else x.requires_grad_() for x in (call.q, call.k, call.v, call.key_bias))
    q, k, v, bias = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    return replace(call, q=q, k=k, v=v, key_bias=bias)


def _gradients(call: Call, backend: str, d_out: Tensor) -> tuple[Tensor | None, ...]:
    leaves = [x for x in (call.q, call.k, call.v, call.key_bias) if x is not None]
    grads = torch.autograd.grad(_attend(call, backend)[0], leaves, d_out)
    return (*grads, *[None] * (4 - len(grads)))


def _dense_call(call: Call, baseline: str) -> Tensor:
    """Dense causal attention by SDPA; one query attends to everything."""
    with sdpa_kernel(_BASELINES[baseline]):
        causal = call.q.shape[2] > 1
        return scaled_dot_product_attention(call.q, call.k, call.v, is_causal=causal, scale=call.scale, enable_gqa=True)


def _dense_gradients(call: Call, baseline: str, d_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_dense_call(call, baseline), [call.q, call.k, call.v], d_out)


def _dense(call: Call, baseline: str | None) -> tuple[str, float] | None:
    if baseline is None:
        return None
    return baseline, measure(lambda: _dense_call(call, baseline), 500).p50


def _measured(run: Callable[[], object]) -> tuple[Times, int]:
    """Times, and the memory in use at the peak of one run."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated()
    return measure(run), peak


def _row(
    op: str,
    case: Case,
    backend: str,
    call: Call,
    times: Times,
    peak: int,
    dense: tuple[str, float] | None,
    verdict: Verdict | None,
) -> Row:
    shared = "+" if case.shared else ""
    return Row(
        op=op,
        backend=backend,
        mask=case.mask + shared,
        batch=1,
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        q_len=call.q.shape[2],
        kv_len=case.n,
        dtype=str(case.dtype).removeprefix("torch."),
        density=density(call.layout, case.n, call.q.shape[2]),
        ms_p20=times.p20,
        ms_p50=times.p50,
        ms_p80=times.p80,
        includes_mask_building=False,
        baseline=None if dense is None else f"SDPA {dense[0]}, dense",
        baseline_ms_p50=None if dense is None else dense[1],
        error=None if verdict is None else verdict.error,
        error_budget=None if verdict is None else verdict.budget,
        peak_bytes=peak,
    )


def density(layout: Layout, n: int, q_len: int) -> float:
    """Mean share of the causal pairs of the last q_len of n positions that is kept; exact, or from 64 rows with offsets."""
    if layout.offset is None and layout.blocks is None and q_len == n:
        return float(layout.density(n).mean())
    rows = torch.arange(n - q_len, n) if q_len <= 64 else torch.linspace(n - q_len, n - 1, 64).long()
    rows, keys = rows.to(layout.device), torch.arange(n, device=layout.device)
    kept = sum(int(layout.keep(0, h, rows[:, None], keys[None, :]).sum()) for h in range(layout.heads))
    return kept / layout.heads / float((rows + 1).sum())
