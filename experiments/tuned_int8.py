"""From runs of bench_int8 to what is kept of them.

`pallas_kernels/int8_matmul/tuned.json`: the fastest verified configuration of a problem.
`experiments/results/int8_matmul_h200.json`: times of the defaults, of the quantization kernels and of PyTorch.

python -m experiments.tuned_int8 bench_int8.json [later runs]
"""

import argparse
import collections
import dataclasses
import json
import pathlib

from pallas_kernels.int8_matmul import Config, cases, supports
from pallas_kernels.int8_matmul.config import bucket

SWEPT = 8  # configurations timed that make a choice; a sweep cut short of that makes none
TABLE = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "int8_matmul" / "tuned.json"
RESULTS = pathlib.Path(__file__).parent / "results" / "int8_matmul_h200.json"
SHAPES = cases.SHAPES | cases.BLOCK_SHAPES


def fastest(results: list[dict]) -> list[dict]:
    """A row for every problem whose configurations were verified and timed."""
    rows: dict[tuple, dict] = {}
    timed: collections.Counter = collections.Counter()
    for r in results:
        if r["what"] != "time" or not r.get("ok") or not r.get("config"):
            continue
        (k, n), config, blocked = SHAPES[r["shape"]], Config(**r["config"]), r["form"] == "block"
        if supports(r["dtype"], blocked=blocked, config=config) is not None:
            continue  # it was taken when it was timed, and is refused since
        row = {"dtype": r["dtype"], "blocked": blocked, "m": bucket(r["m"]), "k": k, "n": n}
        key = tuple(row.values())
        timed[key] += 1
        if key not in rows or r["kernel_us"] < rows[key]["microseconds"]:
            rows[key] = row | {"microseconds": round(r["kernel_us"], 2), "config": dataclasses.asdict(config)}
    return [row for key, row in rows.items() if timed[key] >= SWEPT]


def kept(results: list[dict]) -> dict[tuple, dict]:
    """Measurements that are no part of a sweep and whose check, if any, passed, by what they measured."""
    names = ("what", "shape", "m", "dtype", "form", "group", "tokens")
    rows = {}
    for r in results:
        swept = r["what"] not in ("time", "quant", "torch", "peaks") or r.get("config")
        if not swept and "error" not in r and r.get("ok", True):
            rows[tuple(str(r.get(name)) for name in names)] = r
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="oldest first: a later run's choice counts")
    rows: dict[tuple, dict] = {}
    measured: dict[tuple, dict] = {}
    for path in parser.parse_args().runs:
        run = json.loads(path.read_text())
        rows |= {tuple(row.values())[:5]: row for row in fastest(run["results"])}
        measured |= {key: r | {"commit": run["conditions"]["commit"]} for key, r in kept(run["results"]).items()}
    body = ",\n".join(" " + json.dumps(measured[key]) for key in sorted(measured))
    RESULTS.write_text(f'{{"conditions": {json.dumps(run["conditions"])}, "rows": [\n{body}\n]}}\n')
    conditions = {name: run["conditions"][name] for name in ("date", "commit", "jax")}
    conditions["date"] = conditions["date"][:10]
    head = json.dumps({"command": "python -m experiments.bench_int8 --only time sweep"} | conditions, indent=4)
    lines = ",\n".join("      " + json.dumps(rows[key]) for key in sorted(rows))
    opening = head.removesuffix("\n}")
    TABLE.write_text(f'{{\n  "{run["conditions"]["device"]}": {opening},\n    "entries": [\n{lines}\n    ]\n  }}\n}}\n')
    print(f"{len(rows)} problems tuned, {len(measured)} measurements kept")


if __name__ == "__main__":
    main()
