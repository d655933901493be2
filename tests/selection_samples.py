"""Dynamic atoms to choose by, and random inputs to choose from."""

import torch

from attnsieve import Pattern
from attnsieve.patterns import (
    antidiagonal_blocks,
    dam_online,
    dense_decode,
    dense_prefill,
    heavy_hitters,
    last_queries,
    pooled_blocks,
    probed_blocks,
    probed_keys,
    random_blocks,
    sink,
    top_blocks,
    vertical_slash,
    voted_keys,
    window,
)
from attnsieve.selection import choose

BLOCK = 16
SAMPLES = [
    vertical_slash(mass=0.8, probe=8),
    vertical_slash(mass=0.9, probe=4, strided=6),
    vertical_slash(mass=0.6, probe=8, band=8),
    dam_online(tau=0.2, mu=0.5, probe=4),
    probed_blocks(mass=0.8, block=BLOCK, rows=3),
    antidiagonal_blocks(mass=0.8, block=BLOCK, stride=4),
    pooled_blocks(ratio=0.2, block=BLOCK),
    top_blocks(2, block=BLOCK),
    probed_keys(mass=0.8, block=BLOCK, rows=3),
    sink(2) | window(5) | probed_keys(mass=0.5, block=8) | top_blocks(1, block=12),
    sink(2) | window(5) | top_blocks(1, block=BLOCK) | random_blocks(1, block=24),
    heavy_hitters(6, 5, block=BLOCK),
    voted_keys(7, probe=4, pool=3),
    window(3) | last_queries(20, block=BLOCK),
    window(2) | dense_prefill(),
    window(2) | dense_decode(),
]
VOTING = [*SAMPLES[:9], *SAMPLES[11:13]]
BLOCKWISE = SAMPLES[4:9]


def random_qk(batch, heads, kv_heads, n, width=8, scale=2.0):
    return scale * torch.randn(batch, heads, n, width), torch.randn(batch, kv_heads, n, width)


def mask(pattern, q, k, spans=None):
    """bool [Z, H, nq, nk] for one sequence per batch row."""
    layout = choose([pattern] * q.shape[1], q, k, spans=spans)
    n = k.shape[2]
    return layout.dense(torch.arange(n - q.shape[2], n), torch.arange(n))


def shared(pattern):
    return Pattern.parse(str(pattern).replace(")", ', share="kv")'))
