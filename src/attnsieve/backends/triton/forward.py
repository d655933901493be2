"""Prefill: one program per query tile, layout head and sequence."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton import hopper
from attnsieve.backends.triton.common import Places, Rows, places_of, rows_of, rows_of_tile, span_of
from attnsieve.backends.triton.forward_tile import forward_tile
from attnsieve.backends.triton.geometry import Geometry, Tiles, rounding
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.outputs import clear_uncovered, new_outputs
from attnsieve.backends.triton.product_columns import bias_of
from attnsieve.backends.triton.schedule import Schedule, schedule
from attnsieve.backends.triton.tuning import SELECTED


@triton.jit
def forward_kernel(q, k, v, bias, out, p_lse, places, mask, tiles, singles, marks, scale, q_slots, shape: tl.constexpr):
    """q [B, Hq, Tq, D], k, v [B, Hkv, Tk, D | Dv], bias [B, Hkv, Tk] or None -> out, p_lse [B, Hq, Tq].

    Rows of a program: GP heads of M positions each. G query heads share a KV head; GP is 1 where each has a mask of its own.
    """
    h, i_s = tl.program_id(1), tl.program_id(2)
    span = span_of(places, i_s)
    _, _, first, _, k_len = span
    # The longest lists belong to the last tiles: start with them.
    t = tl.cdiv(k_len, shape.M) - 1 - tl.program_id(0)
    if (t + 1) * shape.M <= first or t < 0:
        return
    forward_tile(q, k, v, bias, out, p_lse, mask, tiles, singles, marks, scale, q_slots, h, i_s, t, span, shape)


@triton.jit
def again_kernel(
    q,
    k,
    v,
    bias,
    out,
    p_lse,
    spoilt,
    places,
    mask,
    singles,
    marks,
    scale,
    q_slots,
    query_tiles,
    total,
    shape: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Computes the tiles again that have an LSE of NaN, where `spoilt`, two numbers of each program, says that there are any.

    Launched behind `hopper_forward`, with its grid and its tiles of queries, of which query_tiles belong to a sequence.
    """
    o = tl.arange(0, SLOTS)
    if tl.max(tl.load(spoilt + o, mask=o < 2 * tl.num_programs(0), other=0), 0) == 0:
        return
    for x in range(tl.program_id(0), total, tl.num_programs(0)):
        h, i_s = x % shape.H, x // shape.H // query_tiles
        span = span_of(places, i_s)
        batch, _, _, _, k_len = span
        t = tl.cdiv(k_len, shape.M) - 1 - x // shape.H % query_tiles
        _, head, slot, row_ok = rows_of_tile(tl.arange(0, shape.M * shape.GP), h, t, span, shape.G, shape.GP, shape.M)
        row_ok = row_ok & (t >= 0)
        heads = shape.H if shape.GP == 1 else shape.H * shape.G
        lse = tl.load(p_lse + (batch * heads + head) * q_slots + slot, mask=row_ok, other=0.0)
        if tl.max((lse != lse).to(tl.int32), 0) == 1:
            forward_tile(q, k, v, bias, out, p_lse, mask, None, singles, marks, scale, q_slots, h, i_s, t, span, shape)


class Prefill:
    """The prefill kernel for calls like `call`: those with another q, k, v, bias or spans of the same shapes, dtypes and device."""

    def __init__(self, call: Call, tiles: Tiles) -> None:
        geometry = Geometry(call, tiles)
        built = schedule(call.layout, geometry.positions, tiles.keys)
        shape, options = geometry.shape(built), geometry.options() | rounding(call)
        self._programs = hopper.programs(geometry) if _is_for_hopper(geometry, built) else 0
        if self._programs:
            # Gluon is there with the Triton that it was written for alone.
            from attnsieve.backends.triton import hopper_forward

            self._hopper = hopper_forward.prefill(geometry, built, self._programs)
            self._again = Launch(
                again_kernel,
                (self._programs, 1, 1),
                built.mask,
                built.singles,
                built.marks,
                call.scale,
                call.q.shape[2],
                geometry.query_tiles,
                geometry.total,
                shape,
                SLOTS=triton.next_power_of_2(2 * self._programs),
                **options,
            )
        else:
            self._launch = Launch(
                forward_kernel,
                (geometry.query_tiles, call.layout.heads, len(call.spans)),
                built.mask,
                built.tiles,
                built.singles,
                built.marks,
                call.scale,
                call.q.shape[2],
                shape,
                **options,
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Rows | None, places: Places) -> tuple[Tensor, Tensor]:
        """out [B, Hq, Tq, Dv] in q's dtype and LSE [B, Hq, Tq] in float32."""
        out, lse = new_outputs(q, v)
        if not self._programs:
            self._launch(rows_of(q), rows_of(k), rows_of(v), bias, rows_of(out), lse, places)
            return out, lse
        q, k, v = (x if hopper.is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        spoilt = torch.empty(2 * self._programs, dtype=torch.int32, device=q.device)
        for kernel in (self._hopper, self._again):
            kernel(rows_of(q), rows_of(k), rows_of(v), bias, rows_of(out), lse, spoilt, places)
        return out, lse


def _is_for_hopper(geometry: Geometry, built: Schedule) -> bool:
    """Whether the kernel for Hopper GPUs serves the call and is faster; `again_kernel` then looks after what it leaves."""
    if (geometry.rows, geometry.tiles.keys) != (SELECTED.rows, SELECTED.keys) or not hopper.is_wide_enough(geometry.call):
        return False
    return built.tiles is None and built.marks is not None and hopper.serves(geometry.call, built)


def forward(call: Call, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype and LSE [B, Hq, Tq] in float32."""
    return prefill_of(call, Prefill(call, tiles))


def prefill_of(
    call: Call, run: Callable[[Tensor, Tensor, Tensor, Rows | None, Places], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """`forward` by a `Prefill` or its like that was made for the call."""
    out, lse = run(call.q, call.k, call.v, bias_of(call), places_of(call.spans))
    clear_uncovered(call, out, lse)
    return out, lse
