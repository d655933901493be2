"""How much work a call is for each backend, in the units that its measured constants are per.

"call": 1. "bytes": gigabytes of K and V read. "moved": gigabytes of K and V written with columns in front of them. Everything
else: 1e9 scores (query x key pairs as computed, padding included) at the width of 128, or for "part" on the CPU: pieces of work
that plain torch handles one by one. "diagonal" are the pairs of scattered diagonals. FA4's tiles that are kept in part are
"predicate" where they follow a rule of ours and "partial" where they follow the kernel's own. "moved" never comes without
"predicate": fitted to the rows so far its own constant is 0, and that of "predicate" pays for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends.call import DECODE_QUERIES, Call
from attnsieve.backends.facts import facts
from attnsieve.device import multiprocessors

Work = dict[str, float]

_GIGA = 1e9
# What a score costs at width 0 and at width 128: measured for FA4, cuDNN and Triton, width 64 takes .58 to .65 of width 128.
_AT_ZERO, _PER_WIDTH = 0.2, 0.8 / 128
_QUERY_TILE = 128
# What a pair of a diagonal costs where the heads of a KV group share it, who read its key together.
_SHARED = 0.8


def phase(call: Call) -> str:
    """ "decode" or "prefill"."""
    return "decode" if call.q.shape[2] <= DECODE_QUERIES else "prefill"


def work(call: Call, backend: str) -> Work | None:
    """The work of `call` on `backend`, or None where it is not modelled."""
    if phase(call) == "decode":
        return _reading(call) if backend in ("dense", "triton") and facts(call.layout).dense else None
    count = _COUNTS.get(backend)
    return None if count is None else count(call)


def _reading(call: Call) -> Work:
    return {"call": 1.0, "bytes": (call.k.numel() + call.v.numel()) * call.k.element_size() / _GIGA}


def _dense(call: Call) -> Work:
    return _scores(call, {"whole": causal_pairs(call) * call.q.shape[1]})


def _fa4(call: Call) -> Work | None:
    from attnsieve.backends.fa4.kernel import has_predicate, moved_bytes, tile_counts

    if facts(call.layout).dense:
        return _scores(call, {"whole": causal_pairs(call) * call.q.shape[1], "partial": 0})
    whole, partial = tile_counts(call)
    cells, moved = _QUERY_TILE * _QUERY_TILE, moved_bytes(call)
    amounts = _scores(call, {"whole": whole * cells, "predicate" if has_predicate(call) else "partial": partial * cells})
    return amounts | {"moved": moved / _GIGA} if moved else amounts


def _triton(call: Call) -> Work:
    from attnsieve.backends.triton.scattered import scattered

    parts = scattered(call)
    if parts is None:
        return _lists(call)
    pairs = parts.rows(call.k.shape[2] - call.q.shape[2], call.k.shape[2]) * call.q.shape[1]
    if call.group > 1 and call.layout.heads == call.k.shape[1]:
        pairs *= _SHARED
    # Not split again: what lies alone once others are gone goes by tiles all the same.
    return _lists(replace(call, layout=parts.rest)) | _scores(call, {"diagonal": pairs})


def _lists(call: Call) -> Work:
    """Of key tiles and listed keys, which serve every pair."""
    from attnsieve.backends.triton.geometry import Geometry
    from attnsieve.backends.triton.schedule import schedule
    from attnsieve.backends.triton.tuning import forward_tiles

    tiles = forward_tiles(call)
    geometry = Geometry(call, tiles)
    built = schedule(call.layout, geometry.positions, tiles.keys)
    first, stop = _tile_range(call, geometry.positions)
    counts = [*_sums(built.tiles, call, first, stop), *_sums(built.singles, call, first, stop)]
    whole, in_tiles, _, alone = torch.stack(counts).tolist()
    cells = geometry.rows * tiles.keys
    scores = {"whole": whole * cells, "partial": (in_tiles - whole) * cells, "single": alone * geometry.rows}
    return _scores(call, scores | {"rows": (stop - first) * geometry.rows * call.layout.heads})


def _portable(call: Call) -> Work | None:
    if call.layout.sequences > 1 or call.q.is_cuda:
        return None
    from attnsieve.backends.portable.parts import parts_of, slots_of

    cells = scattered = pieces = 0
    for slots in slots_of(call):
        for kv_head in range(call.k.shape[1]):
            for part in parts_of(call, slots, kv_head):
                rows = len(part.rows) * len(part.heads) * len(slots.batch)
                cells += rows * len(part.keys)
                scattered += 0 if part.row_keys is None else rows * part.row_keys.shape[1]
                pieces += 1
    amounts = _scores(call, {"whole": cells, "single": scattered}, batch=1)
    return amounts | {"part": float(pieces)}


_COUNTS: dict[str, Callable[[Call], Work | None]] = {"dense": _dense, "fa4": _fa4, "triton": _triton, "portable": _portable}


def _sums(lists: Any, call: Call, first: int, stop: int) -> list[Tensor]:
    """Entries of the lists of query tiles first to stop - 1, if there are lists: those that need no predicate, and all."""
    if lists is None:
        return [torch.zeros((), dtype=torch.int64, device=call.q.device)] * 2
    return [part.view(lists.count.shape)[..., first:stop].sum() for part in (lists.whole, lists.count)]


def _tile_range(call: Call, positions: int) -> tuple[int, int]:
    return (call.k.shape[2] - call.q.shape[2]) // positions, -(-call.k.shape[2] // positions)


def causal_pairs(call: Call) -> float:
    """Causal pairs of one head."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    return queries * (keys - queries) + queries * (queries + 1) / 2


def _scores(call: Call, scores: Mapping[str, float], batch: int | None = None) -> Work:
    """Scores of one batch row in units, made dearer by processors that find no query tile to work on."""
    batch = call.q.shape[0] if batch is None else batch
    unit = batch * of_width(call) * _idle(call) / _GIGA
    return {"call": 1.0} | {kind: amount * unit for kind, amount in scores.items()}


def of_width(call: Call) -> float:
    """What a score of the call costs, beside one of width 128."""
    return _AT_ZERO + _PER_WIDTH * (call.q.shape[-1] + call.v.shape[-1]) / 2


def _idle(call: Call) -> float:
    """Processors of the GPU per program, at least 1."""
    programs = call.q.shape[0] * call.q.shape[1] * -(-call.q.shape[2] // _QUERY_TILE)
    return max(1.0, multiprocessors(call.q.device) / programs)
