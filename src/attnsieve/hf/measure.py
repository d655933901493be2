"""measure: try candidate patterns on every head of a model beside its own attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import attnsieve
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.hf.dense import LEFT_DENSE, own_attention, refuse_to_observe, refuse_unservable, why_layer_dense
from attnsieve.hf.effect import attended, effect
from attnsieve.hf.geometry import AttentionLayer, attention_layers, check_positions, fingerprint, text_config
from attnsieve.hf.interface import LayerCall, LayerState, observing
from attnsieve.hf.locate import SpanMemo, locate
from attnsieve.hf.texts import Batch, digest, documents_of
from attnsieve.layout import Layout, compile_layout
from attnsieve.patterns import Pattern, dense
from attnsieve.profiling import Measurement
from attnsieve.selection import choose


def measure(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    candidates: Sequence[str | Pattern],
    *,
    last: int | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> Measurement:
    """Density, retained mass and output error of every candidate for every head, on texts held out from fitting.

    batches as in `profile`; texts of equal length are averaged, and every length is a row of the result. last: mass and error are
    those of so many last rows of each text, such as a question and its answer, which the mean over all rows hardly shows. The
    model's own activations are undisturbed: every layer sees dense inputs. In layers with sliding windows candidates and dense()
    are cut to them. dense() is added to the candidates if it is not among them.

    Raises UserError for models with attention that cannot run sparse, for candidates with captured bits, for empty texts, for
    texts longer than the model's positions or shorter than `last`, and for NaN or infinite attention, naming the layer.
    """
    mark = fingerprint(model)
    one = isinstance(candidates, str | Pattern)
    require(not one, f"candidates come as a list, got the pattern {str(candidates)!r:.80} alone: put it in a list")
    patterns = list(dict.fromkeys(c if isinstance(c, Pattern) else Pattern.parse(c) for c in [*candidates, dense()]))
    for layer in attention_layers(model):
        reason = why_layer_dense(layer, patterns)
        others = "measure fixed masks without blocks alone, such as 'sink(4) | window(32)' (--candidates)"
        remedy = LEFT_DENSE if why_layer_dense(layer, ()) else others
        require(reason is None, f"layer {layer.index} cannot be measured ({reason}): {remedy}")
    groups = documents_of(batches, text_config(model).vocab_size)
    documents = sorted((document for group in groups for document in group), key=len)
    require(bool(documents), "measure needs at least one text")
    lengths = sorted({len(document) for document in documents})
    check_positions(model, lengths[-1])
    require(
        last is None or (type(last) is int and 1 <= last <= lengths[0]),
        f"last must be a number of rows from 1 to {lengths[0]}, the shortest text's, got {last!r}",
    )
    recorder = Recorder(patterns, len(lengths), mark, backend, last)
    with observing(model, recorder.layer):
        for document in tqdm(documents, desc="measure", unit="text", disable=not progress):
            recorder.row = lengths.index(len(document))
            model.base_model(input_ids=document[None].to(model.device), use_cache=False)
    counts = [sum(len(document) == n for document in documents) for n in lengths]
    sums = (recorder.density, recorder.retained, recorder.error)
    density, retained, error = ((total / recorder.calls[:, None, :, None].clamp_min(1)).float() for total in sums)
    provenance = {"documents": counts, "token_digest": digest(groups), "attnsieve": attnsieve.__version__}
    rows = {} if last is None else {"last": last}
    return Measurement(mark, tuple(map(str, patterns)), tuple(lengths), density, retained, error, provenance | rows)


class Recorder:
    """Sums of what every candidate keeps and changes, float64 [lengths, candidates, layers, heads], over so many calls of a layer,
    [lengths, layers]: DiffLlama's attend twice to a text."""

    def __init__(self, patterns: list[Pattern], lengths: int, mark: Fingerprint, backend: str, last: int | None) -> None:
        self._patterns, self._mark, self._backend, self._last = patterns, mark, backend, last
        shape = (lengths, len(patterns), mark.layers, mark.heads)
        self.density, self.retained, self.error = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.calls = torch.zeros((lengths, mark.layers), dtype=torch.float64)
        self.row, self._memo = 0, SpanMemo()
        self._layouts: dict[tuple[Pattern, int, int | None], Layout] = {}

    def layer(self, layer: AttentionLayer) -> LayerState:
        """The state of one layer: compare every candidate with dense attention, answer as the model would."""

        def state(call: LayerCall) -> Tensor:
            refuse_unservable(call, self._mark.heads)
            refuse_to_observe(layer, call)
            place = locate(layer, call, self._memo)
            require(not isinstance(place, str), f"layer {layer.index} cannot be measured ({place}): {LEFT_DENSE}")
            window = layer.binding_window
            whole = attended(call, self._layout(call, dense(), window), self._backend)
            require(
                all(bool(part.isfinite().all()) for part in whole),
                f"layer {layer.index} has NaN or infinite attention: check the weights, or measure in float32 or bfloat16",
            )
            row = self._mark.row(layer.index)
            self.calls[self.row, row] += 1
            for c, pattern in enumerate(self._patterns):
                seen = effect(call, self._layout(call, pattern, window), whole, self._backend, self._last)
                cell = self.row, c, row
                self.density[cell] += seen.density.cpu()
                self.retained[cell] += seen.retained.cpu()
                self.error[cell] += (seen.change / seen.size.sum()).cpu()
            return own_attention(call)

        return state

    def _layout(self, call: LayerCall, pattern: Pattern, window: int | None) -> Layout:
        """Static layouts are kept, with their counted pairs; a choice serves one call."""
        if pattern.dynamic:
            return choose([pattern] * call.query.shape[1], call.query, call.key, scale=call.scaling)
        n, heads = call.query.shape[2], call.key.shape[1]
        key = (pattern, n, window)
        if key not in self._layouts:
            self._layouts[key] = compile_layout([pattern] * heads, n, call.query.device, window=window)
        return self._layouts[key]
