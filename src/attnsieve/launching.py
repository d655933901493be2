"""Launches of Triton's kernels. Triton binds, specialises and hashes every argument of every launch, which takes longer than short
kernels do; code that it compiled for arguments of one class is called here without it.

The class of an argument is what Triton compiles by: a number that is no constant is 1, a multiple of 16 or neither, of 32 bits or
more; an address is a multiple of 16 or not, of some dtype; anything else is itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

from torch import Tensor

# Triton compiles other code for numbers and addresses that are no multiples of this.
ALIGNED = 16
# Numbers of 32 and of 64 bits, with their sign.
_SHORT, _LONG = range(-(2**31), 2**31), range(-(2**63), 2**63)
_NO_CONSTANTS = repeat(False)
_listening = threading.local()
_known: dict[Callable[..., Any], _Kernel] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """Launch a Triton kernel on the current device and return its compiled code; from the second launch of arguments of one class on
    without Triton."""
    known = _known.get(kernel.fn)
    if known is None:
        known = _known[kernel.fn] = _Kernel(kernel)
    return known.launch((*grid, 1, 1)[:3], args, options)


def listen(listener: Callable[[Any, tuple[int, ...], tuple[Any, ...]], None] | None) -> None:
    """Tell the listener of every later launch of this thread through Triton: compiled code, grid, and the kernel's arguments."""
    _listening.now = listener


class _Kernel:
    """A kernel's compiled code, by device and by the classes of its arguments."""

    def __init__(self, kernel: Any) -> None:
        from triton.runtime import driver

        self._kernel, self._driver = kernel, driver
        # Kernels that are interpreted have no parameters, and no code.
        self._constants = [parameter.is_constexpr for parameter in getattr(kernel, "params", ())]
        self._names = set(kernel.arg_names)
        self._codes: dict[tuple[Any, ...], _Code] = {}

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        values = (*args, *[options[name] for name in self._kernel.arg_names[len(args) :]])
        if not self._constants or is_heard():
            return self._by_triton(grid, args, options, values)
        kind: list[Any] = [self._driver.active.get_current_device()]
        bare: list[Any] = []
        _describe(values, self._constants, kind, bare)
        for name, value in options.items():
            if name not in self._names:
                kind += (name, value)
        code = self._codes.get(key := tuple(kind))
        if code is not None:
            code.launch(grid, bare)
            return code.compiled
        compiled = self._by_triton(grid, args, options, values)
        if can_launch_directly(compiled):
            self._codes[key] = _Code(compiled)
        return compiled

    def _by_triton(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], values: tuple[Any, ...]) -> Any:
        compiled = self._kernel[grid](*args, **options)
        listener = getattr(_listening, "now", None)
        if listener is not None:
            listener(compiled, grid, values)
        return compiled


class _Code:
    """Compiled code that has been launched."""

    def __init__(self, compiled: Any) -> None:
        from triton.runtime import driver

        self.compiled = compiled
        self._run, self._middle = directly(compiled)
        self._device, self._stream = driver.active.get_current_device(), driver.active.get_current_stream

    def launch(self, grid: tuple[int, ...], bare: list[Any]) -> None:
        self._run(*grid, self._stream(self._device), *self._middle, *bare)


def _describe(values: Iterable[Any], constants: Iterable[bool], kind: list[Any], bare: list[Any]) -> None:
    """Append the classes of `values` to `kind`, and the values with addresses in place of tensors to `bare`."""
    for x, is_constant in zip(values, constants, strict=False):
        its = type(x)
        if is_constant:
            # 1, 1.0 and True are equal, and not the same constant.
            kind.append((its, x))
        elif its is int:
            kind.append(1 if x == 1 else (x % ALIGNED == 0, x in _SHORT, x in _LONG))
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            kind.append((x.dtype, address % ALIGNED == 0))
            bare.append(address)
            continue
        elif isinstance(x, tuple):
            kind.append((its, len(x)))
            own: list[Any] = []
            _describe(x, _NO_CONSTANTS, kind, own)
            x = tuple(own)
        else:
            # Numbers that are no integers are not told apart; what else there is are constants in a tuple, and None.
            kind.append(its if its is float else (its, getattr(x, "value", x)))
        bare.append(x)


def can_launch_directly(compiled: Any) -> bool:
    """Whether compiled code can be called without Triton: how that is done is no promise, so by Triton 3.6 only."""
    # Interpreted kernels have no code, compiled ones that were never launched no function.
    if not is_known_triton() or getattr(compiled, "function", None) is None:
        return False
    return not (compiled.run.global_scratch_size or compiled.run.profile_scratch_size)


def is_known_triton() -> bool:
    """Whether it is Triton 3.6: how its code is called, and Gluon, are no promises and differ between versions."""
    import triton

    return triton.__version__.split(".")[:2] == ["3", "6"]  # type: ignore[no-any-return]


def directly(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """What launches compiled code, and what it takes between (grid, stream) and the kernel's arguments."""
    run = compiled.run
    no_scratch, no_hooks = (None, None), (None, None, None)
    options = (run.launch_cooperative_grid, run.launch_pdl)
    return run.launch, (compiled.function, *options, *no_scratch, compiled.packed_metadata, *no_hooks)


def is_heard() -> bool:
    """Whether somebody listens to launches: hooks are chains with members, or what was put in their place."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(bool(getattr(hook, "calls", hook)) for hook in hooks)
