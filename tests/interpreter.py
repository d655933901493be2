"""Triton's interpreter runs the kernels where there is no GPU; importing this chooses it, before anything imports Triton."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch


def interpret_without_gpu() -> bool:
    """Whether the kernels are interpreted: where torch sees no GPU, unless the environment says otherwise."""
    if find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    mend()
    return True


def mend() -> None:
    """Mend the interpreter of Triton 3.6 to 3.9.

    Loop bounds are arrays of one element, which NumPy 2.4 no longer takes for integers; bfloat16 is rounded towards zero and its
    products multiply bits; the minimum of NaN and a number is NaN, on a GPU it is the number; a comparison of scalars, spread over
    a block, becomes integers, which loads of Triton 3.9 do not take for a mask. And the language is patched anew at every call of a
    function, a third of the time: once is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, dot, cast, patched = interpreter._patch_lang, builder.create_dot, builder.cast_impl, set()

    def patch_once(fn):
        names = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
        if names not in patched:
            patch(fn)
            tl.tensor.__index__ = lambda self: self.handle.data.item()
            patched.add(names)
        return interpreter._LangPatchScope()

    def dot_of_floats(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def cast_to_nearest(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)

    def splat(self, block, scalar):
        kind = block.scalar
        return interpreter.TensorHandle(np.full(block.shape, scalar.data, interpreter._get_np_dtype(kind)), kind)

    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    interpreter._patch_lang = patch_once
    builder.create_dot, builder.cast_impl, builder.create_splat = dot_of_floats, cast_to_nearest, splat


INTERPRETED = interpret_without_gpu()
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
