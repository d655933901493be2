"""What is worked out once per row of patterns, and goes with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, ref

from attnsieve.patterns import Pattern

F = TypeVar("F", bound=Callable[..., Any])


def once_per_row(build: F) -> F:
    """build(patterns, *rest), whose results are kept for as long as the first of the patterns: they may lie on a device, where
    nobody else would free them. A result must not hold the patterns."""
    results: WeakKeyDictionary[Pattern, dict[Hashable, Any]] = WeakKeyDictionary()

    @wraps(build)
    def kept(patterns: tuple[Pattern, ...], *rest: Hashable) -> Any:
        of_first = results.setdefault(patterns[0], {})
        # References are hashed once, patterns would be each time; and they let the patterns go.
        key = (tuple(map(ref, patterns)), *rest)
        if key not in of_first:
            of_first[key] = build(patterns, *rest)
        return of_first[key]

    return cast(F, kept)
