"""The online softmax of `hopper_forward`, in the layout in which the matrix unit leaves scores."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _of_quads(s):
    """[R, N] as [R, N / 8, 4, 2]: four threads hold a row, each two columns of every eight."""
    return s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])


@gluon.jit
def words_of(
    marks, o_list, chunk, n_whole, count, row, layout: gl.constexpr, M: gl.constexpr, N: gl.constexpr, KEYS: gl.constexpr
):
    """[R, 4] of `marks`, for the first KEYS keys of a chunk of N, 0 where there is none. In the order of `in_runs` the keys of a
    thread lie in a quarter of a row's bits."""
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, layout)) * (KEYS // 4)
    row = gl.convert_layout(row, gl.SliceLayout(1, layout))
    p_word = marks.words + (o_list * marks.chunks + gl.maximum(chunk - n_whole, 0)) * M + row
    p_half = p_word.to(gl.pointer_type(gl.int32), bitcast=True)[:, None] + (quarter >> 5)[None, :]
    there = (chunk >= n_whole) & (chunk * N < count)
    return gl.load(p_half, mask=there, other=0) >> (quarter & 31)[None, :]


@gluon.jit
def masked(s, words):
    """Scores [R, N], -inf where the words [R, 4] do not say that a row keeps a key; compare `bits.bounds`."""
    quads = _of_quads(s)
    of_quads: gl.constexpr = quads.type.layout
    of_words: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, of_quads))
    eighth = gl.arange(0, s.shape[1] // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, of_quads))))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, of_quads))))
    bit = eighth[None, :, None, None] * 2 + half[None, None, None, :]
    words = gl.convert_layout(words, of_words)[:, None, :, None]
    sign = (~words << (31 - bit)) & -0x80000000
    kept = gl.minimum(quads, (sign | 0x7F800000).to(gl.float32, bitcast=True))
    return gl.convert_layout(kept.reshape(s.shape), s.type.layout)


@gluon.jit
def peaks_of(s, rows: gl.constexpr):
    """The greatest of each row; pairs first, so that no long chain of instructions waits for each other."""
    return gl.convert_layout(gl.max(gl.max(gl.max(_of_quads(s), 3), 1), 1), rows)


@gluon.jit
def parts_of(weights):
    """[R, 4]: what each thread adds to the sums of its rows. They are added up once, behind all keys."""
    return gl.sum(gl.sum(_of_quads(weights), 3), 1)


@gluon.jit
def base_of(peak):
    """What is subtracted from scores: a row that has kept nothing so far has weights 0, not NaN."""
    return gl.where(peak == -float("inf"), 0.0, peak)


@gluon.jit
def weights_of(s, base, scale2):
    """Weights [R, keys] of scores s * scale2 in base 2."""
    return gl.exp2(s * scale2 - gl.convert_layout(base, gl.SliceLayout(1, s.type.layout))[:, None])
