"""Merge sweeps of bench_grouped into `pallas_kernels/grouped_matmul/tuned.json`: what is faster, or was not there.

python -m experiments.tuned_grouped sweep.json [later sweeps]
"""

import argparse
import json
import pathlib

import jax.numpy as jnp

from experiments._grouped import FORMATS, GROUP
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.cases import LAYERS
from pallas_kernels.grouped_matmul.config import bucket

TABLE = pathlib.Path(grouped_matmul.__file__).parent / "tuned.json"
KEY = ("x", "weight", "groups", "experts", "k", "n", "rows")


def problem(row: dict) -> dict:
    """What a row of the bench measured, as the table names it."""
    experts, k, n, top = LAYERS[row["shape"]]
    weight, x, _ = FORMATS[row["format"]]
    groups = k // GROUP if weight == jnp.int32 else 1
    values = (jnp.dtype(x).name, jnp.dtype(weight).name, groups, experts, k, n, bucket(row["m"] * top))
    return dict(zip(KEY, values, strict=True))


def merged(run: dict, entries: list[dict]) -> list[dict]:
    """The entries with the fastest verified configuration of each problem that a sweep was faster on."""
    table = {tuple(entry[name] for name in KEY): entry for entry in entries}
    when = {name: run["conditions"][name] for name in ("date", "commit", "jax")}
    for row in run["rows"]:
        if "error" in row or "us" not in row or not row.get("config"):
            continue
        entry = problem(row) | {"microseconds": round(row["us"], 2), "config": row["config"]} | when
        key = tuple(entry[name] for name in KEY)
        if key not in table or entry["microseconds"] < table[key]["microseconds"]:
            table[key] = entry
    return [table[key] for key in sorted(table)]


def main() -> None:
    """Merges the runs, oldest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    ((device, table),) = json.loads(TABLE.read_text()).items()
    for path in parser.parse_args().runs:
        run = json.loads(path.read_text())
        if run["conditions"]["device"] != device:
            parser.error(f"{path}: measured on {run['conditions']['device']}; the table is of {device}")
        table["entries"] = merged(run, table["entries"])
    lines = ",\n".join("      " + json.dumps(entry) for entry in table["entries"])
    head = f'{{\n  "{device}": {{\n    "command": {json.dumps(table["command"])},\n'
    TABLE.write_text(f'{head}    "entries": [\n{lines}\n    ]\n  }}\n}}\n')
    print(f"{len(table['entries'])} problems tuned")


if __name__ == "__main__":
    main()
