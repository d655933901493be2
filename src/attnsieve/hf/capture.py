"""profile: observe what a model attends to, through the same seam that plans are applied through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import attnsieve
from attnsieve.errors import UserError, require
from attnsieve.fingerprint import Fingerprint
from attnsieve.hf.dense import LEFT_DENSE, own_attention, refuse_to_observe, refuse_unservable, why_not_plain
from attnsieve.hf.geometry import AttentionLayer, attention_layers, check_positions, fingerprint, text_config
from attnsieve.hf.interface import LayerCall, LayerState, observing
from attnsieve.hf.texts import Batch, digest, documents_of, right_padded
from attnsieve.profiling import Capture, Profile, available_memory, estimate_memory


def profile(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    pcl: int = 512,
    lengths: Sequence[int] = (2048,),
    maps: bool = True,
    provenance: dict[str, Any] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> Profile:
    """Observe the attention of `model` on calibration text: mean maps up to `pcl`, O(n) statistics at `lengths` beyond.

    batches: each a text as token ids, several of them (of any lengths), a tensor [T] or [B, T], or a tokenizer's output with
    input_ids and attention_mask. Padding is removed, activations are those of the model's own attention, and its modes are
    restored. provenance is stored with what this function notes itself: documents, tokens, digest of the ids, dtype, versions.

    Raises UserError, before any computation, for models without the attention interface or with attention that is not plain
    softmax, for empty or unreadable texts, for texts too short for `pcl` and `lengths`, for lengths beyond the model's positions,
    and if the sums cannot fit in memory; during it for NaN or infinite scores, naming the layer.
    """
    mark = fingerprint(model)
    _refuse_sizes(pcl, lengths)
    _refuse_layers(attention_layers(model))
    groups = documents_of(batches, text_config(model).vocab_size)
    wanted = ([pcl] if maps else []) + list(lengths)
    _refuse_short(groups, wanted)
    check_positions(model, max(wanted))
    capture = Capture(
        mark,
        pcl=pcl,
        lengths=lengths,
        maps=maps,
        device=_device_for_sums(model, mark, pcl, lengths, maps),
        memory_limit=memory_limit,
    )
    recorder = Recorder(capture)
    with observing(model, recorder.layer):
        for group in tqdm(groups, desc="profile", unit="batch", disable=not progress):
            ids, recorder.spans = right_padded(group, wanted)
            # Right padding needs no mask: causality keeps it from the documents, and its own rows are never read.
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return capture.finish(_provenance(model, groups) | (provenance or {}))


class Recorder:
    """Feeds a capture with the batch that is running, whose documents `spans` lists as (batch row, first slot, tokens)."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.spans: list[tuple[int, int, int]] = []

    def layer(self, layer: AttentionLayer) -> LayerState:
        """The state of one layer: record its queries and keys, answer as the model would."""

        def state(call: LayerCall) -> Tensor:
            refuse_unservable(call, self._capture.fingerprint.heads)
            refuse_to_observe(layer, call)
            window = call.options.get("sliding_window") or layer.window
            self._capture.add(layer.index, call.query, call.key, scale=call.scale, spans=self.spans, window=window)
            return own_attention(call)

        return state


def _refuse_sizes(pcl: int, lengths: Sequence[int]) -> None:
    whole = isinstance(pcl, Integral) and isinstance(lengths, Sequence) and all(isinstance(n, Integral) for n in lengths)
    require(
        whole, f"pcl is a whole number, lengths a sequence of such, as in pcl=512, lengths=(2048,); got {pcl!r} and {lengths!r}"
    )


def _refuse_layers(layers: list[AttentionLayer]) -> None:
    for layer in layers:
        reason = why_not_plain(layer)
        if reason is not None:
            raise UserError(f"layer {layer.index} cannot be profiled ({reason}): {LEFT_DENSE}")


def _refuse_short(groups: list[list[Tensor]], wanted: Sequence[int]) -> None:
    longest = max(len(document) for group in groups for document in group)
    require(bool(wanted), "nothing to capture: ask for maps or for at least one probed length")
    require(
        longest >= max(wanted),
        f"the longest text has {longest} tokens, a capture length or probed length is {max(wanted)}: give longer texts, or "
        "lower pcl and lengths",
    )


def _device_for_sums(model: PreTrainedModel, mark: Fingerprint, pcl: int, lengths: Sequence[int], maps: bool) -> torch.device:
    """The model's device where the sums take at most a quarter of what is free there, else the CPU."""
    free = available_memory(model.device)
    fits = free is not None and estimate_memory(mark, pcl, lengths, maps=maps) <= free // 4
    return model.device if fits else torch.device("cpu")


def _provenance(model: PreTrainedModel, groups: list[list[Tensor]]) -> dict[str, Any]:
    lengths = [len(document) for group in groups for document in group]
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "token_digest": digest(groups),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attnsieve": attnsieve.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
