"""SparseCache: transformers' cache for a model under a static plan, which drops keys that no later row reads."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from attnsieve.errors import UserError, require
from attnsieve.hf.cache_layer import Indices, RaggedLayer, Seat
from attnsieve.hf.geometry import attending_configs, kv_heads
from attnsieve.hf.report import CacheReport, LayerMemory
from attnsieve.patterns import FOREVER


class SparseCache(Cache):  # type: ignore[misc]
    """Pass it as `past_key_values`, to `generate` too; made by `Handle.cache`. Equal to a dynamic cache under the same plan.

    A layer stores per KV head the keys that some later row of its query heads reads: kept columns and sinks for ever, others as
    far back as the farthest window or diagonal. Storage for `max_length` tokens, padding included, is made by the first forward
    pass. Layers that may need any key (dense by plan or by name, dynamic patterns, random blocks) keep transformers' own cache.

    Beams, sampling, batches padded on the left, chunked prefill and `copy.deepcopy` work. A chunk's attention makes one layer's
    keys whole for as long as it takes. Cropping (assisted decoding), offloading and gradients are refused.
    """

    def __init__(self, config: PreTrainedConfig, seats: Sequence[Seat], max_length: int) -> None:
        """Raises UserError if no layer can drop keys, with the reasons, for models whose layers share keys, and for a
        `max_length` that is no whole number from 1."""
        require(
            isinstance(max_length, Integral) and 0 < max_length < FOREVER,
            f"a cache has room for a whole number of tokens, 1 to {FOREVER - 1}, got max_length={max_length!r}",
        )
        require(
            not getattr(config, "num_kv_shared_layers", 0),
            "layers of this model read keys of other layers, whose plan is another: use transformers' own cache",
        )
        layers = DynamicCache(config=config).layers
        planned = {kv_heads(layer) for layer in attending_configs(config, [seat.layer for seat in seats])}
        require(
            len(planned) == 1, f"layers of this model differ in their KV heads ({sorted(planned)}): use transformers' own cache"
        )
        self._indices = Indices(planned.pop(), max_length)
        self._attending = [seat.layer for seat in seats]
        self._whole: dict[int, str] = {}
        for seat in seats:
            self._seat(layers, seat, max_length)
        require(
            len(self._whole) < len(seats),
            f"no layer of this plan can drop keys ({'; '.join(sorted(set(self._whole.values())))}): use transformers' own cache",
        )
        self._max_length = max_length
        self._open: RaggedLayer | None = None
        super().__init__(layers=layers)

    def _seat(self, layers: list[Any], seat: Seat, max_length: int) -> None:
        reason = seat.whole
        # Layers whose window can bind have a reason; of the others the window cuts nothing off.
        if reason is None and type(layers[seat.layer]) not in (DynamicLayer, DynamicSlidingWindowLayer):
            reason = f"{type(layers[seat.layer]).__name__}, the model's own cache"
        if reason is None:
            try:
                layers[seat.layer] = RaggedLayer(seat, self._indices, max_length)
            except UserError as error:
                reason = str(error)
        if reason is not None:
            self._whole[seat.layer] = reason

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers': store the next tokens of a layer, return what its attention function is given."""
        require(
            self._open is None or self._open.seat.handed is not self._open,
            "keys were stored but not attended to under the plan: the cache was given to another model than its handle's, or a "
            "forward pass was cut short; make a new one",
        )
        layer: Any = self.layers[layer_idx]
        self._open = layer if isinstance(layer, RaggedLayer) else None
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes in use now."""
        return self.report().nbytes

    def report(self) -> CacheReport:
        """Memory of keys and values by layer; recurrent states beside them are the model's own."""
        layers = tuple(
            LayerMemory(i, layer.kept.share if isinstance(layer, RaggedLayer) else 1.0, _nbytes(layer), self._whole.get(i))
            for i, layer in ((i, self.layers[i]) for i in self._attending)
        )
        return CacheReport(layers, self._indices.nbytes, self._max_length)


def _nbytes(layer: Any) -> int:
    if isinstance(layer, RaggedLayer):
        return layer.nbytes
    return sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)
