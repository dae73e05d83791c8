"""Which configuration of a kernel is fastest: every candidate verified, then timed.

python -m experiments.tune --op int4 --seconds 300 --json tune.json [--shapes ...] [--m ...]
python -m experiments.tune --merge tune.json    # what is faster goes into the kernel's tuned.json
"""

import dataclasses
import functools
import itertools
import json
import pathlib

from experiments import _bench, _workers
from pallas_kernels.int4_matmul import cases
from pallas_kernels.int4_matmul.cases import SHAPES
from pallas_kernels.int4_matmul.choice import candidates, predicted_microseconds
from pallas_kernels.int4_matmul.config import Config

TABLE = pathlib.Path(cases.__file__).parent / "tuned.json"
GROUP = 128
CANDIDATES = 12


def work(
    shapes: list[str], tokens: list[int], blocks_per_sm: list[int], scale_after: list[int], split_k: list[int]
) -> list[dict]:
    """The candidates of every problem that the cost model likes best, of those with the given fields."""
    items = []
    for m, shape in itertools.product(tokens, shapes):
        k, n = SHAPES[shape]
        takes = [
            config
            for config in candidates(m, k, n, k // GROUP)
            if config.blocks_per_sm in blocks_per_sm and config.scale_after in scale_after and config.split_k in split_k
        ]
        liked = sorted(takes, key=lambda config: predicted_microseconds(config, m, k, n))
        items += [{"shape": shape, "m": m, "config": dataclasses.asdict(config)} for config in liked[:CANDIDATES]]
    return items


@functools.lru_cache(maxsize=1)
def _problem(shape: str, m: int):
    from experiments._int4 import copies_for, problem

    k, n = SHAPES[shape]
    return problem(hash((shape, m)) % 2**31, m, k, n, GROUP, copies=copies_for(k, n))


def measure(item: dict) -> dict:
    """Verify a candidate and time it."""
    import jax

    from experiments import _clock, _int4
    from pallas_kernels.int4_matmul import int4_matmul

    config = Config(**item["config"])
    data = _problem(item["shape"], item["m"])
    weights = data["weights"]

    product = jax.jit(functools.partial(int4_matmul, implementation="mosaic_gpu", config=config))
    program = jax.jit(lambda x, weights: [product(x, *w) for w in weights])

    compiled = program.lower(data["x"], weights).compile()
    check = _int4.compiled_check(data, lambda: compiled(data["x"], weights)[0])
    with _workers.device_turn():
        checked = check()
        if not checked["ok"]:
            return checked
        _workers.stage("timing")
        return checked | {
            "kernel_us": _clock.kernel_microseconds(compiled, (data["x"], weights), calls=len(weights), iterations=7)
        }


def _kin(item: dict) -> tuple:
    """What a hang is put down to: candidates that share it are not tried again."""
    config = item["config"]
    names = ("scale_after", "num_warpgroups", "split_k", "block_m", "block_k", "blocks_per_sm", "k_warpgroups")
    return tuple(config[name] for name in names)


def best(results: list[dict]) -> list[dict]:
    """The fastest verified configuration of each problem."""
    fastest: dict = {}
    for r in results:
        key = (r["shape"], r["m"])
        if r.get("ok") and (key not in fastest or r["kernel_us"] < fastest[key]["kernel_us"]):
            fastest[key] = r
    return [fastest[key] for key in sorted(fastest)]


def merge(run: dict, table: dict) -> int:
    """Puts what a run found faster than the table, or the table has not, into it; returns how many entries changed."""
    device = table.setdefault(run["conditions"]["device"], {"command": "python -m experiments.tune --op int4"})
    shared = lambda entry: entry["config"].get("k_warpgroups", 1) > 1  # noqa: E731 - not for all operands: beside another
    entries = {(e["k"] * e["n"], e["k"], e["m"], shared(e)): e for e in device.get("entries", ())}
    changed = 0
    for found in run["best"]:
        k, n = SHAPES[found["shape"]]
        key, time = (k * n, k, found["m"], shared(found)), round(found["kernel_us"], 2)
        rivals = [e["microseconds"] for other, e in entries.items() if other[:3] == key[:3]]
        if not rivals or time < min(rivals):
            when = {name: run["conditions"][name] for name in ("date", "commit", "jax")}
            when["date"] = when["date"][:10]
            entries[key] = {"m": found["m"], "k": k, "n": n, "microseconds": time, "config": found["config"]} | when
            changed += 1
    device |= {"group_size": GROUP, "entries": [entries[key] for key in sorted(entries)]}
    return changed


def write_table(table: dict) -> str:
    """The table as JSON, one entry a line."""
    parts = []
    for kind, device in table.items():
        entries = ",\n".join("      " + json.dumps(entry) for entry in device["entries"])
        head = "".join(f"    {json.dumps(k)}: {json.dumps(v)},\n" for k, v in device.items() if k != "entries")
        parts.append(f'  {json.dumps(kind)}: {{\n{head}    "entries": [\n{entries}\n    ]\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    parser = _bench.parser(__doc__, shapes=list(SHAPES), tokens=[1, 16, 64, 256, 1024, 4096], seconds=300)
    parser.add_argument("--op", choices=["int4"], default="int4")
    parser.add_argument("--blocks-per-sm", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--scale-after", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--split-k", nargs="*", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--merge", help="a file that an earlier run wrote")
    options = parser.parse_args()
    if options.worker:
        return _workers.serve(measure)
    if options.merge:
        table = json.loads(TABLE.read_text())
        print(merge(json.loads(pathlib.Path(options.merge).read_text()), table), "entries changed")
        return TABLE.write_text(write_table(table))
    items = work(options.shapes, options.m, options.blocks_per_sm, options.scale_after, options.split_k)
    limits = {"workers": options.workers, "seconds": options.seconds, "stall": 15, "kin": _kin}
    results = _bench.answers("experiments.tune", items, **limits)
    for r in [r for r in results if not r.get("ok")][:20]:
        print("failed", json.dumps(r))
    for r in best(results):
        print(f"{r['shape']:20} m={r['m']:<5} {r['kernel_us']:8.1f} us  {r['config']}")
    _bench.finish(options.json, [], best=best(results), all=results)


if __name__ == "__main__":
    main()
