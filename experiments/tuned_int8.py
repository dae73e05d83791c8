"""From a run of bench_int8 to `pallas_kernels/int8_matmul/tuned.json`: the fastest verified configuration of a problem.

python -m experiments.tuned_int8 bench_int8.json [more runs]
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
        row = {"dtype": r["dtype"], "blocked": blocked, "tokens": bucket(r["m"]), "k": k, "n": n}
        key = tuple(row.values())
        timed[key] += 1
        if key not in rows or r["kernel_us"] < rows[key]["microseconds"]:
            rows[key] = row | {"microseconds": round(r["kernel_us"], 2), "config": dataclasses.asdict(config)}
    return [row for key, row in rows.items() if timed[key] >= SWEPT]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="oldest first: a later run's choice counts")
    rows: dict[tuple, dict] = {}
    for path in parser.parse_args().runs:
        run = json.loads(path.read_text())
        rows |= {tuple(row.values())[:5]: row for row in fastest(run["results"])}
    lines = ",\n".join("    " + json.dumps(rows[key]) for key in sorted(rows))
    head = {"command": "python -m experiments.bench_int8 --only time sweep", "date": run["conditions"]["date"][:10]}
    opening = json.dumps(head, indent=2).removesuffix("\n}")
    TABLE.write_text(f'{opening},\n  "{run["conditions"]["device"]}": [\n{lines}\n  ]\n}}\n')
    print(f"{len(rows)} problems")


if __name__ == "__main__":
    main()
