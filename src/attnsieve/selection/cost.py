"""What choosing keys takes beside the attention it is for: amounts of work, whose constants are with those of `backends.cost`.

"call": one atom's kernels, which the host launches. "product": 1e9 scores multiplied at the width of 128, as often as they are.
"alone": 1e9 scores of probed rows that lie alone, each of which is added up in memory of its own. "searched": 1e9 numbers among which
the fewest that hold a mass are sought.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from attnsieve.backends import cost
from attnsieve.backends.call import Call
from attnsieve.backends.cost_work import Work, causal_pairs, of_width
from attnsieve.device import device_name
from attnsieve.patterns import Pattern
from attnsieve.patterns.dynamic import (
    AntidiagonalBlocks,
    DamOnline,
    DenseDecode,
    DensePrefill,
    LastQueries,
    PooledBlocks,
    ProbedBlocks,
    ProbedKeys,
    TopBlocks,
    VerticalSlash,
    VotedKeys,
)
from attnsieve.selection.carriers import carriers

# What constants call it, as if it were a backend.
NAME = "choosing"
_GIGA = 1e9


def takes_as_long_as_dense(patterns: Sequence[Pattern], call: Call) -> bool:
    """Whether choosing for one pattern per query head, with all that is derived, is predicted to take no less time than dense
    attention of the call's shape, whatever its layout. False where either was not measured on its device."""
    known = cost.constants(device_name(call.q.device)).get(f"{NAME} prefill")
    ms = None if known is None else cost.weigh(known, work(patterns, call))
    dense = cost.predict(call, (cost.DENSE,)).get(cost.DENSE)
    return ms is not None and dense is not None and ms >= dense


def work(patterns: Sequence[Pattern], call: Call) -> Work | None:
    """The work of `choose` for one pattern per query head and the q and k of `call`; None where an atom's is not modelled."""
    total: Work = defaultdict(float)
    for carrier in carriers(tuple(patterns), call.group):
        count = _COUNTS.get(type(carrier.atom))
        if count is None:
            return None
        heads = call.q.shape[0] * (call.q.shape[1] if carrier.query is None else len(carrier.query)) / _GIGA
        scores = heads * of_width(call)
        units = {"call": 1.0, "product": scores, "alone": scores, "searched": heads / (call.group if carrier.together else 1)}
        for kind, amount in count(carrier.atom, call).items():
            total[kind] += amount * units[kind]
    return dict(total)


def _of_probe(passes: int) -> Callable[[Any, Call], Work]:
    """Of the last rows, multiplied with all keys so many times, and of those that lie alone."""

    def count(atom: Any, call: Call) -> Work:
        keys, strided = call.k.shape[2], getattr(atom, "strided", 0)
        return {"call": 1, "product": passes * atom.probe * keys, "alone": passes * strided * keys, "searched": 2 * keys}

    return count


def _of_blocks(atom: ProbedBlocks, call: Call) -> Work:
    pairs = causal_pairs(call)
    return {"call": 1, "product": pairs * atom.rows / atom.block, "searched": pairs / atom.block**2}


def _of_keys(atom: ProbedKeys, call: Call) -> Work:
    pairs = causal_pairs(call)
    return {"call": 1, "product": 2 * pairs * atom.rows / atom.block, "searched": pairs / atom.block}


def _of_antidiagonals(atom: AntidiagonalBlocks, call: Call) -> Work:
    pairs = causal_pairs(call)
    return {"call": 1, "product": pairs / atom.stride, "searched": pairs / atom.block**2}


def _of_pools(atom: PooledBlocks | TopBlocks, call: Call) -> Work:
    return {"call": 1, "product": causal_pairs(call) / atom.block**2}


def _of_rail(atom: LastQueries | DensePrefill | DenseDecode, call: Call) -> Work:
    return {}


_COUNTS: dict[type, Callable[[Any, Call], Work]] = {
    VerticalSlash: _of_probe(3),
    DamOnline: _of_probe(2),
    VotedKeys: _of_probe(2),
    ProbedBlocks: _of_blocks,
    ProbedKeys: _of_keys,
    AntidiagonalBlocks: _of_antidiagonals,
    PooledBlocks: _of_pools,
    TopBlocks: _of_pools,
    LastQueries: _of_rail,
    DensePrefill: _of_rail,
    DenseDecode: _of_rail,
}
