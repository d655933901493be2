"""Tensor parallelism of DMA: each process holds some KV heads, but a score reads the values of all of them."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard


def own(vector: Tensor) -> Tensor:
    """[H] of this process's heads out of a DTensor of all heads; any other tensor as it is."""
    return vector.redistribute(placements=[Shard(0)]).to_local() if isinstance(vector, DTensor) else vector


def sum_for_own_heads(part: Tensor, weight: DTensor) -> Tensor:
    """[B, n, H of this process], summed over the processes, from each one's share [B, n, H of all] of a product with `weight`.

    The gradient of the share is that of all heads.
    """
    summed: Tensor = DTensor.from_local(part, weight.device_mesh, [Partial()], run_check=False)
    return summed.redistribute(placements=[Shard(2)]).to_local()  # type: ignore[attr-defined, no-any-return]
