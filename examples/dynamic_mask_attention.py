"""Trainable sparsity: a layer that learns which keys to keep, and decodes in constant memory."""

import torch

from attnsieve.nn import DynamicMaskAttention

torch.manual_seed(0)
batch, heads, kv_heads, tokens, width = 2, 8, 2, 512, 32
layer = DynamicMaskAttention(kv_heads, width, keep_window_size=64, initial_A=0.5)
q = torch.randn(batch, heads, tokens, width)
k, v = (torch.randn(batch, kv_heads, tokens, width) for _ in range(2))

# In place of scaled_dot_product_attention(q, k, v, is_causal=True); gradients reach the scores through the kept keys.
out = layer(q, k, v)
out.square().mean().backward()
print({name: f"gradient norm {parameter.grad.norm():.2e}" for name, parameter in layer.named_parameters()})

# Decode one token at a time: the cache never holds more than it can still need.
cache = layer.cache()
with torch.no_grad():
    steps = [layer(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], cache=cache) for t in range(tokens)]
torch.testing.assert_close(torch.cat(steps, dim=2), out, atol=1e-5, rtol=1e-4)
print("decoding equals the whole pass")
