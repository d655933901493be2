"""The exact decode cache of one DMA layer: as many slots as a row can keep, however long the text."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.attention import attend
from attnsieve.errors import require
from attnsieve.layout import Layout
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule, competition_ends, strict_key
from attnsieve.nn.slots import Slots

_LOWEST = torch.iinfo(torch.int64).min


class BoundedCache:
    """Keys of one layer that a later row can still keep; attention over them equals attention over the whole text.

    Slots per batch row and KV head: [0, w) winners of the competition, [w, w + window) the newest keys as a ring,
    [w + window, w + window + sinks) the first keys. A key may sit in two of them and is attended to once.

    Exact because a key's score depends on its own token only and is never revised, so the order is strict and a key that
    has lost never returns. Hence the conditions, checked where that costs nothing: the rule, the batch size and the
    parameters behind the scores stay as they were (`parameters` of `attend`: in-place changes are noticed); scores are
    stored, not recomputed; the tokens of a row come in order, none is taken back (copy the cache to branch). Remembered
    keys carry no gradient.
    """

    def __init__(self, rule: SelectionRule) -> None:
        self.rule = rule
        self.seen = 0  # tokens given, padding included
        self.slots: Slots | None = None
        self.length: Tensor | None = None  # int64 [B, 1], positions so far
        self._versions: tuple[int, ...] | None = None

    def attend(
        self,
        q: Tensor,
        new: Slots,
        *,
        real: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
        parameters: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Attention of the next T tokens, which are then remembered: a prefill, a chunk or a step. [B, Hq, T, Dv].

        q [B, Hq, T, D]; `new`: their T keys, scored (its `position` is set here). `real` bool [B, T]: False for left padding,
        whose outputs are 0; the token of a single step after the first call is always real. Raises UserError when a
        condition of this class is broken.
        """
        self._check(q, new, real, parameters)
        step = self.slots is not None and q.shape[2] == 1
        out = self._step(q, new, scale, backend) if step else self._chunk(q, new, real, scale, backend)
        self.seen += q.shape[2]
        return out

    def reorder(self, rows: Tensor) -> None:
        """Keep the batch rows `rows` int64, in that order: beams, repeats, finished rows."""
        if self.slots is not None and self.length is not None:
            self.slots = self.slots.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            self.length = self.length.index_select(0, rows.to(self.length.device))

    def reset(self) -> None:
        """Forget everything."""
        self.seen, self.slots, self.length, self._versions = 0, None, None, None

    def _step(self, q: Tensor, new: Slots, scale: float | None, backend: str) -> Tensor:
        rule, slots = self.rule, self.slots
        assert slots is not None
        assert self.length is not None
        new = new.map(torch.Tensor.detach)
        new.position = self.length[:, :, None].expand_as(new.sigma)
        candidate = new
        if rule.window:
            ring = rule.keep_window_size + new.position % rule.window
            candidate = new if rule.union else slots.take(ring)
            slots.put(ring, new, torch.ones_like(ring, dtype=torch.bool))
        self._compete(candidate)
        if rule.sinks:
            first = rule.keep_window_size + rule.window
            slots.put(first + new.position.clamp_max(rule.sinks - 1), new, new.position < rule.sinks)
        self.length = self.length + 1
        end = torch.where(self._once(), len(slots), 0).to(torch.int32)
        return self._over(slots, q, end, scale, backend)

    def _over(self, slots: Slots, q: Tensor, end: Tensor, scale: float | None, backend: str) -> Tensor:
        layout = Layout(len(slots), end, most_keys=self.rule.slots)
        out = attend(q, slots.key, slots.value, layout, scale=scale, key_bias=slots.bias, backend=backend)
        assert isinstance(out, Tensor)
        return out

    def _compete(self, candidate: Slots) -> None:
        """Put the candidate where the worst winner is, or where a slot is free, if it is better."""
        assert self.slots is not None
        winners = self.slots.part(0, self.rule.keep_window_size)
        keys = torch.where(winners.position >= 0, strict_key(winners.sigma, winners.position), _LOWEST)
        worst, slot = keys.min(dim=-1, keepdim=True)
        winners.put(slot, candidate, strict_key(candidate.sigma, candidate.position) > worst)

    def _once(self) -> Tensor:
        """bool [B, H, N]: filled slots, each key in one slot only."""
        assert self.slots is not None
        assert self.length is not None
        position, rule = self.slots.position, self.rule
        once = position >= 0
        outside_sinks = rule.keep_window_size + rule.window
        once[..., :outside_sinks] &= position[..., :outside_sinks] >= rule.sinks
        if rule.union:
            once[..., : rule.keep_window_size] &= position[..., : rule.keep_window_size] < self.length[:, :, None] - rule.window
        return once

    def _chunk(self, q: Tensor, new: Slots, real: Tensor | None, scale: float | None, backend: str) -> Tensor:
        """Old and new keys in order of position are a short text whose last rows are the new ones."""
        text = self._text(new, real)
        segments = _segments(text.position >= 0)
        sigma = text.sigma.flatten(0, 1)[:, None]
        competition = competition_ends(sigma, self.rule.keep_window_size, segments)
        ends = self.rule.widen(competition, segments).view_as(text.position)
        out = self._over(text, q, ends, scale, backend)
        self._remember(text, competition.view_as(text.position))
        return out if real is None else out.masked_fill(~real[:, None, :, None], 0.0)

    def _text(self, new: Slots, real: Tensor | None) -> Slots:
        """Every remembered key once and the new ones, in order of position, empty slots and padding first."""
        if self.length is None:
            self.length = torch.zeros(len(new.sigma), 1, dtype=torch.int64, device=new.sigma.device)
        if real is None:
            real = torch.ones(len(new.sigma), len(new), dtype=torch.bool, device=new.sigma.device)
        position = torch.where(real, self.length + real.cumsum(1) - 1, -1)
        padding = ~real[:, None]
        new = new.map(lambda tensor: tensor.masked_fill(padding[..., None] if tensor.ndim == 4 else padding, 0))
        new.position = position[:, None].expand_as(new.sigma)
        if self.slots is not None:
            old = self.slots.map(torch.Tensor.clone)
            old.position.masked_fill_(~self._once(), -1)
            new = old.join(new)
        self.length = self.length + real.sum(1, keepdim=True)
        return new.take(new.position.argsort(dim=-1, stable=True))

    def _remember(self, text: Slots, competition: Tensor) -> None:
        """Refill the slots from a text whose last position is the newest."""
        assert self.length is not None
        rule, text, n = self.rule, text.map(torch.Tensor.detach), len(text)
        self.slots = text.empty(rule.slots)
        index = torch.arange(n, device=competition.device)
        entered = n if rule.union else n - rule.window  # list positions that have competed
        won = (index < entered) & (competition >= entered) & (text.position >= 0)
        best = won.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : rule.keep_window_size]
        winners = self.slots.part(0, best.shape[-1])
        winners.put(index[: best.shape[-1]].expand_as(best), text.take(best), won.gather(-1, best))
        if rule.window:
            newest = text.part(max(0, n - rule.window), n)
            virtual = self.length[:, :, None] - len(newest) + index[: len(newest)]  # below 0 in empty slots: still distinct
            ring = (rule.keep_window_size + virtual % rule.window).expand_as(newest.position)
            self.slots.put(ring, newest, newest.position >= 0)
        if rule.sinks:
            wanted = torch.arange(rule.sinks, device=index.device).expand(*competition.shape[:2], -1).contiguous()
            found = text.take(torch.searchsorted(text.position.contiguous(), wanted).clamp_max(n - 1))
            self.slots.part(len(self.slots) - rule.sinks, len(self.slots)).put(wanted, found, found.position == wanted)

    def _check(self, q: Tensor, new: Slots, real: Tensor | None, parameters: tuple[Tensor, ...]) -> None:
        if self.length is not None:
            require(
                len(q) == len(self.length),
                f"the cache holds {len(self.length)} batch rows, got {len(q)}: use reorder, or a new cache per batch",
            )
        require(q.shape[2] == len(new), f"each new token has one query and one key, got {q.shape[2]} and {len(new)}")
        if real is not None and real.device.type == "cpu":
            require(
                bool((real[:, 1:] >= real[:, :-1]).all()),
                "the tokens given to a cache may be padded on the left only: pass use_cache=False, or pad left",
            )
            step = self.slots is not None and q.shape[2] == 1
            require(not step or bool(real.all()), "the token of a decode step cannot be padding")
        if not torch.compiler.is_compiling():
            versions = tuple(parameter._version for parameter in parameters)
            require(
                self._versions in (None, versions),
                "A or dt_proj changed while decoding: stored scores belong to the old values, start with a new cache",
            )
            self._versions = versions


def _segments(filled: Tensor) -> Segments:
    """One document per (batch row, head), behind its empty slots; bool [B, H, N] to segments [B * H, N]."""
    return Segments.of_inputs(filled.flatten(0, 1), None)
