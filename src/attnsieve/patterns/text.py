"""The text form of patterns: Python call syntax joined by `|`, read with the standard library's parser."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from attnsieve.errors import UserError, require
from attnsieve.patterns.base import Atom, Pattern
from attnsieve.patterns.corner import Captured
from attnsieve.patterns.dynamic import (
    AntidiagonalBlocks,
    DamOnline,
    DenseDecode,
    DensePrefill,
    HeavyHitters,
    LastQueries,
    PooledBlocks,
    ProbedBlocks,
    ProbedKeys,
    TopBlocks,
    VerticalSlash,
    VotedKeys,
)
from attnsieve.patterns.static import Columns, Dense, Diagonals, Dilated, RandomBlocks, Sink, Window

MAX_TEXT = 1 << 20
Share = Literal["none", "kv"]


def dense() -> Pattern:
    """Every key: causal attention."""
    return Pattern.of(Dense())


def window(tokens: int) -> Pattern:
    """The `tokens` newest keys, the query's own included."""
    return Pattern.of(Window(tokens))


def sink(tokens: int) -> Pattern:
    """The first `tokens` keys of the document."""
    return Pattern.of(Sink(tokens))


def columns(*indices: int, start: int = 0) -> Pattern:
    """Keys at absolute positions, in rows from `start` on."""
    return Pattern.of(Columns(indices, start))


def diagonals(*distances: int, start: int = 0) -> Pattern:
    """Keys at these distances before the query, in rows from `start` on."""
    return Pattern.of(Diagonals(distances, start))


def dilated(tokens: int, *, step: int) -> Pattern:
    """`tokens` keys spaced `step` apart, the query's own the newest."""
    return Pattern.of(Dilated(tokens, step))


def random_blocks(count: int, *, block: int, seed: int = 0) -> Pattern:
    """`count` random earlier blocks of `block` tokens for every row of blocks."""
    return Pattern.of(RandomBlocks(count, block, seed))


def empty() -> Pattern:
    """No key at all."""
    return Pattern.empty()


def vertical_slash(*, mass: float = 0.95, probe: int = 64, strided: int = 0, band: int = 1, share: Share = "none") -> Pattern:
    """The fewest columns and offsets with `mass` of the attention of the last `probe` queries, offsets in bands of `band`; chosen
    from the input."""
    return Pattern.of(VerticalSlash(mass, probe, strided, band=band, share=share))


def dam_online(*, tau: float = 0.3, mu: float = 0.8, probe: int = 16, strided: int = 0, share: Share = "none") -> Pattern:
    """DAM's threshold and matching on a probe of this input."""
    return Pattern.of(DamOnline(tau, mu, probe, strided, share=share))


def probed_blocks(*, mass: float = 0.95, block: int = 64, rows: int = 4, share: Share = "none") -> Pattern:
    """Per query block, the fewest key blocks with `mass` of the exact attention of `rows` of its queries."""
    return Pattern.of(ProbedBlocks(mass, block, rows, share=share))


def probed_keys(*, mass: float = 0.9, block: int = 64, rows: int = 8, share: Share = "none") -> Pattern:
    """Per block of queries, the fewest single keys with `mass` of the attention of `rows` of its queries."""
    return Pattern.of(ProbedKeys(mass, block, rows, share=share))


def antidiagonal_blocks(*, mass: float = 0.9, block: int = 64, stride: int = 8, share: Share = "none") -> Pattern:
    """Per query block, the fewest key blocks with `mass` of the antidiagonal scores (XAttention)."""
    return Pattern.of(AntidiagonalBlocks(mass, block, stride, share=share))


def pooled_blocks(*, ratio: float = 0.05, block: int = 64, share: Share = "none") -> Pattern:
    """Per query block, key blocks whose pooled weight is at least `ratio` of the largest (FlashPrefill's rule)."""
    return Pattern.of(PooledBlocks(ratio, block, share=share))


def top_blocks(count: int, *, block: int = 64, share: Share = "none") -> Pattern:
    """Per query block, the `count` key blocks with the largest pooled scores."""
    return Pattern.of(TopBlocks(count, block, share=share))


def heavy_hitters(count: int, recent: int, *, block: int = 64, share: Share = "none") -> Pattern:
    """The `recent` newest keys and the `count` older ones with the largest accumulated attention (H2O)."""
    return Pattern.of(HeavyHitters(count, recent, block, share=share))


def voted_keys(count: int, *, probe: int = 32, pool: int = 7, share: Share = "none") -> Pattern:
    """The `count` keys with the largest pooled attention of the last `probe` queries (SnapKV)."""
    return Pattern.of(VotedKeys(count, probe, pool, share=share))


def last_queries(count: int, *, block: int = 64) -> Pattern:
    """Every key for the last `count` queries of a call of several, in whole blocks of rows: a guard rail for prompts."""
    return Pattern.of(LastQueries(count, block))


def dense_prefill() -> Pattern:
    """Every key in calls of several queries."""
    return Pattern.of(DensePrefill())


def dense_decode() -> Pattern:
    """Every key in calls of one query."""
    return Pattern.of(DenseDecode())


STATIC = (dense, window, sink, columns, diagonals, dilated, random_blocks, empty)
DYNAMIC = (
    vertical_slash,
    dam_online,
    probed_blocks,
    probed_keys,
    antidiagonal_blocks,
    pooled_blocks,
    top_blocks,
    heavy_hitters,
    voted_keys,
    last_queries,
    dense_prefill,
    dense_decode,
)
ATOMS: dict[str, Callable[..., Pattern]] = {maker.__name__: maker for maker in (*STATIC, *DYNAMIC)}


def parse_pattern(text: str, corners: Mapping[str, np.ndarray]) -> Pattern:
    """See `Pattern.parse`."""
    require(isinstance(text, str), f"a pattern is parsed from text such as 'sink(4) | window(256)', got {text!r:.80}")
    require(len(text) <= MAX_TEXT, f"a pattern's text has at most {MAX_TEXT} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"cannot read pattern {_short(text)}; write it like: sink(4) | window(256)") from None
    return _union(tree, text, corners)


def _union(node: ast.expr, text: str, corners: Mapping[str, np.ndarray]) -> Pattern:
    atoms: list[Atom] = []
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
            waiting += [part.right, part.left]
        else:
            atoms.extend(_atom(part, text, corners))
    return Pattern.of(*atoms)


def _atom(node: ast.expr, text: str, corners: Mapping[str, np.ndarray]) -> Pattern:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise UserError(f"cannot read a part of pattern {_short(text)}; each part is a call such as window(256)")
    name = node.func.id
    positional = [_constant(argument, text) for argument in node.args]
    keyword = {item.arg or "**": _constant(item.value, text) for item in node.keywords}
    if name == "captured":
        return Pattern.of(_captured(positional, keyword, corners))
    if name not in ATOMS:
        close = difflib.get_close_matches(name, [*ATOMS, "captured"], n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join([*ATOMS, 'captured'])}"
        raise UserError(f"unknown atom {name!r} in pattern {_short(text)}; {hint}")
    try:
        return ATOMS[name](*positional, **keyword)
    except TypeError as error:
        raise UserError(f"wrong arguments for {name} in pattern {_short(text)}: {error}") from None


def _captured(positional: list[Any], keyword: dict[str, Any], corners: Mapping[str, np.ndarray]) -> Captured:
    require(len(positional) == 2 and not keyword, 'captured takes a length and a digest, as in captured(512, "0f3a...")')
    length, digest = positional
    require(digest in corners, f"captured bits {digest!r} are not at hand: load the plan they were saved with")
    require(type(length) is int and length > 0, f"captured's length must be a positive whole number, got {length!r}")
    return Captured(length, digest, corners[digest])


def _constant(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        if isinstance(value, (int, float)):
            return -value  # who takes no number below 0 says what it takes
    raise UserError(f"arguments in pattern {_short(text)} must be plain numbers or strings")


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
