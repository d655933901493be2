"""Fit what `auto` knows of devices to benchmark rows, and write it into the package.

    cd benchmarks/results && python ../fit_cost.py kernels.jsonl cpu.jsonl --choosing choosing.jsonl

Devices without rows keep what was fitted before. Rows of choosing are those of benchmarks/choosing.py.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnsieve.bench.fit_cost import fit
from attnsieve.bench.rows import read
from attnsieve.selection.cost import NAME

HERE = Path(str(files("attnsieve.backends"))) / "cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--choosing", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    rows = read(arguments.rows) + [of_choosing(row) for row in read(arguments.choosing)]
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found = fit(rows)
    arguments.out.write_text(json.dumps(known | found, indent=1, sort_keys=True) + "\n")
    for device, fitted in found.items():
        for kind, error in fitted["relative_error"].items():
            print(f"{device}: {kind}: {error['rows']} rows, worst relative error {error['worst']:.0%}")
            print("   ", fitted["constants"][kind])


def of_choosing(row: dict[str, Any]) -> dict[str, Any]:
    """As a row of what a call takes beside its attention: choosing, and what the backend derives."""
    derived = max(0.0, row["attention_and_lists_ms"] - row["attention_ms"])
    same = dict.fromkeys(("dtype", "batch", "q_heads", "kv_heads", "head_dim", "q_len"))
    what = {"backend": NAME, "op": "prefill", "mask": row["pattern"], "density": None, "includes_mask_building": False}
    return row | same | what | {"ms_p20": row["choose_ms"] + derived}


if __name__ == "__main__":
    main()
