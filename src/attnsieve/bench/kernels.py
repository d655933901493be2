"""Measure attention calls: prefill, decode, forward and backward, what building their lists takes, and choosing masks.

Every function checks the kernel against the oracle first and raises `WrongResult` instead of returning a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnsieve.attention import attend, choose_backend
from attnsieve.backends import cost, cost_work
from attnsieve.backends.call import Call
from attnsieve.bench import dense, flex
from attnsieve.bench.case import DENSE, Case
from attnsieve.bench.check import Verdict, check_gradients, check_rows
from attnsieve.bench.masks import is_selected, selection
from attnsieve.bench.rows import Dense, Row
from attnsieve.bench.timing import Times, measure, measure_with_peak, peak_of, recorded
from attnsieve.errors import require
from attnsieve.layout import Layout

# Gradients are checked on a call this long: their oracle takes memory in its square.
_CHECKED_LENGTH = 2048
# Dense calls are long: they are given this many times the budget.
_DENSE_SHARE = 2.5
# Layers of a decode step, as many as have room for their keys and values in so many bytes.
_LAYERS = 8
_LAYERS_BYTES = 2**33
FLEX = {"flex-triton": "TRITON", "flex-flash": "FLASH"}


def prefill(case: Case, backend: str, baseline: Dense | None = None, budget_ms: float = 200.0) -> Iterator[Row]:
    """Forward pass over a whole sequence, or a chunk of it: with everything chosen and built before, and with both included."""
    call = case.call()
    out, lse = run_backend(call, backend)
    verdict = check_rows(call, out, lse)
    del out, lse
    made = _Made("prefill", case, backend, call, baseline, verdict)
    times, peak = measure_with_peak(lambda: run_backend(call, backend), case.device, budget_ms)
    yield made.row(times, peak)
    if backend not in FLEX:
        built = measure_with_peak(lambda: run_backend(case.fresh(call), backend), case.device, budget_ms / 2)
        yield made.row(*built, building=True)


def decode(case: Case, backend: str, baseline: Dense | None = None, budget_ms: float = 200.0) -> Iterator[Row]:
    """One query against n keys, which no cache holds: times and memory of one layer. On a GPU several are replayed from a CUDA graph,
    each with keys and lists of its own, as a model decodes: launching a graph takes 5 us, a layer can take 12."""
    case = replace(case, q_len=1)
    call = case.call()
    verdict = check_rows(call, *run_backend(call, backend), rows=1)
    times, peak = _step(call, lambda layer: run_backend(layer, backend), case.device, budget_ms)
    yield _Made("decode", case, backend, call, baseline, verdict).row(times, peak)


def _step(call: Call, run: Callable[[Call], object], device: str, budget_ms: float) -> tuple[Times, int | None]:
    peak = peak_of(lambda: run(call), device)
    count = _layers(call.k.nbytes + call.v.nbytes) if call.q.is_cuda else 1
    layers = [call, *_others(call, count - 1)]
    times = measure(recorded(lambda: [run(layer) for layer in layers], device), budget_ms, device=device)
    return times.each(len(layers)), peak


def _layers(nbytes: int) -> int:
    """How many layers with keys and values of so many bytes have room."""
    return max(1, min(_LAYERS, _LAYERS_BYTES // nbytes))


def _others(call: Call, count: int) -> list[Call]:
    """Calls like it with keys and values of their own, and nothing remembered of their layouts."""
    return [replace(call, k=call.k.clone(), v=call.v.clone(), layout=replace(call.layout)) for _ in range(count)]


def forward_backward(case: Case, backend: str, baseline: Dense | None = None, budget_ms: float = 200.0) -> Iterator[Row]:
    """Forward and gradients of q, k, v and the bias: with everything built before, and with building and selection."""
    short = _with_gradients(replace(case, n=min(case.n, _CHECKED_LENGTH)).call())
    d_out = torch.randn_like(short.q)
    verdicts = check_gradients(short, d_out, _gradients(short, backend, d_out))
    worst = max(verdicts.values(), key=lambda verdict: verdict.error / verdict.budget)
    call = _with_gradients(case.call())
    d_out = torch.randn_like(call.q)
    made = _Made("forward_backward", case, backend, call, baseline, worst)
    yield made.row(*measure_with_peak(lambda: _gradients(call, backend, d_out), case.device, budget_ms))

    def rebuilt() -> object:
        return _gradients(case.fresh(call), backend, d_out)

    yield made.row(*measure_with_peak(rebuilt, case.device, budget_ms / 2), building=True)


def dense_rows(op: str, case: Case, names: list[str], budget_ms: float = 200.0) -> list[Row]:
    """Dense attention of a case's shape by each kernel in `names`."""
    case = replace(case.dense(), q_len=1 if op == "decode" else case.q_len)
    call = case.call()
    return [_dense_row(op, case, call, name, _DENSE_SHARE * budget_ms) for name in names]


def fastest(rows: list[Row]) -> Dense | None:
    """The fastest of dense rows."""
    times = {row.backend: row.ms_p50 for row in rows if row.ms_p50 is not None}
    best = min(times, key=lambda name: times[name], default=None)
    return None if best is None else Dense(f"{best}, dense", times[best])


def layout(case: Case, backend: str, budget_ms: float = 200.0) -> Iterator[Row]:
    """Building what a backend derives from a layout for prefill, nothing remembered; the layout itself is given, or chosen before."""
    call = case.call()
    build = _builder(call, backend)
    times, peak = measure_with_peak(lambda: build(replace(call.layout)), case.device, budget_ms)
    yield _Made("layout", case, backend, call, None, None).row(times, peak)


def select(case: Case, budget_ms: float = 200.0) -> Iterator[Row]:
    """Choosing the keys from the input: DMA's selection given its scores, replayed in a CUDA graph since the device takes less
    time for its forty launches than the host; or a dynamic pattern. Raises UserError for masks that choose nothing."""
    if is_selected(case.mask):
        call = case.call()
        run = recorded(selection(case.mask, call.layout), case.device)
        times, peak = measure_with_peak(run, case.device, budget_ms)
        yield _Made("select", case, "attnsieve", call, None, None).row(times, peak, building=True)
        return
    require(case.choosers is not None, f"{case.mask} chooses nothing from the input: use op layout")
    call = case.unchosen()
    times, peak = measure_with_peak(lambda: case.fresh(call), case.device, budget_ms)
    # Chosen last, since lists of single keys are too large to be held beside those of the runs that are timed.
    yield _Made("select", case, "attnsieve", case.fresh(call), None, None).row(times, peak, building=True)


def _dense_row(op: str, case: Case, call: Call, name: str, budget_ms: float) -> Row:
    kernel = dense.attention(name)
    verdict = check_rows(call, kernel(call), None, rows=1 if op == "decode" else 12)
    if op == "decode":
        times, peak = _step(call, kernel, case.device, budget_ms)
    else:
        times, peak = measure_with_peak(_dense_run(op, call, kernel), case.device, budget_ms)
    return _Made(op, case, name, call, None, verdict).row(times, peak)


def _dense_run(op: str, call: Call, kernel: Callable[[Call], Tensor]) -> Callable[[], object]:
    if op != "forward_backward":
        return lambda: kernel(call)
    leaves = _with_gradients(call)
    d_out = torch.randn_like(leaves.q)
    return lambda: torch.autograd.grad(kernel(leaves), [leaves.q, leaves.k, leaves.v], d_out)


def run_backend(call: Call, backend: str) -> tuple[Tensor, Tensor | None]:
    """Output and LSE of a backend or of FlexAttention, which gives none here."""
    if backend in FLEX:
        return flex.attend(call, FLEX[backend]), None
    rest = {"spans": call.spans, "scale": call.scale, "key_bias": call.key_bias, "backend": backend}
    result = attend(call.q, call.k, call.v, call.layout, return_lse=True, **rest)  # type: ignore[arg-type]
    assert isinstance(result, tuple)
    return result


def _builder(call: Call, backend: str) -> Callable[[Layout], object]:
    """What prefill of `call` derives from its layout."""
    require(backend in ("triton", "fa4"), f"op layout measures the backends triton and fa4, got {backend!r}")
    if backend == "fa4":
        from attnsieve.backends.fa4.kernel import built

        return lambda fresh: built(replace(call, layout=fresh))
    from attnsieve.backends.triton.geometry import Geometry
    from attnsieve.backends.triton.schedule import schedule
    from attnsieve.backends.triton.tuning import forward_tiles

    tiles = forward_tiles(call)
    positions = Geometry(call, tiles).positions
    return lambda fresh: schedule(fresh, positions, tiles.keys)


def _with_gradients(call: Call) -> Call:
    q, k, v, bias = (None if x is None else x.detach().requires_grad_() for x in (call.q, call.k, call.v, call.key_bias))
    assert q is not None
    assert k is not None
    assert v is not None
    return replace(call, q=q, k=k, v=v, key_bias=bias)


def _gradients(call: Call, backend: str, d_out: Tensor) -> tuple[Tensor | None, ...]:
    leaves = [x for x in (call.q, call.k, call.v, call.key_bias) if x is not None]
    grads = torch.autograd.grad(run_backend(call, backend)[0], leaves, d_out)
    return (*grads, *[None] * (4 - len(grads)))


@dataclass(frozen=True)
class _Made:
    """All of a row but its times."""

    op: str
    case: Case
    backend: str
    call: Call
    baseline: Dense | None
    verdict: Verdict | None

    def row(self, times: Times, peak: int | None, building: bool = False) -> Row:
        backend = f"auto: {choose_backend(self.call)}" if self.backend == "auto" else self.backend
        kept = density(self.call.layout, self.case.n, self.call.q.shape[2])
        return Row.of(
            self.op,
            backend,
            self.case,
            times,
            peak,
            density=kept,
            building=building,
            baseline=self.baseline,
            verdict=self.verdict,
            work=self._work(building),
        )

    def _work(self, building: bool) -> dict[str, float] | None:
        """What costs are fitted to: forward passes alone."""
        if building or self.op not in ("prefill", "decode"):
            return None
        backend = choose_backend(self.call) if self.backend == "auto" else self.backend
        if backend in dense.KERNELS and self.case.mask == DENSE:
            backend = cost.DENSE
        return cost_work.work(self.call, backend)


def density(layout: Layout, n: int, q_len: int) -> float:
    """Mean share of the causal pairs of the last q_len of n positions that is kept; exact, or from 64 rows with offsets."""
    if layout.offset is None and layout.blocks is None and q_len == n:
        return float(layout.density(n).mean())
    rows = torch.arange(n - q_len, n) if q_len <= 64 else torch.linspace(n - q_len, n - 1, 64).long()
    rows, keys = rows.to(layout.device), torch.arange(n, device=layout.device)
    kept = sum(int(layout.keep(0, h, rows[:, None], keys[None, :]).sum()) for h in range(layout.heads))
    return kept / layout.heads / float((rows + 1).sum())
