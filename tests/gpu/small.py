"""Every Triton kernel once on small odd shapes: `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m tests.gpu.small`.

Without torch's own allocator each tensor is an allocation, so that reading or writing behind one shows. Run it once without
the sanitizer first, which compiles the kernels faster; `--kernel-name-exclude kns=at6native --kernel-name-exclude kns=cub` leaves
out torch's own kernels: 20 seconds instead of minutes. Tools: memcheck, racecheck, initcheck, synccheck. On Hopper GPUs racecheck
names the bytes by which Triton's warp specialisation tells warps what to run, written and read around a barrier (docs/KERNELS.md).
"""

from __future__ import annotations

import torch

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends.fa4.copies import KeysInFront
from attnsieve.bench.masks import selected
from attnsieve.layout import Layout
from attnsieve.patterns import (
    Pattern,
    antidiagonal_blocks,
    columns,
    dam_online,
    diagonals,
    empty,
    probed_blocks,
    probed_keys,
    random_blocks,
    sink,
    vertical_slash,
    voted_keys,
    window,
)
from attnsieve.ragged import Kept, RaggedStore
from attnsieve.selection import choose
from attnsieve.selection.sequence import fewest_with_mass
from tests.laws.samples import dam

N = 197
DTYPE = torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = [
    sink(2) | window(9),
    dam(20, (0, 7), (0, 1, 6)),
    diagonals(0, 40, 90) | columns(*range(3, 190, 11)),
    random_blocks(1, block=64),
    empty(),
]
CHOICES = [
    vertical_slash(mass=0.7, probe=70, strided=3),
    dam_online(tau=0.4, probe=16),
    voted_keys(40, probe=150),
    probed_keys(mass=0.7, block=64, rows=3),
    probed_blocks(mass=0.7, block=48),
    antidiagonal_blocks(mass=0.7, block=32, stride=4),
]


def layouts() -> list[Layout]:
    """One per kind of list: tiles with every predicate, single keys with tiles, keys alone."""
    mixed = [compile_layout([head] * 2, N, DEVICE) for head in HEADS]
    return [*mixed, selected(N, 2, DEVICE, 50)]


def whole(layout: Layout, width: int = 64) -> None:
    """Forward and backward, with a key bias."""
    q = torch.randn(1, 4, N, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    k, v = (torch.randn(1, 2, N, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 2, N, device=DEVICE, requires_grad=True)
    attend(q, k, v, layout, key_bias=bias, backend="triton").sum().backward()


def parts(layout: Layout) -> None:
    """A decode step, a chunk and packed documents."""
    q, k, v = (torch.randn(1, heads, N, 64, device=DEVICE, dtype=DTYPE) for heads in (4, 2, 2))
    for rows in (1, 33):
        attend(q[:, :, -rows:], k, v, layout, backend="triton")
    attend(q, k, v, layout, spans=Spans.packed([100, 1, 90], device=DEVICE), backend="triton")


def choices(pattern: Pattern) -> None:
    """Keys chosen from the input (by kernels on a GPU only), prefill and a decode step."""
    q, k, v = (torch.randn(2, heads, N, 64, device=DEVICE, dtype=DTYPE) for heads in (4, 2, 2))
    for queries in (q, q[:, :, -1:]):
        attend(queries, k, v, choose([pattern] * 4, queries, k), backend="triton")


def step(row: list[Pattern]) -> None:
    """A decode step from ragged storage."""
    q, k, v = (torch.randn(2, heads, N, 64, device=DEVICE, dtype=DTYPE) for heads in (len(row), 2, 2))
    kept = Kept.of(row, 2, 300)
    store = RaggedStore(kept, kept.index(DEVICE, 100), k, v)
    store.fill(k[:, :, :-1], v[:, :, :-1], (0, 50), 0)
    store.step(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], 0.125, "triton")


def scattered(width: int) -> None:
    """Diagonals that lie alone, in a chunk."""
    layout = compile_layout([window(9) | diagonals(*range(7, 1050, 61))] * 2, 1061, DEVICE)
    q, k, v = (torch.randn(1, heads, 1061, width, device=DEVICE, dtype=DTYPE) for heads in (4, 2, 2))
    attend(q[:, :, -301:], k, v, layout, key_bias=k[..., 0].float(), backend="triton")


def copied() -> None:
    """Columns in front of K, some of positions that are still to come."""
    k = torch.randn(2, N, 3, 40, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    KeysInFront(k.shape, torch.randint(N + 50, (3, 128), dtype=torch.int32, device=DEVICE))(k)


def main() -> None:
    """Run everything."""
    for layout in layouts():
        whole(layout)
        parts(layout)
    # Hopper GPUs have a prefill kernel for this width.
    whole(layouts()[-1], width=128)
    for pattern in CHOICES:
        choices(pattern)
    # A row longer than those that stay in registers.
    fewest_with_mass(torch.rand(3, 9001, device=DEVICE), 0.7)
    step([HEADS[0], HEADS[2], HEADS[2], HEADS[4]])
    scattered(64)
    scattered(128)
    copied()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
