"""Launches that are repeated. Triton binds and specialises every argument at every launch, which takes longer than short kernels do.

Compiled code depends on which numbers are 1, multiples of 16 or beyond 32 bits, and on which addresses are multiples of 16. So the
code of one launch serves another whose numbers are the same, or multiples of 16 where they were, and whose addresses all are.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime import driver

from attnsieve.launching import can_launch_directly, directly, is_heard, launch

_ALIGNED = 16
_BEYOND = 2**31


class Launch:
    """A kernel with its grid of three numbers and its last arguments, which stay; it is called with the first ones, which change.

    Those are tensors, None, and tuples of tensors followed by numbers (`Rows`, `Places`), always of the same kinds and dtypes. The
    first two launches are Triton's, later ones call the compiled code where it serves. Objects of this class may be used by several
    threads and streams, on the device of their first use.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], *last: Any, **options: Any) -> None:
        self._kernel, self._grid, self._last, self._options = kernel, grid, last, options
        self._code: _Code | None = None
        self._repeated = False

    def __call__(self, *first: Any) -> None:
        if self._code is not None and self._code.launch(first):
            return
        compiled = launch(self._kernel, self._grid, *first, *self._last, **self._options)
        # Many are launched once: preparing to launch them again would be in vain.
        if self._repeated and self._code is None:
            self._code = self._known(compiled, first)
        self._repeated = True

    def _known(self, compiled: Any, first: tuple[Any, ...]) -> _Code | None:
        """The code that was launched; None where it cannot be called again."""
        if not can_launch_directly(compiled) or not all(map(_is_aligned, first)):
            return None
        names = self._kernel.arg_names[len(first) + len(self._last) :]
        return _Code(compiled, self._grid, first, (*self._last, *(self._options[name] for name in names)))


class _Code:
    """Compiled code for arguments like `first`, followed by `last`. It is called with addresses in place of tensors."""

    def __init__(self, compiled: Any, grid: tuple[int, int, int], first: tuple[Any, ...], last: tuple[Any, ...]) -> None:
        self._run, self._middle = directly(compiled)
        self._grid = grid
        self._device, self._stream = driver.active.get_current_device(), driver.active.get_current_stream
        self._numbers = [_numbers(x) for x in first]
        self._last = tuple(map(_bare, last))
        self._same: tuple[Any, Any] = (None, None)

    def launch(self, first: tuple[Any, ...]) -> bool:
        """Launch it unless it was compiled for other arguments, or somebody listens to launches; whether it was."""
        if is_heard():
            return False
        bare: list[Any] = []
        bits = 0
        for x, numbers in zip(first, self._numbers, strict=True):
            if x is None:
                bare.append(None)
            elif not numbers:
                bare.append(address := x.data_ptr())
                bits |= address
            elif len(x) > len(numbers) + 1:
                many = self._many(x, numbers)
                if many is None:
                    return False
                bare.append(many)
            elif (own := x[1:]) == numbers or _alike(own, numbers):
                bare.append((address := x[0].data_ptr(), *own))
                bits |= address
            else:
                return False
        if bits % _ALIGNED:
            return False
        self._run(*self._grid, self._stream(self._device), *self._middle, *bare, *self._last)
        return True

    def _many(self, x: tuple[Any, ...], numbers: tuple[int, ...]) -> Any:
        """A bundle of several tensors with addresses in their place, None if the code does not serve it; the same one often
        comes again."""
        same, bare = self._same
        if same is not x:
            own, bits = x[-len(numbers) :], 0
            addresses = [tensor.data_ptr() for tensor in x[: -len(numbers)]]
            for address in addresses:
                bits |= address
            served = bits % _ALIGNED == 0 and (own == numbers or _alike(own, numbers))
            bare = (*addresses, *own) if served else None
            self._same = x, bare
        return bare


def _numbers(x: Any) -> tuple[int, ...]:
    """The numbers at the end of a bundle."""
    return tuple(part for part in x if isinstance(part, int)) if isinstance(x, tuple) else ()


def _alike(numbers: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether Triton compiles the same code for both."""
    return all(
        a == b or (a % _ALIGNED == b % _ALIGNED == 0 and max(a, b) < _BEYOND) for a, b in zip(numbers, others, strict=True)
    )


def _is_aligned(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(_is_aligned, x))
    return not isinstance(x, Tensor) or x.data_ptr() % _ALIGNED == 0


def _bare(x: Any) -> Any:
    """The argument with addresses in place of tensors; whoever launches keeps the tensors."""
    if isinstance(x, tuple):
        return tuple(map(_bare, x))
    return x.data_ptr() if isinstance(x, Tensor) else x
