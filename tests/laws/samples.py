"""Every pattern that the laws are tested on. An atom enrols by existing: a class without a sample fails a test."""

import numpy as np
from hypothesis import strategies as st

from attnsieve.patterns import (
    Atom,
    Captured,
    Pattern,
    columns,
    dense,
    diagonals,
    dilated,
    empty,
    random_blocks,
    sink,
    window,
)


def captured(length: int, seed: int = 0, share: float = 0.3) -> Pattern:
    """A random causal corner."""
    mask = np.tril(np.random.default_rng(seed).random((length, length)) < share)
    return Pattern.of(Captured.from_mask(mask))


def dam(length: int, indices: tuple[int, ...], distances: tuple[int, ...]) -> Pattern:
    """What DAM makes of one head: captured rows, then matched columns and diagonals."""
    return captured(length) | columns(*indices, start=length) | diagonals(*distances, start=length)


SAMPLES = [
    dense(),
    empty(),
    window(1),
    window(17),
    sink(3),
    columns(0, 5, 64, 65, 200),
    columns(2, 40, start=30),
    diagonals(0, 1, 50, 128),
    diagonals(*range(60), 100),
    diagonals(3, 9, start=21),
    dilated(9, step=7),
    random_blocks(2, block=16, seed=3),
    captured(24),
    sink(4) | window(32),
    sink(2) | columns(11, 90) | diagonals(0, 33) | window(3),
    sink(1) | window(8) | random_blocks(1, block=8) | random_blocks(1, block=12, seed=1),
    dam(20, (0, 7), (0, 1, 6)),
    dam(33, (0,), (32,)) | sink(2),
]


def atom_classes(base: type = Atom) -> set[type]:
    """Every atom class there is."""
    return {leaf for child in base.__subclasses__() for leaf in (atom_classes(child) or {child})}


_position = st.integers(0, 150)
_atoms = st.one_of(
    st.builds(window, st.integers(1, 150)),
    st.builds(sink, st.integers(1, 20)),
    st.builds(
        lambda xs, start: columns(*xs, start=start), st.lists(_position, min_size=1, max_size=6), st.sampled_from([0, 0, 13])
    ),
    st.builds(
        lambda xs, start: diagonals(*xs, start=start), st.lists(_position, min_size=1, max_size=6), st.sampled_from([0, 0, 9])
    ),
    st.builds(lambda n, step: dilated(n, step=step), st.integers(1, 9), st.integers(1, 20)),
    st.builds(
        lambda n, block, seed: random_blocks(n, block=block, seed=seed),
        st.integers(1, 3),
        st.sampled_from([4, 8, 12]),
        st.integers(0, 5),
    ),
    st.builds(captured, st.integers(1, 40), st.integers(0, 3)),
)


def patterns() -> st.SearchStrategy[Pattern]:
    """Random unions of one to three atoms."""
    return st.lists(_atoms, min_size=1, max_size=3).map(lambda parts: Pattern.of(*(atom for part in parts for atom in part)))
