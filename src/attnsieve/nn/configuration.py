"""DmaConfig: a decoder in the frame of Doge whose attention is one of several methods."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from attnsieve.errors import require
from attnsieve.nn.selection import SelectionRule

# DogeConfig writes these also without experts.
_MOE_FIELDS = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef")
# Heads are split among processes; "mla" and "nsa" are computed whole by each.
_MLP_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_HEADS_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_NORMS_PLAN = {
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
_SCORES_PLAN = {"layers.*.self_attn.dt_proj": "rowwise", "layers.*.self_attn.A": "colwise"}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mla_kv_rank",
    "mla_rope_width",
    "nsa_block",
    "nsa_stride",
    "nsa_selected_block",
    "nsa_window",
)
ATTENTIONS = ("dma", "mha", "mqa", "gqa", "swa", "mla", "nsa")


@strict
class DmaConfig(PreTrainedConfig):
    """Fields, names and defaults of transformers' DogeConfig where both have them, so that Doge checkpoints load.

    attention: which attention all layers use; `keep_window_size`, `window`, `sinks`, `union`, `initial_A` and
    `exponential_bias` belong to "dma" (see `attnsieve.nn.SelectionRule` and `DynamicMaskAttention`), `sliding_window` to
    "swa", `mla_*` to "mla" (widths as in DeepSeek-V2; 0: no compression of q), `nsa_*` to "nsa" (block sizes and counts in
    tokens and blocks, as in arXiv 2502.11089). "mha" and "mqa" fix `num_key_value_heads`. qk_norm: RMSNorm of q and k per
    head. attention_backend: see `attnsieve.attend`.

    Raises UserError for sizes below 1, rates and tokens that do not exist, and combinations that no layer could honour.
    """

    model_type = "dma"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32768
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 32
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int | None = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    attention: str = "dma"
    attention_backend: str = "auto"
    keep_window_size: int = 2048
    window: int = 0
    sinks: int = 0
    union: bool = False
    initial_A: float = 0.0
    exponential_bias: bool = True
    sliding_window: int | None = None
    mla_q_rank: int = 0
    mla_kv_rank: int = 256
    mla_rope_width: int = 32
    nsa_block: int = 32
    nsa_stride: int = 16
    nsa_selected_block: int = 64
    nsa_selected: int = 16
    nsa_window: int = 512
    is_moe: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        require(self.attention in ATTENTIONS, f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        self._check_sizes()
        self._fix_heads()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_rotary()
        self._check_rates()
        self._check_tokens()
        require(
            not self.is_moe,
            "is_moe is not supported: the router of Doge's mixture of experts mixes tokens in a full pass, which leaks the "
            "future; use a checkpoint without experts",
        )
        self._check_windows()
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in _MOE_FIELDS})

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """D, of queries, keys and values."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """What transformers shards over processes (tensor parallelism), and how."""
        if self.attention in ("mla", "nsa"):
            return _MLP_PLAN
        plan = _HEADS_PLAN | (_NORMS_PLAN if self.qk_norm else {}) | (_SCORES_PLAN if self.attention == "dma" else {})
        return plan | _MLP_PLAN

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, value: object) -> None:
        """transformers 5.17 writes back what it read; the plan follows from the fields."""

    @property
    def rule(self) -> SelectionRule:
        """What a row of a "dma" layer keeps."""
        return SelectionRule(self.keep_window_size, self.window, self.sinks, self.union)

    def _check_sizes(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            require(size is None or size >= 1, f"{name} must be at least 1, got {size}")
        require(self.mla_q_rank >= 0, f"mla_q_rank must be at least 0, got {self.mla_q_rank}")

    def _check_rotary(self) -> None:
        name = "mla_rope_width" if self.attention == "mla" else "head_dim"
        width = getattr(self, name)
        require(width % 2 == 0, f"{name} must be even, since RoPE turns pairs of channels, got {width}")
        good = self.rope_parameters is None or isinstance(self.rope_parameters, dict)
        require(
            good, f'rope_parameters must be names and values such as {{"rope_theta": 10000.0}}, got {self.rope_parameters!r}'
        )

    def _check_rates(self) -> None:
        require(
            self.hidden_act in ACT2FN, f"transformers has no activation {self.hidden_act!r} (hidden_act): give one such as silu"
        )
        require(0 <= self.hidden_dropout <= 1, f"hidden_dropout must be from 0 to 1, got {self.hidden_dropout}")
        spread = self.initializer_range
        require(0 <= spread < math.inf, f"initializer_range must be a number from 0, got {spread}")

    def _check_tokens(self) -> None:
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", eos), ("pad_token_id", [self.pad_token_id])):
            require(all(token is None or type(token) is int for token in ids), f"{name} must be a whole number, got {ids[0]!r}")
        pad, tokens = self.pad_token_id, self.vocab_size
        require(
            pad is None or -tokens <= pad < tokens, f"pad_token_id must be one of the {tokens} tokens (vocab_size), got {pad}"
        )

    def _fix_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        fixed = {"mha": heads, "mqa": 1, "mla": heads}.get(self.attention)
        if kv_heads is None:
            self.num_key_value_heads = heads if fixed is None else fixed
        require(
            fixed in (None, self.num_key_value_heads),
            f"attention {self.attention!r} with {heads} heads has {fixed} KV heads, got num_key_value_heads={kv_heads}",
        )
        require(
            heads % self.kv_heads == 0,
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})",
        )
        require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"hidden_size ({self.hidden_size}) is no multiple of num_attention_heads ({heads}): give head_dim",
        )

    def _check_windows(self) -> None:
        if self.attention == "dma":
            _ = self.rule
            require(
                self.sliding_window is None,
                "sliding_window is not part of DMA here: use window for a local window, or attention='swa'",
            )
        if self.attention == "swa":
            require(
                self.sliding_window is not None and self.sliding_window > 0,
                f"attention 'swa' needs a positive sliding_window, got {self.sliding_window}",
            )
        if self.attention == "nsa":
            good = self.nsa_block % self.nsa_stride == 0 == self.nsa_selected_block % self.nsa_stride
            require(
                good and self.nsa_selected_block >= self.nsa_block,
                f"nsa_block ({self.nsa_block}) and nsa_selected_block ({self.nsa_selected_block}) must be multiples of "
                f"nsa_stride ({self.nsa_stride}), and a selected block no smaller than a compressed one",
            )
            require(
                self.nsa_selected >= 3,
                f"nsa_selected must be at least 3, the first block and a row's own two, got {self.nsa_selected}",
            )
