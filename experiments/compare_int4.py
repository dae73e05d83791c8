"""The int4 kernel against its peers: ratios, geometric means and shares of the floor, from files.

    python -m experiments.compare_int4 [--bench F] [--json experiments/results/int4_matmul_h200.json]

Our times are the tuned table's (`pallas_kernels/int4_matmul/tuned.json`), or those of a `bench_matmul --json` run; the
peers' are those of `results/peers_w4a16_h200.json`. Both say when and how they were measured.
"""

import argparse
import json
import pathlib
import statistics

from experiments import _bars
from pallas_kernels.int4_matmul.cases import SHAPES

RESULTS = pathlib.Path(__file__).parent / "results"
TUNED = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "int4_matmul" / "tuned.json"
CLOCK = "CUPTI kernel time, all that the op launches"
REGIMES = {"M <= 32": (1, 8, 16, 32), "M = 64..256": (64, 128, 256), "M >= 1024": (1024, 4096, 8192)}
# Of the read floor up to 16 tokens, by (K, N).
FLOOR_BARS = {(8192, 57344): 0.85, (28672, 8192): 0.85, (4096, 28672): 0.75, (8192, 8192): 0.75, (14336, 4096): 0.75}
LARGE = 8192 * 8192  # weights from which 700 TFLOP/s are asked for


def tuned_times() -> tuple[dict, dict]:
    """How the tuned table was measured, and its least microseconds by (M, K, N)."""
    table = json.loads(TUNED.read_text())["NVIDIA H200"]
    entries = table.pop("entries")
    entries.sort(key=lambda entry: -entry["microseconds"])  # a problem's fastest comes last
    times = {(e["m"], e["k"], e["n"]): e["microseconds"] for e in entries}
    when = {name: sorted({entry[name] for entry in entries}) for name in ("date", "commit", "jax")}
    return {"device": "NVIDIA H200", "clock": CLOCK} | table | when, times


def published_peers() -> dict:
    """The peers' times, and how they were measured."""
    return json.loads((RESULTS / "peers_w4a16_h200.json").read_text())


def bench_times(path: str) -> tuple[dict, dict]:
    """The same of a bench run."""
    run = json.loads(pathlib.Path(path).read_text())
    return {"clock": CLOCK} | run["conditions"], times_of(run["rows"])


def times_of(rows: list[dict]) -> dict:
    """Our microseconds by (M, K, N) in the rows of a bench."""
    ours = "mosaic_gpu_kernel_us"
    return {(row["m"], *SHAPES[row["shape"]]): row[ours] for row in rows if ours in row}


def peers_of_run(rows: list[dict], published: list[dict]) -> list[dict]:
    """The peers of a bench's problems: torch.mm and tinygemm as timed in the same run, the others as published."""
    known = {(peer["m"], peer["k"], peer["n"]): peer for peer in published}
    found = []
    for row in rows:
        k, n = SHAPES[row["shape"]]
        peer = dict(known.get((row["m"], k, n), {"m": row["m"], "k": k, "n": n, "best_w4a16": None}))
        w4a16 = [time for time in (peer["best_w4a16"], row.get("tinygemm_us")) if time is not None]
        peer |= {"best_w4a16": min(w4a16, default=None), "floor": row.get("floor_us", peer.get("floor"))}
        peer["cublas_bf16"] = row.get("torch_mm_us", peer.get("cublas_bf16"))
        found += [peer] if peer["cublas_bf16"] and peer["floor"] else []
    return found


def bars(rows: list[dict]) -> list[dict]:
    """What the kernel is held to, problem by problem and in the mean of a regime."""
    found, by_regime = [], {name: [] for name in REGIMES}
    for row in rows:
        k, n, m, ours = row["k"], row["n"], row["m"], row["ours"]
        name, many = f"{k}x{n} M={m}", m >= 1024
        regime = next((regime for regime, tokens in REGIMES.items() if m in tokens), None)
        if row["best_w4a16"] is not None:
            found.append(_bars.bar(f"{name} over the best W4A16 peer", ours, row["best_w4a16"], 1.0))
        if many:
            found.append(_bars.bar(f"{name} over torch.mm", ours, row["cublas_bf16"], 0.90))
        if regime and (many or row["best_w4a16"] is not None):
            by_regime[regime].append(found[-1])
        if m <= 16 and (k, n) in FLOOR_BARS:
            found.append(_bars.bar(f"{name} of the read floor", ours, row["floor"], FLOOR_BARS[k, n]))
        if many and k * n >= LARGE:
            found.append(_bars.bar(f"{name} of 700 TFLOP/s", ours, 2 * m * k * n / 700e6, 1.0))
    for (name, timed), least in zip(by_regime.items(), (1.4, 1.3, 0.95), strict=True):
        found += _bars.mean_bar(f"{name} over {'torch.mm' if '>=' in name else 'the best W4A16 peer'}", timed, least)
    return found


def compare(ours: dict, peers: list[dict]) -> list[dict]:
    """One row a problem: the times, the speed-ups over the best peer and over cuBLAS, the share of the floor."""
    rows = []
    for peer in peers:
        time = ours.get((peer["m"], peer["k"], peer["n"]))
        if time is not None:
            best = peer["best_w4a16"]
            rows.append(
                {name: peer[name] for name in ("k", "n", "m", "floor")}
                | {"ours": time, "best_w4a16": best, "cublas_bf16": peer["cublas_bf16"]}
                | {
                    "over_best_peer": None if best is None else round(best / time, 3),
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
                values = [row[ratio] for row in chosen if row[ratio] is not None]
                if not values:
                    continue
                found[-1][ratio] = {"mean": round(statistics.geometric_mean(values), 3), "least": min(values)}
    return found


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench")
    parser.add_argument("--json", default=str(RESULTS / "int4_matmul_h200.json"))
    options = parser.parse_args()
    how, ours = bench_times(options.bench) if options.bench else tuned_times()
    peers = published_peers()
    rows = compare(ours, peers.pop("rows"))
    summary = means(rows)
    parts = {"ours": how, "peers": peers}
    text = "".join(f"  {json.dumps(name)}: {json.dumps(part)},\n" for name, part in parts.items())
    for name, part, end in (("means", summary, ",\n"), ("rows", rows, "\n")):
        text += f'  "{name}": [\n' + ",\n".join("    " + json.dumps(row) for row in part) + f"\n  ]{end}"
    pathlib.Path(options.json).write_text("{\n" + text + "}\n")
    for row in summary + rows:
        print(json.dumps(row))
    _bars.show(bars(rows))


if __name__ == "__main__":
    main()
