"""One attention layer, a different pattern for every head: compile once, attend in prefill and decode."""

import time

import torch

import attnsieve
from attnsieve.patterns import columns, dense, diagonals, dilated, sink, window

tokens, heads, width = 8192, 4, 64
q, k, v = (torch.randn(1, heads, tokens, width) for _ in range(3))

# A pattern is a rule without a length. It has one spelling, which parses back.
patterns = [
    sink(4) | window(128),
    columns(0, 17, 300) | window(32),
    diagonals(0, 1, 2, 64, 128),
    dilated(64, step=8) | sink(4),
]
assert [attnsieve.Pattern.parse(str(pattern)) for pattern in patterns] == patterns

# A layout is the patterns of one layer, compiled for up to `tokens` positions.
layout = attnsieve.compile_layout(patterns, tokens)
for pattern, share in zip(patterns, layout.density()[0].tolist(), strict=True):
    print(f"{share:6.2%} of the causal pairs: {pattern}")


def timed(label: str, layout: attnsieve.Layout) -> torch.Tensor:
    attnsieve.attend(q, k, v, layout)  # the first call prepares the layout's schedule
    start = time.perf_counter()
    out = attnsieve.attend(q, k, v, layout)
    print(f"{1000 * (time.perf_counter() - start):6.0f} ms {label}")
    return out


out = timed("with these patterns", layout)
timed("dense", attnsieve.compile_layout([dense()] * heads, tokens))

# The same layout serves decode: the last query of all positions.
last = attnsieve.attend(q[:, :, -1:], k, v, layout)
torch.testing.assert_close(last, out[:, :, -1:])

# Exactly the kept pairs are computed: the same numbers as softmax under the mask written out.
rows = torch.arange(512)
mask = layout.dense(rows, rows)[0]
exact = torch.nn.functional.scaled_dot_product_attention(*(x[:, :, :512] for x in (q, k, v)), attn_mask=mask)
torch.testing.assert_close(out[:, :, :512], exact)
print("equal to the mask written out")
