"""DmaForCausalLM: a decoder in the frame of Doge (transformers) for DMA and the layers it is compared with.

A layer computes x = input_residual * x + attention(norm(x)), then x = post_attention_residual * x + mlp(norm(x)). Norms,
MLP and RoPE are transformers' Llama modules.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from attnsieve.errors import require
from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.generation import DmaCache
from attnsieve.nn.layers import LAYERS, DmaAttention, Pass
from attnsieve.nn.segments import Segments


class DmaDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a scaled residual."""

    def __init__(self, config: DmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LAYERS[config.attention](config, layer_idx)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden: Tensor, now: Pass, past_key_values: Cache | None = None) -> Tensor:
        """[B, T, hidden size] to the same."""
        attended = self.self_attn(self.input_layernorm(hidden), now, past_key_values)
        hidden = self.input_residual * hidden + self._dropout(attended)
        return self.post_attention_residual * hidden + self._dropout(self.mlp(self.post_attention_layernorm(hidden)))

    def _dropout(self, update: Tensor) -> Tensor:
        return F.dropout(update, p=self.hidden_dropout, training=self.training)


class DmaPreTrainedModel(PreTrainedModel):
    """Flags and initialisation. Attention is computed by `attnsieve.attend`, not by transformers' attention functions."""

    config: DmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DmaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": DmaDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DmaAttention):
            init.constant_(module.A, self.config.initial_A)
        elif isinstance(module, DmaDecoderLayer):
            init.ones_(module.input_residual)
            init.ones_(module.post_attention_residual)


class DmaModel(DmaPreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: DmaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DmaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(_rotary_config(config))  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As in transformers' decoders. `attention_mask` [B, past + T]: 1 real, 0 padding, on either side (on the left with a
        `DmaCache`). `position_ids` [B, T] that restart without a cache mark packed documents.

        Raises UserError for 4-D masks, masks of another length, and arguments that nothing here would honour.
        """
        _refuse_unknown(kwargs)
        require((input_ids is None) != (inputs_embeds is None), "give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None and not self.training:
            past_key_values = new_cache(self.config)
        require(
            not isinstance(past_key_values, StaticCache),
            "static caches are not supported: their unwritten slots would be attended to; use DmaCache or DynamicCache",
        )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        segments = _segments(attention_mask, position_ids, hidden, past, isinstance(past_key_values, DmaCache))
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        cos, sin = self.rotary_emb(hidden, position_ids)
        now = Pass(cos, sin, segments)
        for layer in self.layers:
            hidden = layer(hidden, now, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class DmaForCausalLM(DmaPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head. `DmaForCausalLM.from_pretrained` also reads Doge checkpoints without experts."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DmaConfig) -> None:
        super().__init__(config)
        self.model = DmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """logits [B, T, vocabulary] (the last `logits_to_keep`, all at 0); loss over `labels` [B, T], -100 ignored.

        A cache is made for generation only: not in training mode, nor with labels.
        """
        if labels is not None and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> bool:
        """generate()'s own cache, where the user asked for none in particular, is the bounded one."""
        asked = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        if not asked and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = new_cache(self.config)
            if getattr(generation_config, "is_assistant", False):  # its drafts are taken back where they are not accepted
                cache.activate_past_recording()
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def new_cache(config: DmaConfig) -> Cache:
    """An empty cache: bounded for "dma", transformers' dynamic one (sliding for "swa") otherwise."""
    return DmaCache(config) if config.attention == "dma" else DynamicCache(config=config)


def _rotary_config(config: DmaConfig) -> DmaConfig:
    """MLA rotates a part of its own of each head."""
    if config.attention == "mla":
        config = copy.deepcopy(config)
        config.head_dim = config.mla_rope_width
    return config


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    require(
        not kwargs.pop("output_attentions", False),
        "output_attentions is not available: attention weights are never materialised",
    )
    kwargs.pop("output_hidden_states", None)
    unknown = [name for name, value in kwargs.items() if value is not None]
    require(not unknown, f"unknown arguments {unknown}: packed documents are marked by position_ids that restart")


def _segments(mask: Tensor | None, position_ids: Tensor | None, hidden: Tensor, past: int, bounded: bool) -> Segments | None:
    """Where padding and documents lie in the key slots (in the new ones for a bounded cache); None where there are none.

    Reads the device once per forward pass where a mask or position ids are given, except in bounded decoding and in graphs.
    """
    batch, new, _ = hidden.shape
    if mask is not None:
        expected = (batch, past + new)
        require(
            tuple(mask.shape) == expected,
            f"attention_mask must have shape {expected} (batch, past and new tokens), got {tuple(mask.shape)}",
        )
    if bounded and past:
        if new == 1:
            return None
        mask = None if mask is None else mask[:, -new:]
    documents = position_ids if past == 0 else None
    if documents is not None:
        documents = documents.expand(batch, -1)
    plain = [] if mask is None else [mask.bool().all()]
    plain += [] if documents is None else [(documents.diff(dim=1) == 1).all()]
    if not plain or (not torch.compiler.is_compiling() and bool(torch.stack(plain).all())):
        return None
    return Segments.of_inputs(mask, documents)


AutoConfig.register("dma", DmaConfig)
AutoModel.register(DmaConfig, DmaModel)
AutoModelForCausalLM.register(DmaConfig, DmaForCausalLM)
