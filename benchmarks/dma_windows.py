"""Sliding windows by kernels that are compared with ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnsieve.attention import attend
from attnsieve.backends.call import Call
from attnsieve.bench.flex import compiled


def window_kernels(window: int) -> dict[str, Callable[[Call], Tensor]]:
    """Differentiable attention to the newest `window` keys of a call, by name; the layout is that window."""

    def ours(backend: str) -> Callable[[Call], Any]:
        return lambda call: attend(call.q, call.k, call.v, call.layout, scale=call.scale, backend=backend)

    def fa4(call: Call) -> Tensor:
        from flash_attn.cute.interface import flash_attn_func

        q, k, v = (tensor.transpose(1, 2) for tensor in (call.q, call.k, call.v))
        out: Tensor = flash_attn_func(q, k, v, softmax_scale=call.scale, window_size=(window - 1, 0))[0]
        return out.transpose(1, 2)

    def flex(call: Call, **options: str) -> Tensor:
        mask = flex_window(call.k.shape[2], window, call.k.device)
        rest = {"block_mask": mask, "scale": call.scale, "enable_gqa": call.group > 1, "kernel_options": options}
        out: Tensor = compiled()(call.q, call.k, call.v, **rest)
        return out

    others = {"fa4": fa4, "flex": flex, "flex-flash": partial(flex, BACKEND="FLASH")}
    return {"triton": ours("triton"), "auto": ours("auto"), **others}


@lru_cache(maxsize=1)
def flex_window(n: int, window: int, device: torch.device) -> Any:
    """A BlockMask, tile by tile: create_block_mask looks at n^2 pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    tile = 128
    index = torch.arange(-(-n // tile), device=device)
    apart = (index[:, None] - index) * tile  # rows of a tile are so many keys behind those of another
    seen, whole = (apart >= 0) & (apart - tile + 1 < window), (apart > 0) & (apart + tile - 1 < window)

    def lists(kept: Tensor) -> tuple[Tensor, Tensor]:
        order = kept.int().argsort(dim=1, descending=True, stable=True)
        return kept.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    rule = lambda b, h, i, j: (j <= i) & (i - j < window)  # noqa: E731
    return BlockMask.from_kv_blocks(*lists(seen & ~whole), *lists(whole), tile, rule, seq_lengths=(n, n))
