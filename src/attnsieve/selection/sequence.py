"""What a selector reads and what it returns: sequences of equal shape, and the heads that carry one atom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from attnsieve.selection import fused


@dataclass(frozen=True, eq=False)
class SequenceQK:
    """q [S, H, nq, D] and k [S, K, nk, D] of S sequences; queries are the last positions, query head h reads KV head h // (H // K).

    together: the query heads of a KV head choose as one. Choices have C heads: K then, else H. masses: what an atom's `mass` is for
    each of them, as `shares_of` makes it, where they differ.
    """

    q: Tensor
    k: Tensor
    scale: float
    together: bool = False
    masses: Tensor | None = None

    def mass(self, of_atom: float) -> float | Tensor:
        """What `fewest_with_mass` takes, of an atom that says `of_atom`."""
        return of_atom if self.masses is None else self.masses

    @property
    def tokens(self) -> int:
        """Positions of each sequence, nk."""
        return self.k.shape[2]

    @property
    def first_row(self) -> int:
        """Position of the first query."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def choices(self) -> int:
        """C: heads that choose for themselves."""
        return self.k.shape[1] if self.together else self.q.shape[1]

    @cached_property
    def keys(self) -> Tensor:
        """float32 [S, K, D, nk]."""
        return self.k.float().mT

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """float32 [S, K, H // K, R, n]: q [S, H, R, D] times keys [S, K, D, n], scaled. K is not expanded."""
        kv_heads, rows = keys.shape[1], q.shape[2]
        # The scale goes into the queries, of which there are fewer than scores.
        stacked = (q.float() * self.scale).reshape(q.shape[0], kv_heads, -1, q.shape[3])
        scores: Tensor = (stacked @ keys).unflatten(2, (-1, rows))
        return scores

    def merged(self, values: Tensor) -> Tensor:
        """[S, K, H // K, ...] -> [S, C, ...]: the mean of those who choose together."""
        return values.mean(2) if self.together else values.flatten(1, 2)

    def attention(self, rows: Tensor, alive: Tensor | None = None, seen: int = 0) -> Tensor:
        """float32 [S, C, R, nk]: exact causal attention of the queries at absolute positions `rows`, among the keys that
        `alive`, bool [S, C, nk], leaves them. seen: the first keys, known to be before all rows."""
        scores = self.scores(self.q[:, :, rows - self.first_row], self.keys)
        late = scores[..., seen:]
        late.masked_fill_(torch.arange(seen, self.tokens, device=rows.device) > rows[:, None], -torch.inf)
        if alive is not None:
            scores.masked_fill_(~alive.unflatten(1, (self.k.shape[1], -1)).unsqueeze(3), -torch.inf)
        return self.merged(scores.softmax(-1))


@dataclass(frozen=True, eq=False)
class TableInParts:
    """A bool table [S, C, rows of blocks, key blocks] of which `at_once` rows of blocks are chosen at a time, when they are read:
    with a flag for every key of every block it would be the largest of all that a choice takes."""

    shape: tuple[int, int, int, int]
    at_once: int
    choose: Callable[[slice], Tensor]

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of a part and the part, [S, C, some rows, key blocks]; the last rows first, which can keep most."""
        for start in reversed(range(0, self.shape[2], self.at_once)):
            yield start, self.choose(slice(start, min(start + self.at_once, self.shape[2])))

    def whole(self) -> Tensor:
        """All of it."""
        if self.at_once >= self.shape[2]:
            return self.choose(slice(0, self.shape[2]))
        table = None
        for start, part in self.parts():
            table = part.new_empty(self.shape) if table is None else table
            table[:, :, start : start + part.shape[2]] = part
        assert table is not None
        return table


@dataclass(frozen=True, eq=False)
class Chosen:
    """A choice in the vectors of a layout: end int32 [S, C, n], offset bool [S, C, n], table bool [S, C, rows, nb] of blocks of
    `block` queries by `keys` keys, for the rows of blocks that hold queries. S and C may be 1 where all choose alike. mortal: some
    ends are neither FOREVER nor 0."""

    end: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | TableInParts | None = None
    block: int = 0
    keys: int = 0
    mortal: bool = False


@lru_cache(maxsize=1024)
def shares_of(masses: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C]: shares of the total that reach these masses. Copied to the device once, since a copy waits for it."""
    return torch.tensor([with_room(mass) for mass in masses], dtype=torch.float32, device=device)


def with_room(mass: float) -> float:
    """With room for the rounding of a float32 sum."""
    return mass * (1 - 1e-6)


def fewest_with_mass(weights: Tensor, mass: float | Tensor, stops: Tensor | None = None) -> Tensor:
    """bool like `weights` [..., B, n]: the fewest entries whose sum reaches `mass` of the total of the last dimension, of equal
    ones the first. mass: for all, or as `shares_of` makes it for weights [S, C, ..., n]. stops: int32 [B], where entries end that
    count, if those beyond are not 0."""
    share = mass if isinstance(mass, Tensor) else with_room(mass)
    if fused.serves(weights):
        from attnsieve.selection.fused.fewest import fewest_with_mass as search

        return search(weights, share, stops)
    if stops is not None:
        weights = weights.masked_fill(torch.arange(weights.shape[-1], device=weights.device) >= stops[:, None], 0)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    if isinstance(share, Tensor):
        share = share.view(-1, *[1] * (weights.ndim - 2))
    # The largest entry is always kept.
    kept = before < share * weights.sum(-1, keepdim=True)
    kept[..., 0].fill_(True)
    return torch.zeros_like(kept).scatter_(-1, order, kept) & (weights > 0)
