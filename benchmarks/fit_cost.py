"""Fit what `auto` knows of devices to benchmark rows, and write it into the package.

    python benchmarks/fit_cost.py benchmarks/results/kernels.jsonl benchmarks/results/cpu.jsonl

Devices without rows keep what was fitted before.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

from attnsieve.bench.fit_cost import fit
from attnsieve.bench.rows import read

HERE = Path(str(files("attnsieve.backends"))) / "cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    rows = read(arguments.rows)
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found = fit(rows)
    arguments.out.write_text(json.dumps(known | found, indent=1, sort_keys=True) + "\n")
    for device, fitted in found.items():
        for kind, error in fitted["relative_error"].items():
            print(f"{device}: {kind}: {error['rows']} rows, worst relative error {error['worst']:.0%}")
            print("   ", fitted["constants"][kind])


if __name__ == "__main__":
    main()
