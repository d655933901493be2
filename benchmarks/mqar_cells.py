"""Which recall models are trained, and how: shapes, the settings found on small ones, a configuration for each attention layer."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from attnsieve.errors import require
from attnsieve.nn import DmaConfig, RecallTask

WHOLE = ("mha", "gqa", "mqa", "mla")  # these keep all keys
SHAPES = "512x64,1024x64,512x128,2048x64,1024x128,256x64,512x256,2048x128,256x128,1024x256,256x256,2048x256,256x32,512x32"
TOKENS = 32768  # of a step at most
FEWEST = 2  # pairs of the easiest rows
Shape = tuple[int, int, int, bool]  # tokens, width, heads, noise


@dataclass(frozen=True)
class Recipe:
    """How all models are trained: what was found on small ones (docs/LOG.md)."""

    steps: int = 1500  # with the convolution 64 tokens are learned after 200 to 600
    # At 3e-3 DMA learns and then loses its choice of keys; a rate that falls from the start keeps it. A width of 128 wants 7e-4.
    rate: float = 1.5e-3
    falling: float = 0.95
    # 0.1 at a width of 64: with 0.02 tied embeddings start so small that learning waits for them. Equal scores at every width.
    spread: float = 0.8
    theta: float = 1e6  # with 1e4 a sixth of the channels tells keys that are 2048 tokens away alike at any distance
    initial_A: float = 1.0  # far from 0, where the order of keys turns over


RECIPE = Recipe()


@dataclass(frozen=True)
class Cell:
    """One model. keep: keys that a row of dma, swa and nsa keeps. noise: random tokens between pairs and questions.
    convolution: the model sees every token together with the one before it.
    """

    layer: str
    length: int
    width: int
    heads: int
    keep: int
    noise: bool
    convolution: bool
    rate: float
    seed: int
    steps: int
    batch: int
    vocabulary: int

    @property
    def task(self) -> RecallTask:
        return RecallTask(self.length, self.length // 4, self.vocabulary, noise=self.noise)

    @property
    def pairs(self) -> list[int]:
        """Of the rows of a batch in turn: the most pairs first."""
        most = self.length // 4
        return [most >> level for level in range(max(1, (most // FEWEST).bit_length()))]

    @property
    def counts(self) -> list[int]:
        """Pairs of each row of a batch."""
        return [self.pairs[row % len(self.pairs)] for row in range(self.batch)]

    def configuration(self) -> DmaConfig:
        return DmaConfig(
            hidden_size=self.width,
            intermediate_size=self.width,
            num_hidden_layers=2,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            initializer_range=RECIPE.spread / self.width**0.5,
            qk_norm=False,  # as in Zoology; normed heads take twice the steps to find the answers
            rope_parameters={"rope_type": "default", "rope_theta": RECIPE.theta},
            **self._attention(),
        )

    def _attention(self) -> dict[str, Any]:
        keep, dma = self.keep, {"attention": "dma", "initial_A": RECIPE.initial_A}
        return {
            "mha": {"attention": "mha"},
            "gqa": {"attention": "gqa", "num_key_value_heads": max(1, self.heads // 2)},
            "mqa": {"attention": "mqa"},
            "dma": dma | {"keep_window_size": keep},
            "dma-window": dma | {"keep_window_size": keep - keep // 4, "window": keep // 4},
            "swa": {"attention": "swa", "sliding_window": keep},
            "mla": {"attention": "mla", "mla_kv_rank": self.width // 2, "mla_rope_width": max(16, self.width // 4)},
            # Half of the budget in blocks of 8 (three of them fixed by the method), half in its window. Compressed blocks begin
            # every 4 tokens, two pairs, and cannot tell those apart: NSA stays at one of two where nothing else is learned.
            "nsa": {
                "attention": "nsa",
                "nsa_block": 8,
                "nsa_stride": 4,
                "nsa_selected_block": 8,
                "nsa_selected": max(4, keep // 16),
                "nsa_window": max(1, keep // 2),
            },
        }[self.layer]


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Models in the order of what they tell; layers that stand beside each other are trained together."""
    fixed = {"steps": arguments.steps, "vocabulary": arguments.vocabulary, "convolution": not arguments.no_convolution}
    found = []
    for length, width, heads, noise in arguments.shapes:
        shape = {"length": length, "width": width, "heads": heads, "noise": noise}
        batch, levels = min(arguments.batch, TOKENS // length), (length // 4 // FEWEST).bit_length()
        require(batch >= levels, f"a batch of {batch} rows of {length} tokens cannot hold {levels} numbers of pairs")
        for seed, rate in product(range(arguments.seeds), arguments.rates):
            one = partial(Cell, rate=rate, seed=seed, batch=batch, **fixed, **shape)
            for layer in arguments.layers.split(","):
                parts = [1] if layer in WHOLE else arguments.parts
                found += [one(layer, keep=length // part) for part in parts]
    return found


def shapes(text: str) -> list[Shape]:
    """ "512x128x4+noise" to (512 tokens, width 128, 4 heads, True), of several with commas between them; one head if none is given."""
    found = re.findall(r"(\d+)x(\d+)(x\d+)?(\+noise)?(?:,|$)", text)
    if ",".join(f"{length}x{width}{heads}{noise}" for length, width, heads, noise in found) != text:
        raise argparse.ArgumentTypeError(f"expected shapes like 256x64,512x128x4,512x64+noise, got {text!r}")
    return [(int(length), int(width), int(heads[1:] or 1), bool(noise)) for length, width, heads, noise in found]
