"""DmaCache: the bounded caches of all layers behind the interface that transformers' generate() expects."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from attnsieve.errors import UserError, require
from attnsieve.nn.cache import BoundedCache
from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.selection import SelectionRule


class BoundedLayer(CacheLayerMixin):
    """One layer's `BoundedCache`; the attention layer calls that directly, since it needs scores beside keys and values."""

    def __init__(self, rule: SelectionRule) -> None:
        super().__init__()
        self.bounded = BoundedCache(rule)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Slots are made by the first call."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("a DmaCache needs the scores of its keys: use it with DmaForCausalLM and attention='dma' only")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.bounded.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.bounded.seen

    def get_max_length(self) -> int:
        """-1: the text may go on without end."""
        return -1

    def reset(self) -> None:
        self.bounded.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.bounded.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows, given by number or as bool flags."""
        self.bounded.reorder(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times."""
        if self.bounded.length is not None:
            rows = torch.arange(len(self.bounded.length), device=self.bounded.length.device)
            self.bounded.reorder(rows.repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """What transformers calls before it decodes with an assistant: from here on `crop` works."""
        self.bounded.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens, exactly; what came before can no longer be taken back.

        Raises UserError for tokens that were not recorded: keys that lost their slot are gone.
        """
        require(
            tokens_to_remove <= 0, f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}"
        )
        if tokens_to_remove or self.record_past:
            self.bounded.take_back(-tokens_to_remove)

    @property
    def record_past(self) -> bool:
        """Whether `crop` can take tokens back; transformers sets it to False when that is no longer needed."""
        return self.bounded.recording

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        self.bounded.record() if wanted else self.bounded.stop_recording()


class DmaCache(Cache):
    """Memory for keep_window_size + window + sinks keys per layer and KV head, whatever the length of the text.

    `DmaForCausalLM.generate` uses it unless another cache is passed. Copy it (copy.deepcopy) to continue a prefix twice.
    """

    def __init__(self, config: DmaConfig) -> None:
        super().__init__(layers=[BoundedLayer(config.rule) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Memory of all layers in bytes: the same after every step, however long the text."""
        return sum(layer.bounded.nbytes for layer in self.layers if isinstance(layer, BoundedLayer))
