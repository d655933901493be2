"""measure: try candidate patterns on every head of a model beside its own attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import attnsieve
from attnsieve.attention import attend
from attnsieve.errors import UserError, require
from attnsieve.fingerprint import Fingerprint
from attnsieve.hf.capture import evaluating
from attnsieve.hf.dense import own_attention, refuse_to_observe, refuse_unservable, why_layer_dense
from attnsieve.hf.geometry import AttentionLayer, attention_layers, fingerprint, text_config
from attnsieve.hf.interface import LayerCall, LayerState, attach
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
    backend: str = "auto",
    progress: bool = True,
) -> Measurement:
    """Density, retained mass and output error of every candidate for every head, on texts held out from fitting.

    batches as in `profile`; texts of equal length are averaged, and every length is a row of the result. The model's own
    activations are undisturbed: every layer sees dense inputs. In layers with sliding windows candidates and dense() are cut to
    them. dense() is added to the candidates if it is not among them.

    Raises UserError for models with attention that cannot run sparse, for candidates with captured bits, and for
    empty texts.
    """
    mark = fingerprint(model)
    patterns = list(dict.fromkeys(Pattern.parse(c) if isinstance(c, str) else c for c in [*candidates, dense()]))
    for layer in attention_layers(model):
        reason = why_layer_dense(layer, patterns)
        if reason is not None:
            raise UserError(f"layer {layer.index} cannot be measured ({reason})")
    groups = documents_of(batches, text_config(model).vocab_size)
    documents = sorted((document for group in groups for document in group), key=len)
    require(bool(documents), "measure needs at least one text")
    lengths = sorted({len(document) for document in documents})
    recorder = Recorder(patterns, len(lengths), mark, backend)
    detach = attach(model, recorder.layer)
    try:
        with evaluating(model):
            for document in tqdm(documents, desc="measure", unit="text", disable=not progress):
                recorder.row = lengths.index(len(document))
                model.base_model(input_ids=document[None].to(model.device), use_cache=False)
    finally:
        detach()
    counts = torch.tensor([sum(len(document) == n for document in documents) for n in lengths])
    sums = (recorder.density, recorder.retained, recorder.error)
    density, retained, error = ((total / counts[:, None, None, None]).float() for total in sums)
    provenance = {"documents": counts.tolist(), "token_digest": digest(groups), "attnsieve": attnsieve.__version__}
    return Measurement(mark, tuple(map(str, patterns)), tuple(lengths), density, retained, error, provenance)


@dataclass(frozen=True, eq=False)
class Compared:
    """One candidate in one layer; float64 [heads] each."""

    density: Tensor
    retained: Tensor
    error: Tensor


class Recorder:
    """Sums of what every candidate keeps and changes; float64 [lengths, candidates, layers, heads]."""

    def __init__(self, patterns: list[Pattern], lengths: int, mark: Fingerprint, backend: str) -> None:
        self._patterns, self._mark, self._backend = patterns, mark, backend
        shape = (lengths, len(patterns), mark.layers, mark.heads)
        self.density, self.retained, self.error = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.row, self._memo = 0, SpanMemo()
        self._layouts: dict[tuple[Pattern, int, int | None], Layout] = {}
        self._chosen: tuple[LayerCall | None, Pattern | None, Layout | None] = (None, None, None)

    def layer(self, layer: AttentionLayer) -> LayerState:
        """The state of one layer: compare every candidate with dense attention, answer as the model would."""

        def state(call: LayerCall) -> Tensor:
            refuse_unservable(call, self._mark.heads)
            refuse_to_observe(layer, call)
            place = locate(layer, call, self._memo)
            require(not isinstance(place, str), f"layer {layer.index} cannot be measured ({place})")
            window = layer.binding_window
            exact, exact_lse = self._attend(call, dense(), window)
            row = self._mark.row(layer.index)
            for c, pattern in enumerate(self._patterns):
                compared = self._compare(call, pattern, exact, exact_lse, window)
                for name in ("density", "retained", "error"):
                    getattr(self, name)[self.row, c, row] += getattr(compared, name).cpu()
            return own_attention(call)

        return state

    def _compare(self, call: LayerCall, pattern: Pattern, exact: Tensor, exact_lse: Tensor, window: int | None) -> Compared:
        out, lse = self._attend(call, pattern, window)
        n = call.query.shape[2]
        # A row's kept share of softmax mass is the ratio of its two partition functions.
        retained = (lse.double() - exact_lse.double()).exp().mean(-1)[0]
        changed = (out.double() - exact.double()).square().sum((-2, -1))[0]
        error = changed / exact.double().square().sum()
        density = self._layout(call, pattern, window).density(n)[0].to(error.device)
        return Compared(density.repeat_interleave(len(error) // len(density)), retained.clamp_max(1), error)

    def _attend(self, call: LayerCall, pattern: Pattern, window: int | None) -> tuple[Tensor, Tensor]:
        result = attend(
            call.query,
            call.key,
            call.value,
            self._layout(call, pattern, window),
            scale=call.scaling,
            backend=self._backend,
            return_lse=True,
        )
        assert isinstance(result, tuple)
        return result

    def _layout(self, call: LayerCall, pattern: Pattern, window: int | None) -> Layout:
        """Static layouts are kept, with their counted pairs; a choice is made once per call, in the order of use."""
        n, heads = call.query.shape[2], call.key.shape[1]
        if not pattern.dynamic:
            key = (pattern, n, window)
            if key not in self._layouts:
                self._layouts[key] = compile_layout([pattern] * heads, n, call.query.device, window=window)
            return self._layouts[key]
        chosen_for, chosen_by, layout = self._chosen
        if layout is None or chosen_for is not call or chosen_by != pattern:
            layout = choose([pattern] * call.query.shape[1], call.query, call.key, scale=call.scaling)
            self._chosen = (call, pattern, layout)
        return layout
