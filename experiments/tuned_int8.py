"""Merge runs of bench_int8 into what is kept of them: what a run did not measure stays as it is.

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

from pallas_kernels.int8_matmul import Config, cases, default_config, supports
from pallas_kernels.int8_matmul.config import bucket

SWEPT = 8  # configurations timed that make a choice; a sweep cut short of that makes none
TABLE = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "int8_matmul" / "tuned.json"
RESULTS = pathlib.Path(__file__).parent / "results" / "int8_matmul_h200.json"
SHAPES = cases.SHAPES | cases.BLOCK_SHAPES


def fastest(results: list[dict]) -> list[dict]:
    """A row for every problem of which enough configurations were verified and timed, or the default and others."""
    rows: dict[tuple, dict] = {}
    timed: collections.Counter = collections.Counter()
    beside_default = set()
    for r in results:
        if r["what"] != "time" or not r.get("ok") or not r.get("config"):
            continue
        (k, n), config, blocked = SHAPES[r["shape"]], Config(**r["config"]), r["form"] == "block"
        if supports(r["dtype"], blocked=blocked, config=config) is not None:
            continue  # it was taken when it was timed, and is refused since
        row = {"dtype": r["dtype"], "blocked": blocked, "m": bucket(r["m"]), "k": k, "n": n}
        key = tuple(row.values())
        timed[key] += 1
        if config == default_config(r["m"], k, n, r["dtype"], blocked=blocked):
            beside_default.add(key)
        if key not in rows or r["kernel_us"] < rows[key]["microseconds"]:
            rows[key] = row | {"microseconds": round(r["kernel_us"], 2), "config": dataclasses.asdict(config)}
    return [row for key, row in rows.items() if timed[key] >= SWEPT or (key in beside_default and timed[key] > 1)]


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
    names = ("what", "shape", "m", "dtype", "form", "group", "norm")
    rows = {}
    for r in (part for result in results for part in _by_tokens(result)):
        swept = r["what"] not in ("time", "xla", "quant", "torch", "peaks") or r.get("config")
        if not swept and "error" not in r and r.get("ok", True):
            rows[tuple(str(r.get(name) or None) for name in names)] = r
    return rows


def _by_tokens(result: dict) -> list[dict]:
    """PyTorch's times of each token count by itself; any other result as it is."""
    if "tokens" not in result or "times" not in result:
        return [result]
    rest = {name: value for name, value in result.items() if name not in ("tokens", "times", "seed")}
    named = [(*name.split("/"), timed) for name, timed in result["times"].items()]
    return [
        rest | {"m": m, "times": {name: timed for name, tokens, timed in named if int(tokens) == m}}
        for m in result["tokens"]
    ]


def merged(run: dict, table: dict) -> dict:
    """A device's table with what a run found faster, or the table has not; and what XLA is faster on.

    Args:
      run: what `bench_int8 --json` wrote.
      table: `entries` and `xla_faster`.
    """
    results, entries = run["results"], {tuple(row.values())[:5]: row for row in table["entries"]}
    for row in fastest(results):
        key = tuple(row.values())[:5]
        if key not in entries or row["microseconds"] < entries[key]["microseconds"]:
            entries[key] = row
    names = ("dtype", "blocked", "m", "k", "n")
    timed = {tuple(row[name] for name in names) for row in results_of_xla(results)}
    lost = [row for row in table["xla_faster"] if tuple(row[name] for name in names) not in timed]
    lost += faster_by_xla(results, list(entries.values()))
    return {
        "command": "python -m experiments.bench_int8 --only time sweep xla",
        **{name: run["conditions"][name] for name in ("date", "commit", "jax")},
        "entries": [entries[key] for key in sorted(entries)],
        "xla_faster": sorted(lost, key=lambda row: tuple(row[name] for name in names)),
    }


def results_of_xla(results: list[dict]) -> list[dict]:
    """The problems of which XLA's program was verified and timed."""
    return [
        {"dtype": r["dtype"], "blocked": r["form"] == "block", "m": bucket(r["m"])}
        | dict(zip(("k", "n"), SHAPES[r["shape"]], strict=True))
        for r in results
        if r["what"] == "xla" and r.get("ok")
    ]


def written(device: str, table: dict) -> str:
    """A device's table as JSON, a row a line."""
    head = {name: value for name, value in table.items() if name not in ("entries", "xla_faster")}
    opening = json.dumps(head, indent=4).removesuffix("\n}")
    lists = [
        f'    "{name}": [\n' + ",\n".join("      " + json.dumps(row) for row in table[name]) + "\n    ]"
        for name in ("entries", "xla_faster")
    ]
    return f'{{\n  "{device}": {opening},\n' + ",\n".join(lists) + "\n  }\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="oldest first")
    tables = json.loads(TABLE.read_text())
    published = json.loads(RESULTS.read_text())
    measured = kept(published["rows"])
    for path in parser.parse_args().runs:
        run = json.loads(path.read_text())
        device = run["conditions"]["device"]
        if device not in tables:
            parser.error(f"{path}: measured on {device}; the table is of {', '.join(tables)}")
        tables[device] = merged(run, tables[device])
        measured |= {key: r | {"commit": run["conditions"]["commit"]} for key, r in kept(run["results"]).items()}
    body = ",\n".join(" " + json.dumps(measured[key]) for key in sorted(measured))
    RESULTS.write_text(f'{{"conditions": {json.dumps(run["conditions"])}, "rows": [\n{body}\n]}}\n')
    TABLE.write_text(written(device, tables[device]))
    table = tables[device]
    print(f"{len(table['entries'])} problems tuned, XLA faster on {len(table['xla_faster'])}, {len(measured)} kept")


if __name__ == "__main__":
    main()
