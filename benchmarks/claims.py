"""Work shared by processes on one host: each piece is claimed in a folder, by one process at a time, until it is finished."""

import os
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

FINISHED = "finished"


def add_sharing_options(parser: ArgumentParser) -> None:
    """Which part of the work a process begins with, and for how long it begins more."""
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="i/k: this process is number i of k, from 0")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this time")


def _shard(text: str) -> tuple[int, int]:
    number, count = (int(part) for part in text.split("/"))
    if not 0 <= number < count:
        raise ArgumentTypeError(f"expected i/k with i from 0 to k - 1, got {text}")
    return number, count


class Board:
    """A folder of claims. Unless its piece is finished, the claim of a process that has ended is void."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, piece: str) -> bool:
        """Whether this process has got the piece; never a second time."""
        path = self._path(piece)
        if _made(path):
            return True
        owner = path.read_text(encoding="utf-8")
        # Of several that find the claim void, the one that makes this file has it.
        if not _ended(owner) or not _made(path.with_name(f"{path.name}.void-{owner}")):
            return False
        path.write_text(str(os.getpid()), encoding="utf-8")
        return True

    def finish(self, piece: str) -> None:
        """Nobody will get the piece again."""
        self._path(piece).write_text(FINISHED, encoding="utf-8")

    def _path(self, piece: str) -> Path:
        return self._folder / piece.replace("/", "_")


def _made(path: Path) -> bool:
    """Whether this process wrote its number into a file that was not there."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        return False


def _ended(owner: str) -> bool:
    if not owner.isdigit():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It runs, for another user.
    return False
