"""Gradients of a call, from its output and LSE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton import hopper
from attnsieve.backends.triton.backward_keys import dkv_singles_kernel, dkv_tiles_kernel
from attnsieve.backends.triton.backward_queries import delta_kernel, dq_kernel
from attnsieve.backends.triton.common import Lists, Rows, places_of, rows_of
from attnsieve.backends.triton.geometry import Geometry, Tiles
from attnsieve.backends.triton.outputs import clear_uncovered
from attnsieve.backends.triton.product_columns import bias_columns, row_columns
from attnsieve.backends.triton.schedule import Schedule, only_lists, schedule, stretches, tiles_by_key
from attnsieve.backends.triton.tuning import STRETCH_ROWS, key_tiles, query_tiles
from attnsieve.device import padded
from attnsieve.launching import launch


@dataclass(frozen=True)
class Gradients:
    """Of q, k, v and key_bias, in their shapes and dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None


def gradients(call: Call, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """out [B, Hq, Tq, Dv], lse [B, Hq, Tq] and the gradients of both -> the gradients of the inputs.

    Sums over queries are float32 atomic additions, whose order varies between runs. Under
    `torch.use_deterministic_algorithms(True)` every key tile is owned by one program per head instead.
    """
    delta, bias = row_sums(call, out, lse, d_out, d_lse), bias_columns(call)
    d_q = query_gradient(call, d_out, lse, delta, d_lse, query_tiles(call), bias)
    return Gradients(d_q, *key_gradients(call, d_out, row_columns(call, lse, delta), bias=bias))


def row_sums(call: Call, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """delta [B, Hq, Tq] in float32: rowsum(dO * O) - dLSE."""
    heads, slots, width = call.q.shape[1], call.q.shape[2], call.v.shape[-1]
    delta = torch.empty_like(lse)
    grid = (triton.cdiv(slots, 64), call.q.shape[0] * heads)
    numbers = (heads, slots, width, padded(width))
    launch(delta_kernel, grid, rows_of(out), rows_of(d_out), lse, _of_rows(d_lse), delta, *numbers, STEP=64)
    return delta


def query_gradient(
    call: Call, d_out: Tensor, lse: Tensor, delta: Tensor, d_lse: Tensor | None, tiles: Tiles, bias: Rows | None = None
) -> Tensor:
    """dQ in q's dtype. Corrects `delta` in place where a bias needs more than the rounded output gives, see `dq_kernel`.

    bias: the call's `bias_columns`, where they have been made.
    """
    geometry = Geometry(call, tiles)
    built = schedule(call.layout, geometry.positions, tiles.keys, listing=_listing())
    d_q = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    clear_uncovered(call, d_q, None)
    launch(
        dq_kernel,
        (geometry.query_tiles, call.layout.heads, len(call.spans)),
        *_inputs(call, bias),
        rows_of(d_out),
        lse,
        delta,
        _of_rows(d_lse),
        rows_of(d_q),
        places_of(call.spans),
        built.mask,
        built.tiles,
        built.singles,
        built.marks,
        call.scale,
        call.q.shape[2],
        geometry.shape(built),
        **geometry.options(),
    )
    return d_q


def key_gradients(
    call: Call, d_out: Tensor, columns: Tensor, tiles: Tiles | None = None, bias: Rows | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dK, dV and d key_bias in their inputs' dtypes. tiles: those of the Triton kernels, which then serve listed keys too.

    columns: `row_columns` of the call. bias: its `bias_columns`, where they have been made.
    """
    geometry = Geometry(call, tiles or key_tiles(call))
    # Lists of stretches are all that is read where there are no tiles: they are made of the lists that dQ has used.
    others = Geometry(call, query_tiles(call)) if only_lists(call.layout) and _listing() else geometry
    built = schedule(call.layout, others.positions, others.tiles.keys, listing=_listing())
    heads = call.layout.heads if _deterministic() else call.k.shape[1]
    zeros = lambda like: like.new_zeros(like.shape[0], heads, *like.shape[2:], dtype=torch.float32)  # noqa: E731
    d_k, d_v = zeros(call.k), zeros(call.v)
    d_bias = None if call.key_bias is None else zeros(call.key_bias)
    outputs = (rows_of(d_k), rows_of(d_v), d_bias)
    common = (*_inputs(call, bias), rows_of(d_out), rows_of(columns), *outputs, places_of(call.spans), built.mask)
    if built.tiles is not None:
        _add_tiles(geometry, built, common)
    if built.singles is not None:
        aligned = all(map(hopper.is_aligned, (call.q, call.k, call.v, d_out)))
        if tiles is None and aligned and hopper.serves(call, built):
            _add_singles_hopper(call, built, common)
        else:
            _add_singles(geometry, built, common)
    bias_gradient = None if d_bias is None or call.key_bias is None else _sum_heads(d_bias, call.key_bias)
    return _sum_heads(d_k, call.k), _sum_heads(d_v, call.v), bias_gradient


def _add_tiles(geometry: Geometry, built: Schedule, common: tuple[object, ...]) -> None:
    """Add the sums over key tiles."""
    call, tiles = geometry.call, geometry.tiles
    launch(
        dkv_tiles_kernel,
        (triton.cdiv(call.k.shape[2], tiles.keys), call.layout.heads, len(call.spans)),
        *common,
        tiles_by_key(call.layout, built),
        call.scale,
        call.k.shape[2],
        geometry.shape(built),
        OWN_SUMS=_deterministic(),
        **geometry.options(),
    )


def _add_singles(geometry: Geometry, built: Schedule, common: tuple[object, ...]) -> None:
    """Add the sums over listed keys."""
    call = geometry.call
    rows = max(STRETCH_ROWS, geometry.positions, built.positions)
    grid, lists = _stretches(geometry, built, rows)
    launch(
        dkv_singles_kernel,
        grid,
        *common,
        lists,
        call.scale,
        call.k.shape[2],
        geometry.shape(built),
        ROWS=rows,
        **geometry.options(),
    )


def _add_singles_hopper(call: Call, built: Schedule, common: tuple[object, ...]) -> None:
    """`_add_singles` by the kernel for Hopper GPUs."""
    # Gluon is there with the Triton that it was written for alone.
    from attnsieve.backends.triton.hopper_keys import STRETCH_ROWS, TILES, dkv_hopper

    geometry = Geometry(call, TILES)
    grid, lists = _stretches(geometry, built, STRETCH_ROWS)
    constants = geometry.constants()
    launch(
        dkv_hopper,
        grid,
        *common,
        lists,
        call.scale,
        call.k.shape[2],
        STRETCH_ROWS,
        **{name: constants[name] for name in ("H", "OWN_MASKS", "G", "GP", "M", "N", "D")},
        WARPS=TILES.warps,
        STAGES=TILES.stages,
        num_warps=TILES.warps,
    )


def _stretches(geometry: Geometry, built: Schedule, rows: int) -> tuple[tuple[int, int, int], Lists]:
    """Programs for chunks of the keys that stretches of `rows` positions list, and these lists."""
    call = geometry.call
    lists, longest = stretches(call.layout, built, rows)
    per_head = triton.cdiv(call.q.shape[2], rows) + 1
    return (triton.cdiv(longest, geometry.tiles.keys), per_head * call.layout.heads, len(call.spans)), lists


def _sum_heads(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient in the shape and dtype of its tensor."""
    return grad.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype) if grad.shape != like.shape else grad.to(like.dtype)


def _inputs(call: Call, bias: Rows | None) -> tuple[object, ...]:
    return rows_of(call.q), rows_of(call.k), rows_of(call.v), bias_columns(call) if bias is None else bias


def _of_rows(values: Tensor | None) -> Rows | None:
    """The bundle of a [B, H, T] tensor."""
    return None if values is None else Rows(values, *values.stride())


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _listing() -> bool:
    return not _deterministic()
