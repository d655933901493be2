"""The exact decode cache of one DMA layer: as many slots as a row can keep, however long the text."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from attnsieve.attention import attend
from attnsieve.errors import require
from attnsieve.layout import Layout
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule, competition_ends, strict_key
from attnsieve.nn.slots import EMPTY, Slots


class BoundedCache:
    """Keys of one layer that a later row can still keep; attention over them equals attention over the whole text.

    Slots per batch row and KV head: [0, w) winners of the competition, [w, w + window) the newest keys as a ring,
    [w + window, w + window + sinks) the first keys, and one last slot for what is not kept. A key may sit in two of them
    and is attended to once.

    Exact because a key's score depends on its own token only and is never revised, so the order is strict and a key that
    has lost never returns. Hence the conditions, checked where that costs nothing: the rule, the batch size and the
    parameters behind the scores stay as they were (`parameters` of `attend`: in-place changes are noticed); scores are
    stored, not recomputed; the tokens of a row come in order. A key that has lost is gone, so tokens can be taken back only
    while the cache is recording (see `record`); copy the cache to branch. Remembered keys carry no gradient.
    """

    def __init__(self, rule: SelectionRule) -> None:
        self.rule = rule
        self.seen = 0  # tokens given, padding included
        self.slots: Slots | None = None
        self.length: Tensor | None = None  # int64 [B, 1], positions so far
        self._versions: tuple[int, ...] | None = None
        self._snapshot: BoundedCache | None = None  # a copy to go back to, and the tokens given since
        self._since: Slots | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        sigma: Tensor,
        *,
        real: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
        parameters: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Attention of the next T tokens, which are then remembered: a prefill, a chunk or a step. [B, Hq, T, Dv].

        q [B, Hq, T, D]; k, v [B, Hkv, T, ...]; bias, sigma [B, Hkv, T] of `key_scores`. `real` bool [B, T]: False for left
        padding, whose outputs are 0; the token of a single step after the first call is always real. `backend` computes
        prefill and chunks. Raises UserError when a condition of this class is broken.
        """
        self._check(q, k, real, parameters)
        if self.length is None:
            self.length = torch.zeros(len(q), 1, dtype=torch.int64, device=q.device)
        if self.slots is not None and q.shape[2] == 1:
            new = Slots(k, v, bias, strict_key(sigma, self.length[:, None])).map(torch.Tensor.detach)
            self._record(new)
            out = self._step(q, new, scale)
        else:
            count = torch.ones_like(q[:, 0, :, 0], dtype=torch.int64) if real is None else real.long()
            position = torch.where(count > 0, self.length + count.cumsum(1) - 1, -1)
            new = Slots.scored(k, v, bias, sigma, position)
            self._record(new.map(torch.Tensor.detach))
            out = self._chunk(q, new, scale, backend)
            out = out if real is None else out.masked_fill(~real[:, None, :, None], 0.0)
        self.seen += q.shape[2]
        return out

    def reorder(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, int64 [rows], in that order: beams, repeats, finished rows."""
        move = lambda tensor: tensor.index_select(0, rows.to(tensor.device))  # noqa: E731
        if self.slots is not None and self.length is not None:
            self.slots, self.length = self.slots.map(move), move(self.length)
        if self._snapshot is not None:
            self._snapshot.reorder(rows)
        if self._since is not None:
            self._since = self._since.map(move)

    def reset(self) -> None:
        """Forget everything; stop recording."""
        self.seen, self.slots, self.length, self._versions = 0, None, None, None
        self.stop_recording()

    def record(self) -> None:
        """From here on `take_back` works. Costs a second set of slots, and memory for every token until `take_back`."""
        snapshot = copy.copy(self)
        snapshot.slots = None if self.slots is None else self.slots.map(torch.Tensor.clone)  # steps write in place
        snapshot._snapshot = snapshot._since = None
        self._snapshot, self._since = snapshot, None

    @property
    def recording(self) -> bool:
        """Whether tokens that come now can be taken back."""
        return self._snapshot is not None

    def stop_recording(self) -> None:
        """Free what `take_back` needs."""
        self._snapshot, self._since = None, None

    def take_back(self, tokens: int) -> None:
        """Undo the last `tokens` tokens, exactly; what came before can no longer be taken back.

        Raises UserError unless that many came since `record` or the last `take_back`.
        """
        since = 0 if self._since is None else len(self._since)
        require(
            self._snapshot is not None and 0 <= tokens <= since,
            f"a bounded cache can take back the {since} tokens it has recorded, not {tokens}: call record() before they come "
            "(DmaCache: activate_past_recording()), or decode with a DynamicCache",
        )
        if tokens and self._snapshot is not None and self._since is not None and self.length is not None:
            kept, snapshot = self._since.part(0, since - tokens), self._snapshot
            self.slots, self.seen = snapshot.slots, snapshot.seen + len(kept)
            self.length = torch.zeros_like(self.length) if snapshot.length is None else snapshot.length
            if len(kept):
                text = self._text(kept)
                self._remember(text, _compete(text, self.rule)[0].view_as(text.order), kept)
        self.record()

    @property
    def nbytes(self) -> int:
        """Memory of everything remembered, in bytes; while nothing is recorded it does not grow."""
        slots = [part for part in (self.slots, self._since) if part is not None]
        recorded = 0 if self._snapshot is None else self._snapshot.nbytes
        return recorded + sum(tensor.nbytes for part in slots for tensor in part.tensors())

    def _record(self, new: Slots) -> None:
        if self._snapshot is not None:
            self._since = new if self._since is None else self._since.join(new)

    def _step(self, q: Tensor, new: Slots, scale: float | None) -> Tensor:
        rule, slots, spare = self.rule, self.slots, self.rule.slots
        assert slots is not None
        assert self.length is not None
        length = self.length[:, None].expand_as(new.order)
        candidate = new
        if rule.window:
            ring = rule.keep_window_size + length % rule.window
            candidate = new if rule.union else slots.take(ring)
            slots.put(ring, new)
        worst, slot = slots.order[..., : rule.keep_window_size].min(dim=-1, keepdim=True)
        slots.put(torch.where(candidate.order > worst, slot, spare), candidate)
        if rule.sinks:
            slots.put(torch.where(length < rule.sinks, spare - rule.sinks + length, spare), new)
        self.length = self.length + 1
        return _attend_to_all(q, slots, self._once(), scale)

    def _once(self) -> Tensor:
        """bool [B, H, N]: filled slots, each key in one slot only."""
        assert self.slots is not None
        assert self.length is not None
        rule = self.rule
        once = self.slots.filled
        once[..., rule.slots] = False
        if rule.sinks or rule.union:
            position, winners, others = self.slots.position, rule.keep_window_size, rule.slots - rule.sinks
            once[..., :others] &= position[..., :others] >= rule.sinks
            if rule.union:
                once[..., :winners] &= position[..., :winners] < self.length[:, None] - rule.window
        return once

    def _chunk(self, q: Tensor, new: Slots, scale: float | None, backend: str) -> Tensor:
        """Old and new keys in order of position are a short text whose last rows are the new ones."""
        text = self._text(new)
        competition, segments = _compete(text, self.rule)
        end = self.rule.widen(competition, segments).view_as(text.order)
        layout = Layout(len(text), end, most_keys=self.rule.slots)
        out = attend(q, text.key, text.value, layout, scale=scale, key_bias=text.bias, backend=backend)
        assert isinstance(out, Tensor)
        self._remember(text.map(torch.Tensor.detach), competition.view_as(text.order), new)
        return out

    def _text(self, new: Slots) -> Slots:
        """Every remembered key once and the new ones, in order of position, empty slots and padding first."""
        if self.slots is not None:
            old = self.slots.map(torch.Tensor.clone)
            old.order.masked_fill_(~self._once(), EMPTY)
            new = old.join(new)
        return new.take(new.position.argsort(dim=-1, stable=True))

    def _remember(self, text: Slots, competition: Tensor, new: Slots) -> None:
        """Refill the slots from a text that ends with the new tokens."""
        assert self.length is not None
        rule, n, position = self.rule, len(text), text.position
        slots, spare = text.empty(rule.slots + 1), rule.slots
        index = torch.arange(n, device=competition.device)
        entered = n if rule.union else n - rule.window  # list positions that have competed
        won = (index < entered) & (competition >= entered) & (position >= 0)
        place = torch.where(won, won.cumsum(-1) - 1, spare)
        slots.put(place, text)
        if rule.window:
            newest = (index >= n - rule.window) & (position >= 0)
            slots.put(torch.where(newest, rule.keep_window_size + position % rule.window, spare), text)
        if rule.sinks:
            first = (position >= 0) & (position < rule.sinks)
            slots.put(torch.where(first, spare - rule.sinks + position, spare), text)
        self.slots = slots
        self.length = self.length + new.filled[:, 0].sum(-1, keepdim=True)

    def _check(self, q: Tensor, k: Tensor, real: Tensor | None, parameters: tuple[Tensor, ...]) -> None:
        if self.length is not None:
            require(
                len(q) == len(self.length),
                f"the cache holds {len(self.length)} batch rows, got {len(q)}: use reorder, or a new cache per batch",
            )
        require(q.shape[2] == k.shape[2], f"each new token has one query and one key, got {q.shape[2]} and {k.shape[2]}")
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


def _compete(text: Slots, rule: SelectionRule) -> tuple[Tensor, Segments]:
    """Ends of the competition [B * H, 1, N], and the document that each row and head is, behind its empty slots."""
    segments = Segments.of_inputs(text.filled.flatten(0, 1), None)
    return competition_ends(text.sigma.flatten(0, 1)[:, None], rule.keep_window_size, segments), segments


def _attend_to_all(q: Tensor, slots: Slots, filled: Tensor, scale: float | None) -> Tensor:
    """One query per head over every filled slot: a short dense row, for which a few library calls are the fastest way."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(1, (slots.key.shape[1], -1)).squeeze(3).to(work)
    scores = grouped @ slots.key.to(work).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores + slots.bias.to(work)[:, :, None]).masked_fill(~filled[:, :, None], -torch.inf)
    out: Tensor = scores.softmax(-1) @ slots.value.to(work)
    return out.flatten(1, 2)[:, :, None].to(q.dtype)
