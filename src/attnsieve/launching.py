"""Launches of Triton's kernels. Triton binds, specialises and hashes every argument of every launch, which takes longer than short
kernels do; code that it compiled for arguments of one class is called here without it.

The class of an argument is what Triton compiles by, and Triton itself is asked for it: a number is 1, a multiple of 16 or neither, of
32 bits or more; an address is a multiple of 16 or not, of some dtype; a constant is itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

# Triton compiles other code for numbers and addresses that are no multiples of this.
ALIGNED = 16
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
        self._kernel = kernel
        # Kernels that are interpreted have no parameters, and no code.
        constant = [parameter.is_constexpr for parameter in getattr(kernel, "params", ())]
        self._is_compiled = bool(constant) and is_known_triton()
        self._constants = [place for place, is_constant in enumerate(constant) if is_constant]
        self._others = [place for place, is_constant in enumerate(constant) if not is_constant]
        self._codes: dict[tuple[Any, ...], _Code] = {}

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        names = self._kernel.arg_names[len(args) :]
        values = (*args, *[options[name] for name in names])
        if not self._is_compiled or is_heard():
            return self._by_triton(grid, args, options, values)
        kind = self._kind(values, [option for option in options.items() if option[0] not in names])
        code = self._codes.get(kind)
        if code is not None:
            code.launch(grid, values)
            return code.compiled
        compiled = self._by_triton(grid, args, options, values)
        if can_launch_directly(compiled):
            self._codes[kind] = _Code(compiled)
        return compiled

    def _kind(self, values: tuple[Any, ...], options: list[tuple[str, Any]]) -> tuple[Any, ...]:
        """What Triton compiles by."""
        from triton._C.libtriton import native_specialize_impl
        from triton.runtime import driver

        device = driver.active.get_current_device()
        backend = self._kernel.device_caches[device][3]
        constants = [values[place] for place in self._constants]
        others = tuple([values[place] for place in self._others])
        # 1, 1.0 and True are equal, and not the same constant.
        types = map(type, constants)
        return (device, native_specialize_impl(backend, others, False, True, True), *constants, *types, *options)

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

    def launch(self, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self._run(*grid, self._stream(self._device), *self._middle, *values)


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
    from triton.knobs import runtime

    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))
