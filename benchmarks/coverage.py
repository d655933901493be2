"""Which rows of accuracy there are: the densities (percent) measured of every family of plans, by model and length.

python benchmarks/coverage.py benchmarks/results/eval-spread*.jsonl --tasks kv
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from attnsieve.evaluation.rows import Row, read_rows
from attnsieve.evaluation.tasks.aligned import MANY
from attnsieve.show import markdown, percent
from attnsieve.show.results import family

# A model and a length.
Place = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of rows; those of plans' summaries are passed over")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(MANY))
    arguments = parser.parse_args()
    rows = list(chain.from_iterable(read_rows(path) for path in arguments.files if not path.stem.endswith("-plans")))
    for task in arguments.tasks:
        print(f"{task}:\n\n{table([row for row in rows if row.task == task and row.plan != 'dense'])}\n")


def table(rows: Iterable[Row]) -> str:
    """A line per family, a column per model and length; a dash where nothing was run."""
    found: dict[str, dict[Place, set[float]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        found[family(row.plan)][row.model, row.length].add(row.density)
    places = sorted({place for densities in found.values() for place in densities})
    header = ["plans", *(f"{model.split('-')[0]} {length // 1024}K" for model, length in places)]
    return markdown(header, [[name, *(told(found[name][place]) for place in places)] for name in sorted(found)])


def told(densities: set[float]) -> str:
    """Each once, as it is written."""
    return ", ".join(dict.fromkeys(percent(density) for density in sorted(densities))) or "-"


if __name__ == "__main__":
    main()
