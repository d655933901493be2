"""What must not be kept by what was computed with it."""

import gc
import weakref
from collections.abc import Callable

from attnsieve import Layout


def assert_nothing_outlives(layout_used: Callable[[], Layout]) -> None:
    """The layout that was made and used ends with its last name, without help of the garbage collector."""
    layout = layout_used()
    gone = weakref.ref(layout.end)
    gc.disable()
    try:
        del layout
        assert gone() is None
    finally:
        gc.enable()
