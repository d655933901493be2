"""Copies of a command, several on every GPU, within a time.

    python benchmarks/fleet.py --gpus 4 --each 4 --seconds 330 -- python benchmarks/pareto.py ... --seconds 300 --shard {shard}

`{shard}` becomes 0/16, 1/16 and so on. Each copy sees one GPU (CUDA_VISIBLE_DEVICES; with --gpus 0 none) and writes to a log of
its own; copies that still run when the time is over are ended.
"""

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="the number of the first GPU")
    parser.add_argument("--each", type=int, default=1, help="copies on a GPU; in all, where there is none")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each copy")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[arguments.command[0] == "--" :]
    count = max(arguments.gpus, 1) * arguments.each
    arguments.logs.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + arguments.seconds
    copies = [start(command, number, count, arguments) for number in range(count)]
    # All are asked, again and again: one that died is a process, whose claims stand, until somebody has asked.
    while None in [copy.poll() for copy in copies] and time.monotonic() < stop:
        time.sleep(0.1)
    ended = [finish(copy) for copy in copies]
    print(f"{ended.count(0)} of {count} copies ended well", flush=True)


def start(command: list[str], number: int, count: int, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    # The first copies are on different GPUs, so that neighbours in number share none.
    seen = str(arguments.first + number % arguments.gpus) if arguments.gpus else ""
    threads = str(arguments.threads)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": seen, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    shown = [part.replace("{shard}", f"{number}/{count}") for part in command]
    with (arguments.logs / f"{number}.log").open("wb") as log:
        return subprocess.Popen(shown, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(copy: subprocess.Popen[bytes]) -> int:
    """Its exit status; ended if it still runs."""
    if copy.poll() is None:
        copy.send_signal(signal.SIGTERM)
    try:
        return copy.wait(5)
    except subprocess.TimeoutExpired:
        copy.kill()
        return copy.wait()


if __name__ == "__main__":
    main()
