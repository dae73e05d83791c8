"""From runs of bench_int8 to what is kept of them.

`pallas_kernels/int8_matmul/tuned.json`: the fastest verified configuration of a problem, and the problems whose
XLA program was faster than the kernel.
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


def faster_by_xla(results: list[dict], tuned: list[dict]) -> list[dict]:
    """Problems that XLA's program was verified on and faster for than the kernel, by its default or a tuned cut."""
    kernel, xla = {}, {}
    for row in tuned:
        kernel[row["dtype"], row["blocked"], row["m"], row["k"], row["n"]] = row["microseconds"]
    for r in results:
        if r["what"] in ("time", "xla") and r.get("ok"):
            key = (r["dtype"], r["form"] == "block", bucket(r["m"]), *SHAPES[r["shape"]])
            if r["what"] == "xla":
                xla[key] = r["xla_us"]
            elif not r.get("config"):
                kernel[key] = min(r["kernel_us"], kernel.get(key, r["kernel_us"]))
    names = ("dtype", "blocked", "m", "k", "n")
    return [
        dict(zip(names, key, strict=True)) | {"xla": round(xla[key], 2), "kernel": round(kernel[key], 2)}
        for key in sorted(xla)
        if key in kernel and xla[key] < kernel[key]
    ]


def kept(results: list[dict]) -> dict[tuple, dict]:
    """Measurements that are no part of a sweep and whose check, if any, passed, by what they measured."""
    names = ("what", "shape", "m", "dtype", "form", "group", "tokens")
    rows = {}
    for r in results:
        swept = r["what"] not in ("time", "xla", "quant", "torch", "peaks") or r.get("config")
        if not swept and "error" not in r and r.get("ok", True):
            rows[tuple(str(r.get(name)) for name in names)] = r
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="oldest first: a later run's choice counts")
    rows: dict[tuple, dict] = {}
    measured: dict[tuple, dict] = {}
    results: list[dict] = []
    for path in parser.parse_args().runs:
        run = json.loads(path.read_text())
        rows |= {tuple(row.values())[:5]: row for row in fastest(run["results"])}
        results += run["results"]
        measured |= {key: r | {"commit": run["conditions"]["commit"]} for key, r in kept(run["results"]).items()}
    body = ",\n".join(" " + json.dumps(measured[key]) for key in sorted(measured))
    RESULTS.write_text(f'{{"conditions": {json.dumps(run["conditions"])}, "rows": [\n{body}\n]}}\n')
    conditions = {name: run["conditions"][name] for name in ("date", "commit", "jax")}
    conditions["date"] = conditions["date"][:10]
    head = json.dumps({"command": "python -m experiments.bench_int8 --only time sweep"} | conditions, indent=4)
    lines = ",\n".join("      " + json.dumps(rows[key]) for key in sorted(rows))
    opening = head.removesuffix("\n}")
    xla = faster_by_xla(results, list(rows.values()))
    lost = ",\n".join("      " + json.dumps(row) for row in xla)
    tables = f'"entries": [\n{lines}\n    ],\n    "xla_faster": [\n{lost}\n    ]'
    TABLE.write_text(f'{{\n  "{run["conditions"]["device"]}": {opening},\n    {tables}\n  }}\n}}\n')
    print(f"{len(rows)} problems tuned, {len(xla)} of them faster by XLA, {len(measured)} measurements kept")


if __name__ == "__main__":
    main()
