"""Calibration texts: batches of token ids in the forms people have them, as documents without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnsieve.errors import UserError, require

# One text as token ids, several of them, a tensor [T] or [B, T], or a tokenizer's output.
Batch = Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


def documents_of(batches: Iterable[Batch], vocabulary: int) -> list[list[Tensor]]:
    """Per batch, its documents as int64 [n] on the CPU, padding removed.

    Raises UserError for no text at all, an empty text, padding inside a text, ids outside the vocabulary, or other types.
    """
    require(
        not isinstance(batches, str | Mapping),
        f"texts come as a list of batches, got one {type(batches).__name__}: put it in a list, tokenized",
    )
    groups = [[_check(text, number, vocabulary) for text in _texts(batch)] for number, batch in enumerate(batches)]
    require(any(groups), "there is no text: give batches of token ids")
    return groups


def ids_of(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [rows, tokens] on the model's device. Raises UserError for ids outside the vocabulary, which end GPU programs, and for
    texts without any."""
    ids = torch.tensor(rows)
    require(ids.numel() > 0, "the tokenizer makes no tokens of the text: give another text")
    _check_range("the text", ids, model.config.get_text_config().vocab_size)
    return ids.to(model.device)


def right_padded(documents: Sequence[Tensor], wanted: Sequence[int]) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """input_ids int64 [B, T] and where the documents are in it: (batch row, first slot, tokens).

    A document is cut to the largest of the `wanted` lengths that it reaches: no statistic looks further, and causality keeps
    later tokens from changing earlier ones.
    """
    cut = [document[: max((n for n in wanted if n <= len(document)), default=len(document))] for document in documents]
    spans = [(row, 0, len(document)) for row, document in enumerate(cut)]
    return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True), spans


def digest(groups: list[list[Tensor]]) -> str:
    """16 hex digits over all token ids and the ends of documents."""
    total = hashlib.sha256()
    for document in (document for group in groups for document in group):
        total.update(len(document).to_bytes(8, "little") + np.asarray(document, dtype="<i8").tobytes())
    return total.hexdigest()[:16]


def _texts(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Mapping):
        unknown = set(batch) & {"position_ids", "inputs_embeds"}
        require("input_ids" in batch, f"a batch needs input_ids, got the keys {sorted(batch)}")
        require(not unknown, f"profile takes input_ids and attention_mask, not {sorted(unknown)}; give each document by itself")
        return _unpadded(_tensor(batch["input_ids"]), batch.get("attention_mask"))
    require(
        not isinstance(batch, int | np.integer),
        f"a text is a list of token ids, got the number {batch}: put the text in a list",
    )
    if isinstance(batch, Sequence) and len(batch) > 0 and not isinstance(batch[0], int | np.integer):
        return [_tensor(text) for text in batch]
    return _unpadded(_tensor(batch), None)


def _unpadded(ids: Tensor, mask: Any) -> list[Tensor]:
    rows = ids[None] if ids.ndim == 1 else ids
    require(rows.ndim == 2, f"token ids must be [tokens] or [batch, tokens], got shape {tuple(ids.shape)}")
    if mask is None:
        return list(rows)
    kept = _read("attention_mask", mask, "expected 1 for tokens and 0 for padding, as many as input_ids")
    require(kept.numel() == rows.numel(), f"attention_mask {tuple(kept.shape)} does not fit input_ids {tuple(ids.shape)}")
    kept = kept.reshape(rows.shape).bool()
    return [_inside(row, keep) for row, keep in zip(rows, kept, strict=True)]


def _inside(row: Tensor, keep: Tensor) -> Tensor:
    """The tokens of one row, whose padding must be on the left or the right."""
    slots = keep.nonzero().flatten()
    if not len(slots):
        return row[:0]
    first, last = int(slots[0]), int(slots[-1])
    require(last - first + 1 == len(slots), "attention_mask hides tokens inside a text; pad on the left or on the right only")
    return row[first : last + 1]


def _read(what: str, values: Any, remedy: str) -> Tensor:
    try:
        return torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"cannot read {what} from {type(values).__name__} {values!r:.80}; {remedy}") from None


def _tensor(values: Any) -> Tensor:
    tensor = _read("token ids", values, "tokenize the text first and give its input_ids")
    # An empty list becomes a float tensor; that it is empty is said elsewhere.
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    require(whole or tensor.numel() == 0, f"token ids must be whole numbers, got {tensor.dtype}")
    return tensor.long()


def _check(text: Tensor, number: int, vocabulary: int) -> Tensor:
    require(text.ndim == 1 and len(text) > 0, f"batch {number} holds an empty text: leave it out")
    _check_range(f"batch {number}", text, vocabulary)
    return text


def _check_range(what: str, ids: Tensor, vocabulary: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    require(
        low >= 0 and high < vocabulary,
        f"{what} has token ids from {low} to {high}, the model knows 0 to {vocabulary - 1}; use its own tokenizer",
    )
