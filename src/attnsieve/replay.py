"""Calls whose launches are repeated: the second call of a kind is recorded, later ones launch the same code on other addresses.

A short call of many kernels takes longer to check, plan and launch than to compute. If all that it does is to allocate memory and to
launch kernels, and its sizes are those of an earlier call, then everything but addresses is known: of inputs, of the result, and of
what lies in between, for which one piece of memory is enough. Whatever else a call does shows while it is recorded, and such calls
are never repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnsieve.device import in_forward_mode, is_capturing, on_device_of, stream_of
from attnsieve.launching import ALIGNED, can_launch_directly, directly, is_heard, is_known_triton, listen

# Temporary tensors begin at multiples of this, as the allocator of torch gives them out.
_APART = 512
# Kinds that are remembered: chunks of a growing text would add up for ever.
_MOST = 64
_ALLOCATIONS = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
# How many calls of a kind there were, its replay, or None where it cannot be replayed.
_known: dict[Hashable, int | Replay | None] = {}


def repeat(rest: Hashable, inputs: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
    """run(), which computes a tensor of `inputs`, on a GPU, and of what `rest` tells; or the launches that it would make.

    Neither autograd nor torch.compile nor a CUDA graph sees anything of it: there `run` is called.
    """
    if not _can_repeat(inputs):
        return run()
    first = inputs[0]
    kind = (rest, stream_of(first), *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
    with on_device_of(first):
        known = _known.get(kind, 0)
        if isinstance(known, Replay):
            result = known(inputs)
            return run() if result is None else result
        if known == 0:
            _remember(kind, 1)
        if known != 1 or not _can_record(inputs):
            return run()
        result, replay = _record(run, inputs)
        _remember(kind, replay)
        return result


def _can_repeat(inputs: Sequence[Tensor]) -> bool:
    # A parameter is as good as a tensor; of other subclasses, and of what stands for tensors in transforms, nothing is known.
    if torch.compiler.is_compiling() or not all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda for x in inputs):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (in_forward_mode() or is_capturing(inputs[0]) or is_heard())


def _can_record(inputs: Sequence[Tensor]) -> bool:
    """One address for two tensors could be either's in another call; code for odd addresses would be slow for others."""
    addresses = {x.data_ptr() for x in inputs}
    return len(addresses) == len(inputs) and not any(address % ALIGNED for address in addresses) and is_known_triton()


def _remember(kind: Hashable, what: int | Replay | None) -> None:
    if kind not in _known and len(_known) >= _MOST:
        _known.clear()
    _known[kind] = what


def _record(run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Replay | None]:
    """run(), and what replays it if that is possible."""
    from triton import knobs

    recording = _Recording()
    knobs.runtime.launch_enter_hook.add(recording.hear)
    listen(recording.note)
    try:
        with recording:
            result = run()
    finally:
        listen(None)
        knobs.runtime.launch_enter_hook.remove(recording.hear)
    return result, Replay.of(recording, inputs, result)


class _Recording(TorchDispatchMode):
    """What a call does: memory that it allocates, kernels that it launches, and whether it does anything else."""

    def __init__(self) -> None:
        super().__init__()
        # Compiled code, grid and arguments.
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        # By address; kept, so that no address comes twice.
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.heard = 0
        self.does_more = False
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.overloadpacket in _ALLOCATIONS:
            storage = result.untyped_storage()
            self.memory[storage.data_ptr()] = storage
        elif not op.is_view:
            self.does_more = True
        return result

    def note(self, *launched: Any) -> None:
        """Keep a launch."""
        self.launches.append(launched)

    def hear(self, _: Any) -> None:
        """Triton launches a kernel, whoever asked for it."""
        self.heard += threading.get_ident() == self._thread


class _Row:
    """The arguments of all launches in one row, which later calls fill with other addresses."""

    def __init__(self, recording: _Recording, inputs: Sequence[Tensor], result: Tensor) -> None:
        self._given = {x.data_ptr(): number for number, x in enumerate((*inputs, result))}
        self._theirs = {x.untyped_storage().data_ptr() for x in (*inputs, result)}
        self._memory = recording.memory
        self._begins: dict[int, int] = {}
        storage = result.untyped_storage()
        # Beyond the result nothing is there to be written to.
        self.served = storage.data_ptr() in self._memory and storage.nbytes() == result.nbytes
        self.values: list[Any] = []
        # Places of addresses: of tensors given, and in the memory between them; and of bundles of values before them.
        self.given: list[tuple[int, int]] = []
        self.between: list[tuple[int, int]] = []
        self.bundles: list[tuple[int, Callable[[list[Any]], tuple[Any, ...]]]] = []
        self.kept: list[Tensor] = []
        self.size = 0

    def place(self, x: Any) -> int:
        """Where an argument stands."""
        value = None
        if isinstance(x, tuple):
            parts = _getter([self.place(part) for part in x])
            self.bundles.append((len(self.values), parts))
        elif isinstance(x, Tensor):
            value = self._address(x)
        else:
            self.served &= isinstance(x, int | float | str | None)
            value = x
        self.values.append(value)
        return len(self.values) - 1

    def _address(self, x: Tensor) -> int:
        place, address, begin = len(self.values), x.data_ptr(), x.untyped_storage().data_ptr()
        if address in self._given:
            self.given.append((place, self._given[address]))
        elif begin in self._theirs:
            self.served = False
        elif begin in self._memory:
            self.between.append((place, self._begin(begin) + address - begin))
        else:
            self.kept.append(x)
        return address

    def _begin(self, storage: int) -> int:
        if storage not in self._begins:
            self._begins[storage] = self.size
            self.size += -(-self._memory[storage].nbytes() // _APART) * _APART
        return self._begins[storage]


class Replay:
    """The launches of a recorded call. It keeps the tensors that neither are inputs nor were made by the call."""

    def __init__(self, recording: _Recording, row: _Row, result: Tensor) -> None:
        from triton.runtime import driver

        self._launches = []
        for compiled, grid, arguments in recording.launches:
            pick = _getter([row.place(x) for x in arguments])
            run, middle = directly(compiled)
            self._launches.append((run, grid, middle, pick))
        self._values, self._given, self._between, self._bundles = row.values, row.given, row.between, row.bundles
        self._kept, self._size = row.kept, row.size
        self._shape, self._stride, self._dtype = result.shape, result.stride(), result.dtype
        self._device, self._stream = driver.active.get_current_device(), driver.active.get_current_stream

    @classmethod
    def of(cls, recording: _Recording, inputs: Sequence[Tensor], result: Tensor) -> Replay | None:
        """None where the call did more than to allocate and to launch, or its code cannot be called directly."""
        if recording.does_more or recording.heard != len(recording.launches):
            return None
        if not all(can_launch_directly(compiled) for compiled, _, _ in recording.launches):
            return None
        row = _Row(recording, inputs, result)
        replay = cls(recording, row, result)
        return replay if row.served else None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """The result; None if the code does not serve the addresses of these inputs."""
        addresses = [x.data_ptr() for x in inputs]
        for address in addresses:
            if address % ALIGNED:
                return None
        result = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=inputs[0].device)
        addresses.append(result.data_ptr())
        room = torch.empty(self._size, dtype=torch.uint8, device=result.device)
        begin, values = room.data_ptr(), self._values.copy()
        for place, number in self._given:
            values[place] = addresses[number]
        for place, offset in self._between:
            values[place] = begin + offset
        for place, parts in self._bundles:
            values[place] = parts(values)
        stream = self._stream(self._device)
        for run, grid, middle, pick in self._launches:
            run(*grid, stream, *middle, *pick(values))
        return result


def _getter(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Takes the values at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
