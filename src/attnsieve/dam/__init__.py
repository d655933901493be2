"""DAM, Dynamic Attention Mask (arXiv 2506.11104): from mean attention maps to one pattern per head.

Symbols as in the paper: L the pattern capture length, Abar the mean map, M the true mask, R and Cs the matched diagonals and
columns. Everything is per (layer, query head); leading dimensions of the tensors are free.
"""

from attnsieve.dam.boxcox import EPS, LAM, TAU, cut, transform
from attnsieve.dam.extend import extend, join, reach
from attnsieve.dam.matching import column_sums, diagonal_sums, matched
from attnsieve.dam.truemask import absolute, force, kept_mass, mass, relative

__all__ = [
    "EPS",
    "LAM",
    "TAU",
    "absolute",
    "column_sums",
    "cut",
    "diagonal_sums",
    "extend",
    "force",
    "join",
    "kept_mass",
    "mass",
    "matched",
    "reach",
    "relative",
    "transform",
]
