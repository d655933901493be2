"""A pattern of your own: chunked attention, in which a query reads the keys of its own chunk only."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnsieve
from attnsieve.patterns import Atom, Pattern, sink


@dataclass(frozen=True, repr=False)
class Chunk(Atom):
    """Keep the keys of the query's own chunk of `tokens` positions."""

    tokens: int
    name = "chunk"

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        """The definition, for any pair of positions; j <= i is added by whoever reads it."""
        return i // self.tokens == j // self.tokens

    def end(self, n: int) -> Tensor:
        """The same rule as kernels read it: the first row that no longer sees key j is where the next chunk begins."""
        return (torch.arange(n) // self.tokens + 1) * self.tokens

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """What stands between the brackets in the text form."""
        return [self.tokens], {}


pattern = Pattern.of(Chunk(100)) | sink(4)
print(pattern)

# Both forms of the rule must say the same; tests/laws checks this for every atom of the library.
n = 1000
layout = attnsieve.compile_layout([pattern], n)
positions = torch.arange(n)
assert torch.equal(layout.dense(positions, positions)[0, 0], pattern.keep(positions[:, None], positions[None, :]))
print(f"{layout.density().item():.1%} of the causal pairs of {n} tokens")

# And it runs.
q, k, v = (torch.randn(1, 1, n, 32, requires_grad=True) for _ in range(3))
out = attnsieve.attend(q, k, v, layout)
out.sum().backward()
assert not k.grad[0, 0, 4:900].isnan().any()
