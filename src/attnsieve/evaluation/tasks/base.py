"""Task: items from a seed, what the model makes of one item, and the numbers that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attnsieve.plan import Plan


class Task:
    """One kind of question. `evaluate` asks for items once and then, dense and under every plan, observes each of them.

    name: as it stands in rows. variant: the text or data that items are made of, where there is a choice.
    """

    name: str
    variant: str = ""

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Any]:
        """`count` items of at most `length` tokens, the answer included; the same ones for the same seed. Raises UserError
        for a length that is too short, or for a source that holds too little."""
        raise NotImplementedError

    def ids(self, tokenizer: Any, item: Any) -> list[int]:
        """Token ids of the item's text."""
        raise NotImplementedError

    def tokens(self, tokenizer: Any, item: Any) -> int:
        """How many positions of a model the item takes at most, the answer included. Tasks that fill the length leave room for it."""
        return len(self.ids(tokenizer, item))

    def observe(self, model: Any, tokenizer: Any, item: Any) -> Any:
        """What the model, dense or under a plan, makes of one item: the measures by name, unless `measure` makes them."""
        raise NotImplementedError

    def observe_all(self, model: Any, tokenizer: Any, items: Sequence[Any]) -> Iterator[Any]:
        """`observe` of every item, in order; several at once where a task can."""
        return (self.observe(model, tokenizer, item) for item in items)

    def measure(self, seen: Any, dense: Any) -> dict[str, float]:
        """Measures of one item, from what was seen under a plan and what was seen dense (the same object for dense)."""
        return dict(seen)

    def inspect(self, model: Any, plan: Plan | None, item: Any) -> dict[str, float]:
        """Measures that need the plan (None: dense attention) but no run under it; none for most tasks."""
        return {}
