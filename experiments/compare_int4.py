"""The int4 kernel against its peers: ratios, geometric means and shares of the floor, from files.

    python -m experiments.compare_int4 [--bench F] [--json experiments/results/int4_matmul_h200.json]

Our times are the tuned table's (`pallas_kernels/int4_matmul/tuned.json`), or those of a `bench_matmul --json` run; the
peers' are those of `results/peers_w4a16_h200.json`. Both say when and how they were measured.
"""

import argparse
import json
import pathlib
import statistics

from pallas_kernels.int4_matmul.cases import SHAPES

RESULTS = pathlib.Path(__file__).parent / "results"
TUNED = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "int4_matmul" / "tuned.json"
CLOCK = "CUPTI kernel time, all that the op launches"
REGIMES = {"M <= 32": (1, 8, 16, 32), "M = 64..256": (64, 128, 256), "M >= 1024": (1024, 4096)}


def tuned_times() -> tuple[dict, dict]:
    """How the tuned table was measured, and its microseconds by (M, K, N)."""
    table = json.loads(TUNED.read_text())["NVIDIA H200"]
    entries = table.pop("entries")
    times = {(e["m"], e["k"], e["n"]): e["microseconds"] for e in entries}
    when = {name: sorted({entry[name] for entry in entries}) for name in ("date", "commit", "jax")}
    return {"device": "NVIDIA H200", "clock": CLOCK} | table | when, times


def bench_times(path: str) -> tuple[dict, dict]:
    """The same of a bench run."""
    run = json.loads(pathlib.Path(path).read_text())
    times = {
        (row["m"], *SHAPES[row["shape"]]): row["mosaic_gpu_kernel_us"]
        for row in run["rows"]
        if "mosaic_gpu_kernel_us" in row
    }
    return {"clock": CLOCK} | run["conditions"], times


def compare(ours: dict, peers: list[dict]) -> list[dict]:
    """One row a problem: the times, the speed-ups over the best peer and over cuBLAS, the share of the floor."""
    rows = []
    for peer in peers:
        time = ours.get((peer["m"], peer["k"], peer["n"]))
        if time is not None:
            rows.append(
                {name: peer[name] for name in ("k", "n", "m")}
                | {"ours": time, "best_w4a16": peer["best_w4a16"], "cublas_bf16": peer["cublas_bf16"]}
                | {
                    "over_best_peer": round(peer["best_w4a16"] / time, 3),
                    "over_cublas_bf16": round(peer["cublas_bf16"] / time, 3),
                    "share_of_floor": round(peer["floor"] / time, 3),
                    "tflops": round(2 * peer["m"] * peer["k"] * peer["n"] / time / 1e6, 1),
                }
            )
    return rows


def means(rows: list[dict]) -> list[dict]:
    """The geometric mean and the least of each ratio, for each M and each regime of the bars."""
    groups = {f"M = {m}": (m,) for m in sorted({row["m"] for row in rows})} | REGIMES
    found = []
    for name, tokens in groups.items():
        chosen = [row for row in rows if row["m"] in tokens]
        if chosen:
            found.append({"group": name, "m": sorted({row["m"] for row in chosen}), "problems": len(chosen)})
            for ratio in ("over_best_peer", "over_cublas_bf16"):
                values = [row[ratio] for row in chosen]
                found[-1][ratio] = {"mean": round(statistics.geometric_mean(values), 3), "least": min(values)}
    return found


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench")
    parser.add_argument("--json", default=str(RESULTS / "int4_matmul_h200.json"))
    options = parser.parse_args()
    how, ours = bench_times(options.bench) if options.bench else tuned_times()
    peers = json.loads((RESULTS / "peers_w4a16_h200.json").read_text())
    rows = compare(ours, peers.pop("rows"))
    summary = means(rows)
    parts = {"ours": how, "peers": peers}
    text = "".join(f"  {json.dumps(name)}: {json.dumps(part)},\n" for name, part in parts.items())
    for name, part, end in (("means", summary, ",\n"), ("rows", rows, "\n")):
        text += f'  "{name}": [\n' + ",\n".join("    " + json.dumps(row) for row in part) + f"\n  ]{end}"
    pathlib.Path(options.json).write_text("{\n" + text + "}\n")
    for row in summary + rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
