"""attend refuses what does not fit together, with a sentence that says what was given; on every device alike."""

import pytest
import torch

from attnsieve import Spans, attend, compile_layout
from attnsieve.errors import UserError
from attnsieve.patterns import window


def inputs(**change):
    """A call that is right, but for `change`."""
    shapes = {"q": (2, 4, 8, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16)}
    shapes |= {name: value for name, value in change.items() if name in shapes and isinstance(value, tuple)}
    call = {name: torch.randn(shape) for name, shape in shapes.items()}
    call["layout"] = compile_layout([window(3)] * change.get("heads", 4), change.get("length", 8))
    return call | {name: value for name, value in change.items() if name in ("key_bias", "spans", "backend")}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"must be \[batch, heads, tokens, width\]", {"q": (4, 8, 16)}),
        ("batch sizes differ", {"q": (3, 4, 8, 16)}),
        ("k must match v", {"v": (2, 2, 7, 16)}),
        ("q in width", {"q": (2, 4, 8, 32)}),
        ("multiple of KV heads", {"q": (2, 3, 8, 16)}),
        ("more queries than keys", {"q": (2, 4, 9, 16)}),
        ("the layout has 3 heads", {"heads": 3}),
        ("key_bias must have shape", {"key_bias": torch.zeros(2, 4, 8)}),
        ("key_bias on meta", {"key_bias": torch.zeros(2, 2, 8, device="meta")}),
        ("compiled for 6", {"length": 6}),
        ("does not fit", {"spans": Spans.of([(0, 0, 8, 2, 8)])}),
        ("unknown backend", {"backend": "fastest"}),
    ],
)
def test_refuses(message, change):
    with pytest.raises(UserError, match=message):
        attend(**inputs(**change))


def test_refuses_mixed_dtypes():
    call = inputs()
    with pytest.raises(UserError, match="dtypes differ"):
        attend(**(call | {"k": call["k"].half()}))


def test_refuses_whole_numbers():
    call = inputs()
    with pytest.raises(UserError, match="not floating"):
        attend(**(call | {name: call[name].long() for name in "qkv"}))


def test_takes_what_fits():
    assert attend(**inputs()).shape == (2, 4, 8, 16)
