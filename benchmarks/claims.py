"""Work shared by processes on one host: each piece is claimed in a folder, by one process at a time, until it is finished."""

import os
from pathlib import Path

FINISHED = "finished"


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
