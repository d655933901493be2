"""Native sparse attention (arXiv 2502.11089): compressed blocks, selected blocks and a sliding window, gated.

A plain, exact torch implementation for comparisons: O(n^2) time, a chunk of queries at a time. l, d: `nsa_block`,
`nsa_stride`; l': `nsa_selected_block`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from attnsieve.errors import require
from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.layers.base import Pass, causal_attention, join_heads, refuse_dropout, split_heads

QUERIES = 256  # rows whose masks are in memory at once


class Compressor(nn.Module):
    """phi of Eq. 7: an MLP of l tokens with a learned position each. [B, H, T, D] to [B, H, M, D], M whole blocks."""

    def __init__(self, width: int, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.position = nn.Parameter(torch.zeros(block, width))
        self.up = nn.Linear(block * width, width)
        self.down = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Block m covers the tokens [m d, m d + l); no block at all for fewer than l tokens."""
        if tokens.shape[2] < self.block:
            return tokens[:, :, :0]
        blocks = tokens.unfold(2, self.block, self.stride).transpose(-1, -2) + self.position
        compressed: Tensor = self.down(F.gelu(self.up(blocks.flatten(-2))))
        return compressed


class NativeSparseAttention(nn.Module):
    """hidden [B, T, hidden size] to the same; each branch has keys and values of its own (Eq. 5).

    Our readings where the paper is silent: the compression branch carries no RoPE (its blocks know their inner positions),
    the compressing MLP has one hidden layer of width D and is shared by the heads, the gates are one linear layer.
    """

    def __init__(self, config: DmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads, width, bias = config.num_attention_heads, config.kv_heads, config.head_width, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, 3 * kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, 3 * kv_heads * width, bias=bias)
        self.gate_proj = nn.Linear(config.hidden_size, 3 * heads, bias=True)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=bias)
        self.q_norm = LlamaRMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.compress_k = Compressor(width, config.nsa_block, config.nsa_stride)
        self.compress_v = Compressor(width, config.nsa_block, config.nsa_stride)

    def forward(self, hidden: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        """The layer's output. Raises UserError for padded or packed input: blocks are counted from the first slot."""
        refuse_dropout(self.config, self.training)
        require(now.segments is None, "attention 'nsa' takes unpadded rows of one document each")
        width = self.config.head_width
        q = self.q_norm(split_heads(self.q_proj(hidden), width))
        k = self.k_norm(split_heads(self.k_proj(hidden), width))
        v = split_heads(self.v_proj(hidden), width)
        q_rope, k_rope = apply_rotary_pos_emb(q, k[:, self.config.kv_heads :], now.cos, now.sin)
        k = torch.cat([k[:, : self.config.kv_heads], k_rope], dim=1)
        q, q_rope, k = q.to(v.dtype), q_rope.to(v.dtype), k.to(v.dtype)  # under autocast norms and RoPE return float32
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        branches = torch.stack(self._branches(q, q_rope, k.chunk(3, dim=1), v.chunk(3, dim=1)), dim=-1)
        gates = self.gate_proj(hidden).sigmoid().unflatten(-1, (-1, 1, 3)).transpose(1, 2)
        mixed: Tensor = self.o_proj(join_heads((branches * gates).sum(-1)))
        return mixed

    def _branches(self, q: Tensor, q_rope: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> list[Tensor]:
        """Compression, selection and window, each [B, Hq, T, D]."""
        compressed_k, compressed_v = self.compress_k(k[0]), self.compress_v(v[0])
        past, parts = k[0].shape[2] - q.shape[2], []
        # Repeated keys, not enable_gqa: on a GPU torch's kernels take a mask or grouped heads, its plain path is slow.
        own_k, own_v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k[1], v[1]))
        for first, some in zip(range(past, past + q.shape[2], QUERIES), q.split(QUERIES, dim=2), strict=True):
            rows = torch.arange(first, first + some.shape[2], device=q.device)
            compressed, weights = self._compression(some, rows, compressed_k, compressed_v)
            chosen = self.choose_blocks(weights, rows, k[1].shape[2])
            rotated = q_rope[:, :, first - past : first - past + QUERIES]
            parts.append((compressed, self._selection(rotated, rows, chosen, own_k, own_v)))
        compression, selection = (torch.cat(branch, dim=2) for branch in zip(*parts, strict=True))
        window = causal_attention(
            q_rope, k[2], v[2], None, window=self.config.nsa_window, backend=self.config.attention_backend
        )
        return [compression, selection, window]

    def _compression(self, q: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, C, D] and attention weights [B, Hkv, G, C, M] over the blocks that end at or before each row."""
        grouped = q.unflatten(1, (k.shape[1], -1))
        last = torch.arange(k.shape[2], device=q.device) * self.config.nsa_stride + self.config.nsa_block - 1
        visible = last <= rows[:, None]
        scores = (grouped @ k[:, :, None].mT * q.shape[-1] ** -0.5).masked_fill(~visible, torch.finfo(q.dtype).min)
        weights = scores.softmax(-1) * visible  # early rows see no block: their branch is 0
        return (weights @ v[:, :, None]).flatten(1, 2), weights

    @torch.no_grad()
    def choose_blocks(self, weights: Tensor, rows: Tensor, slots: int) -> Tensor:
        """bool [B, Hkv, C, blocks]: the selected blocks of each row, shared by the query heads of a group (Eq. 9 to 12).

        A block's importance is the weight of the compressed blocks, times the strides they share with it. The first block
        and the row's own two are always among the `nsa_selected`; a choice has no gradient.
        """
        size, stride = self.config.nsa_selected_block, self.config.nsa_stride
        blocks = -(-slots // size)
        strides = torch.arange(weights.shape[-1], device=rows.device)[:, None] + torch.arange(
            self.config.nsa_block // stride, device=rows.device
        )
        shared = F.one_hot(strides * stride // size, blocks).sum(1).to(weights.dtype)
        importance = weights.sum(2) @ shared
        index, own = torch.arange(blocks, device=rows.device), (rows // size)[:, None]
        importance = importance.masked_fill((index == 0) | (index == own) | (index == own - 1), torch.inf)
        importance = importance.masked_fill(index > own, -torch.inf)
        best = importance.topk(min(self.config.nsa_selected, blocks), dim=-1).indices
        return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, best, True) & (index <= own)

    def _selection(self, q: Tensor, rows: Tensor, chosen: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Hq, C, D]: attention to the tokens of the chosen blocks; k and v have Hq heads."""
        index = torch.arange(k.shape[2], device=q.device)
        mask = chosen[..., index // self.config.nsa_selected_block] & (index <= rows[:, None])
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
