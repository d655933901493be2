"""attend: the one attention operation, and the choice of who computes it."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from attnsieve.backends import cost, graph, kinds
from attnsieve.backends.call import DECODE_QUERIES, Call, problem_of_scale
from attnsieve.backends.kinds import Known
from attnsieve.backends.whole import whole_spans
from attnsieve.device import on_device_of
from attnsieve.errors import UserError, require
from attnsieve.layout import Layout
from attnsieve.spans import Spans

BACKENDS = {
    "reference": "attnsieve.backends.reference",
    "portable": "attnsieve.backends.portable",
    "triton": "attnsieve.backends.triton",
    "fa4": "attnsieve.backends.fa4",
    "dense": "attnsieve.backends.dense",
}
# Who "auto" compares on each kind of device: the first that can serve is taken where nothing was measured, portable if none can.
_ON_GPU: tuple[str, ...] = ("triton", "fa4", "dense")
_ON_CPU: tuple[str, ...] = ("portable", "dense")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    spans: Spans | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax over the kept keys of (q k^T * scale + key_bias), times v; exact per (query, key) pair of `layout`.

    q [B, Hq, Tq, D]; k [B, Hkv, Tk, D]; v [B, Hkv, Tk, Dv], of one dtype: float16, bfloat16, float32 or float64; key_bias
    [B, Hkv, Tk], floating, or None. Query head h reads KV head h // (Hq // Hkv). The layout has Hq heads, or Hkv when the heads of a
    group share a mask. `spans` says where the sequences are; by default every batch row is one, its queries the last Tq of Tk
    positions. `scale`, finite in float32, defaults to 1 / sqrt(D). Returns out [B, Hq, Tq, Dv] in q's dtype and, with `return_lse`, the
    LSE [B, Hq, Tq] in float32 (float64 for float64 inputs; -inf for rows that keep no key, whose output is 0). Differentiable in q, k,
    v and key_bias; gradients repeat bit for bit under torch.use_deterministic_algorithms(True). One operation under torch.compile.

    NaN and infinities in k or v reach the rows that keep their key and no others, except by the backends "fa4" and "dense", and
    in gradients. A key_bias of -inf removes its key.

    `backend` is "auto" (see `choose_backend`) or a name in `BACKENDS`; a named backend that cannot serve raises UserError with the
    reason. Every backend computes exactly the kept pairs: "dense" serves layouts that keep all of them, no others.

    Raises UserError for what does not fit together, before anything is computed.
    """
    problem = _problem_of_types((q, k, v) if key_bias is None else (q, k, v, key_bias), layout, spans)
    if problem is not None:
        raise UserError(problem)
    if torch.compiler.is_compiling():
        spans = Spans.full(q.shape[0], q.shape[2], k.shape[2], q.device) if spans is None else spans
        out, lse = _in_graph(backend, _call(q, k, v, layout, spans, scale, key_bias))
    else:
        _, out, lse = compute(q, k, v, layout, spans=spans, scale=scale, key_bias=key_bias, backend=backend)
    return (out, lse) if return_lse else out


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    spans: Spans | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[str, Tensor, Tensor]:
    """`attend`, not recorded by torch.compile: the name of the backend that computed, output and LSE."""
    kind = kinds.kind_of(q, k, v, layout, spans, scale, backend) if key_bias is None else None
    spans = whole_spans(q, k) if spans is None else spans
    known = None if kind is None else kinds.known(layout, kind)
    if known is None or known.again is None:
        call = _call(q, k, v, layout, spans, scale, key_bias)
        known = _decide(backend, call, kind) if known is None else known
        if known.again is None:
            return known.backend, *_run(known.backend, call)
    with on_device_of(q):
        return known.backend, *known.again(q, k, v, spans)


def _decide(backend: str, call: Call, kind: Hashable | None) -> Known:
    """Who computes a call, which is checked; remembered for others of its kind."""
    name = _choose(backend, call)
    make_again = getattr(_module(name), "again", None)
    if kind is None or (make_again is None and call.q.shape[2] <= DECODE_QUERIES):
        return Known(name, None)
    decided = Known(name, None if make_again is None else make_again(call))
    kinds.remember(call.layout, kind, decided)
    return decided


def _call(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spans: Spans, scale: float | None, key_bias: Tensor | None) -> Call:
    # Widths of 0 are refused later.
    return Call(q, k, v, layout, spans, max(q.shape[-1], 1) ** -0.5 if scale is None else scale, key_bias)


def _choose(backend: str, call: Call) -> str:
    """The name of the backend that computes a call, which is checked."""
    _check(call)
    return choose_backend(call) if backend == "auto" else _named(backend, call)


def _run(name: str, call: Call) -> tuple[Tensor, Tensor]:
    with on_device_of(call.q):
        out, lse = _module(name).run(call)
    return out, lse


_in_graph = graph.operation(_choose, _run)


def choose_backend(call: Call) -> str:
    """The backend that "auto" takes: of those that can serve this call the one that `cost.predict` finds the fastest.

    On a device that nothing was measured on, the first that can serve of Triton, FA4, dense and portable on a GPU; portable
    on a CPU.
    """
    candidates = _ON_GPU if call.q.is_cuda else _ON_CPU
    serving = [name for name in candidates if _module(name).why_not(call) is None]
    return cost.cheapest(call, serving) if serving else "portable"


def dense_is_faster(call: Call, backend: str) -> bool:
    """Whether dense attention of this call's shape, which keeps more than the layout says, is predicted to take less time
    than `backend`. False where either was not measured."""
    predicted = cost.predict(call, (backend, cost.DENSE))
    return len(predicted) == 2 and predicted[cost.DENSE] < predicted[backend]


def _named(backend: str, call: Call) -> str:
    require(backend in BACKENDS, f"unknown backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    reason = _module(backend).why_not(call)
    if reason is not None:
        raise UserError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend


def _module(backend: str) -> ModuleType:
    return import_module(BACKENDS[backend])


def _check(call: Call) -> None:
    """Raise UserError for shapes, dtypes or devices that do not fit together. Never reads a GPU."""
    problem = problem_of_scale(call.scale) or _problem_of_shapes(call) or _problem_of_parts(call)
    if problem is not None:
        raise UserError(problem)
    q, k = call.q, call.k
    if not q.is_cuda:
        call.spans.check(q.shape[0], q.shape[2], k.shape[2], call.layout.length)
    elif not torch.compiler.is_compiling():
        call.spans.check_vectors()
        require(k.shape[2] <= call.layout.length, f"K has {k.shape[2]} slots, the layout is compiled for {call.layout.length}")


def _problem_of_types(tensors: tuple[object, ...], layout: object, spans: object) -> str | None:
    """Which argument of `attend` is something else."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return f"q, k, v and key_bias must be tensors, got {', '.join(type(tensor).__name__ for tensor in tensors)}"
    if not isinstance(layout, Layout):
        return f"layout must be a Layout, got {type(layout).__name__}: compile_layout makes one of patterns"
    if not (spans is None or isinstance(spans, Spans)):
        return f"spans must be Spans, got {type(spans).__name__}: Spans.of makes them of rows"
    return None


def _problem_of_shapes(call: Call) -> str | None:
    """What is wrong with q, k and v. Messages are made where they are needed: they take longer than the checks."""
    q, k, v = call.q, call.k, call.v
    shapes = lambda: f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"  # noqa: E731
    if not q.ndim == k.ndim == v.ndim == 4:
        return f"q, k and v must be [batch, heads, tokens, width], got {shapes()}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return f"batch sizes differ: {shapes()}"
    if k.shape[1:3] != v.shape[1:3] or q.shape[3] != k.shape[3]:
        return f"k must match v in heads and tokens, q in width: {shapes()}"
    if 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        return f"query heads must be a multiple of KV heads, at least one: {shapes()}"
    if q.shape[3] == 0:
        return f"q and k must be at least one wide: {shapes()}"
    if call.whole and q.shape[2] > k.shape[2]:
        return f"there are more queries than keys: {shapes()}"
    return None


def _problem_of_parts(call: Call) -> str | None:
    """What of dtypes, devices, layout, spans and bias does not fit the rest."""
    q, k, v, layout = call.q, call.k, call.v, call.layout
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES):
        return f"dtypes differ or are not floating (float16, bfloat16, float32, float64): {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.device == k.device == v.device:
        return f"devices differ: {q.device}, {k.device}, {v.device}"
    if layout.heads not in (q.shape[1], k.shape[1]):
        return f"the layout has {layout.heads} heads; expected {q.shape[1]} (query heads) or {k.shape[1]} (KV heads)"
    if layout.sequences not in (1, len(call.spans)):
        return f"the layout is for {layout.sequences} sequences, the spans hold {len(call.spans)}"
    if layout.device != q.device:
        return f"the layout is on {layout.device}, q on {q.device}: use layout.to(q.device)"
    if call.key_bias is not None and call.key_bias.shape != k.shape[:3]:
        return f"key_bias must have shape {tuple(k.shape[:3])}, got {tuple(call.key_bias.shape)}"
    if call.key_bias is not None and not call.key_bias.is_floating_point():
        return f"key_bias is added to scores and must be floating, got {call.key_bias.dtype}: -inf removes a key"
    if call.key_bias is not None and call.key_bias.device != q.device:
        return f"devices differ: q is on {q.device}, key_bias on {call.key_bias.device}"
    return None
