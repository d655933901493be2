"""Several calls of `pareto.py` by the same processes, in the order of what they are worth.

    python benchmarks/fleet.py --gpus 2 --each 8 --seconds 540 -- \\
        python benchmarks/worklist.py work.txt --seconds 500 --shard {shard} --out pareto/

Each line of the list (a \\ joins it to the next) holds the arguments of one call, without --seconds, --shard and --out; # begins a
comment. A process always does the first piece that is to be had, so it comes back to earlier lines when plans for them have been
made. It loads a model when it comes to it, once, and remembers dense attention's results for all lines.
"""

import argparse
import shlex
import time
from functools import cached_property
from pathlib import Path

from claims import add_sharing_options
from pareto import Worker, parse, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    add_sharing_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    stop = time.monotonic() + arguments.seconds
    shared = ["--out", str(arguments.out), "--shard", "/".join(map(str, arguments.shard))]
    lines = arguments.list.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    given = [words for line in lines if (words := shlex.split(line, comments=True))]
    work([Line([*words, *shared]) for words in given], stop)
    print(f"ended with {max(0.0, stop - time.monotonic()):.0f} s left", flush=True)


class Line:
    """A call's arguments, and its workers, one for each model, from when they are first asked for work."""

    def __init__(self, given: list[str]) -> None:
        self._arguments = parse(given)

    @cached_property
    def _workers(self) -> list[Worker]:
        return [Worker.of(name, self._arguments) for name in self._arguments.models]

    def step(self) -> bool:
        """See `Worker.step`."""
        return any(worker.step() for worker in self._workers)

    def whole(self) -> bool:
        """See `Worker.whole`."""
        return all(worker.whole() for worker in self._workers)


if __name__ == "__main__":
    main()
