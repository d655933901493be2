"""Selection: layouts whose masks are chosen from q and k of the input."""

from attnsieve.selection.choose import choose

__all__ = ["choose"]
