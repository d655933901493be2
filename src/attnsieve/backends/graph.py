"""A call as one operation of a graph, for torch.compile: what happens on the host stays out of the trace.

The operation takes a call's tensors and numbers, since graphs hold nothing else. A static layout is remembered by its `end`, so
that its schedules are built once. The gradients are an operation too: by Triton from the output and the LSE, by other backends
from a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.errors import require
from attnsieve.layout import Blocks, Layout
from attnsieve.spans import Spans

Choose = Callable[[str, Call], str]
Run = Callable[[str, Call], tuple[Tensor, Tensor]]
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor[] spans, Tensor end, Tensor? offset, Tensor? corner, "
    "Tensor? corner_rows, Tensor? block_count, Tensor? block_index, int[] numbers, float scale, str backend"
)
_KNOWN = "_attnsieve_layout"


def operation(choose: Choose, run: Run) -> Callable[[str, Call], tuple[Tensor, Tensor]]:
    """Register torch.ops.attnsieve.attend, differentiable in q, k, v and key_bias. To be called once.

    choose: what the user asked for and a call -> the name of a backend; run: that name and the call -> output and LSE.
    """

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        call = _call(*arguments[:-1])
        out, lse = run(choose(arguments[-1], call), call)
        # Graphs are told strides beforehand: of the output those that most backends return.
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()

    def backward(d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
        call = _with_leaves(_call(*arguments[:-1]))
        name = choose(arguments[-1], call)
        require(
            name != "reference", "backend 'reference' has no gradients under torch.compile: take 'portable' or none by name"
        )
        found = _of_triton(call, out, lse, d_out, d_lse) if name == "triton" else _by_autograd(name, run, call, d_out, d_lse)
        found = [x.contiguous() for x in found]
        return found if call.key_bias is not None else [*found, _like_bias(None, out)]

    attend = torch.library.custom_op("attnsieve::attend", forward, mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor)")
    attend.register_fake(_fake)
    schema = f"(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, {_CALL}) -> Tensor[]"
    gradients = torch.library.custom_op("attnsieve::attend_backward", backward, mutates_args=(), schema=schema)
    gradients.register_fake(_fake_gradients)
    attend.register_autograd(_differentiated(gradients), setup_context=_save)
    return lambda backend, call: attend(*_arguments(call), backend)


def _arguments(call: Call) -> tuple[Any, ...]:
    """What the operation takes of a call, without the backend."""
    layout, spans, blocks = call.layout, call.spans, call.layout.blocks
    count, index = (None, None) if blocks is None else (blocks.count, blocks.index)
    sides = (0, 0) if blocks is None else (blocks.rows, blocks.keys)
    most = -1 if layout.most_keys is None else layout.most_keys
    places = [spans.batch, spans.q_start, spans.q_len, spans.k_start, spans.k_len]
    vectors = (layout.end, layout.offset, layout.corner, layout.corner_rows, count, index)
    numbers = [layout.length, most, *sides, int(layout.passing), int(layout.windows), *(spans.whole or ())]
    return call.q, call.k, call.v, call.key_bias, places, *vectors, numbers, float(call.scale)


def _call(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, places: Sequence[Tensor], *layout_and_scale: Any) -> Call:
    """The inverse of `_arguments`."""
    *vectors, numbers, scale = layout_and_scale
    whole = (numbers[6], numbers[7], numbers[8]) if len(numbers) > 6 else None
    batch, q_start, q_len, k_start, k_len = places
    spans = Spans(batch, q_start, q_len, k_start, k_len, whole)
    return Call(q, k, v, _layout(vectors, numbers), spans, scale, key_bias)


def _layout(vectors: Sequence[Any], numbers: Sequence[int]) -> Layout:
    end, offset, corner, corner_rows, count, index = vectors
    identity = _identity(vectors, numbers[:6])
    of, known = getattr(end, _KNOWN, (None, None))
    if known is not None and of == identity:
        found: Layout = known
        return found
    length, most, rows, keys, passing, windows = numbers[:6]
    blocks = None if count is None or index is None else Blocks(rows, keys, count, index)
    most_keys = None if most < 0 else most
    layout = Layout(
        length, end, offset, corner, corner_rows, blocks, most_keys=most_keys, passing=bool(passing), windows=bool(windows)
    )
    if most < 0 and not passing:
        # Masks chosen from the input are used once; remembering them would keep their memory until a collection of cycles.
        setattr(end, _KNOWN, (identity, layout))
    return layout


def _identity(vectors: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    """Differs between layouts that share some of their vectors, and after one is written to."""
    # Tensors made in inference mode count no versions.
    seen = [None if x is None else (x.data_ptr(), 0 if x.is_inference() else x._version) for x in vectors]
    return [*seen, *numbers]


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries = q.shape[:3]
    return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2), q.new_empty(q.shape[:3], dtype=work)


def _fake_gradients(*arguments: Any) -> list[Tensor]:
    *inputs, key_bias = arguments[4:8]
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs), _like_bias(key_bias, inputs[0])]


def _like_bias(key_bias: Tensor | None, q: Tensor) -> Tensor:
    """Operations return tensors only: an empty one where there is no bias."""
    return q.new_empty(0) if key_bias is None else torch.empty_like(key_bias, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_bias, places, *vectors, numbers, scale, backend = inputs
    ctx.save_for_backward(*output, q, k, v, key_bias, *places, *vectors)
    ctx.others = numbers, scale, backend


def _differentiated(gradients: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        out, lse, q, k, v, key_bias, *rest = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
        arguments = (q, k, v, key_bias, rest[:5], *rest[5:], *ctx.others)
        d_q, d_k, d_v, d_bias = gradients(d_out, d_lse, out, lse, *arguments)
        # The places are a list of tensors, whose gradients are a list too.
        return d_q, d_k, d_v, None if key_bias is None else d_bias, [None] * 5, *[None] * (len(arguments) - 5)

    return backward


def _with_leaves(call: Call) -> Call:
    q, k, v = (x.detach().requires_grad_() for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, key_bias=None if call.key_bias is None else call.key_bias.detach().requires_grad_())


def _of_triton(call: Call, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> list[Tensor]:
    from attnsieve.backends.triton.gradients import gradients

    with torch.no_grad():
        grads = gradients(call, out, lse, d_out, d_lse)
    return [x for x in (grads.q, grads.k, grads.v, grads.key_bias) if x is not None]


def _by_autograd(name: str, run: Run, call: Call, d_out: Tensor, d_lse: Tensor) -> list[Tensor]:
    leaves = [x for x in (call.q, call.k, call.v, call.key_bias) if x is not None]
    with torch.enable_grad():
        return [*torch.autograd.grad(run(name, call), leaves, [d_out, d_lse])]
