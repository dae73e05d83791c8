"""Our recipes beside other libraries' on the same tokens: `python -m experiments.peers --help`.

`ours` quantizes and measures recipes; `theirs` measures what `experiments/oracles/run_peers.py` wrote. Both put their
rows into one JSON file, draw by draw; `merge` adds those of other files; `table` prints the comparisons. Mean
KL(float || quantized) a token is measured by the same code for all, against our decoder in float32: of weights, by
running them in our decoder; of what quantizes activations, on the logits of its own program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments.accuracy import EMBEDDED_MODEL, quantize_recipe
from experiments.evaluation import token_measures
from experiments.models.decoder import Decoder, Params
from experiments.models.hf import load_hf
from experiments.recipes import get_recipes

BATCH = 8
RESAMPLES = 2000
ORACLES = pathlib.Path(__file__).parent / "oracles"
RESULTS = pathlib.Path(__file__).parent / "results" / "peers_tiny_python.json"
SMALL_RESULTS = RESULTS.with_name("peers_small_python.json")  # of the 28M model, which is not in the repository
DRAWS = (EMBEDDED_MODEL / "calibration.npy", *(ORACLES / "calibration" / f"tiny_python_{n}.npy" for n in (1, 2)))
FORMATS = ("w4", "w4-asym", "w3", "w3-asym")


@dataclasses.dataclass(frozen=True)
class Bar:
    """One comparison: a recipe of ours, a peer, and the ratio of their KL that is asked for.

    Attributes:
        ours: name of a row of ours.
        peer: name of a row of theirs.
        limit: the greatest ratio ours / peer that meets the aim.
    """

    ours: str
    peer: str
    limit: float


WITHOUT_TRAINING = ("ist-gptq-best", "ist-gptq-sequential", "ist-gptq-damped", "gptqmodel-gptaq")
GPTQS = ("ist-gptq-best", "llmcompressor-gptq", "llmcompressor-gptq-mse", "gptqmodel", "gptqmodel-best")
BARS = (
    *(
        Bar(f"gptq-{form}-{ours}", f"{peer}-{form}", 0.90 if "asym" in form else 0.85)
        for ours in ("compensated", "damped", "continued")
        for peer in WITHOUT_TRAINING
        for form in FORMATS
    ),
    *(Bar(f"{ours}-{form}", f"ist-gptq-best-{form}", 0.75) for ours in ("learned", "distilled") for form in FORMATS),
    *(Bar(f"{ours}-{form}", f"autoround-{form}", 0.85) for ours in ("learned", "distilled") for form in FORMATS),
    *(Bar(f"gptq-{form}", f"{peer}-{form}", 1.02) for peer in GPTQS for form in FORMATS),
    *(Bar(f"awq-{form}", f"llmcompressor-awq-{form}", 1.02) for form in FORMATS),
    Bar("rtn-w4", "torchao-w4", 1.02),
    Bar("w8a8", "llmcompressor-w8a8", 1.02),
    Bar("smoothquant-w8a8", "llmcompressor-smoothquant-w8a8", 1.02),
    Bar("smoothquant-w8a8", "torchao-w8a8", 1.02),
    Bar("llm-int8", "bitsandbytes-int8", 1.02),
    Bar("nf4", "bitsandbytes-nf4", 1.02),
)


class Meter:
    """Measures logits against those of the float model on fixed tokens, which run once."""

    def __init__(self, model: Decoder, params: Params, tokens: np.ndarray) -> None:
        """Runs the float model in float32.

        Args:
            model: the architecture.
            params: float parameters.
            tokens: integer [sequences, T + 1].
        """
        self.tokens = tokens
        self.reference = list(self.run(model.clone(dtype=jnp.float32).forward, params))
        self._step = jax.jit(lambda *given: jnp.mean(token_measures(*given)[1], axis=1))

    def run(self, forward: Any, params: Any) -> Iterator[np.ndarray]:
        """Yields the logits of batches of the tokens, one by one."""
        step = jax.jit(forward)
        for batch in self.batches(self.tokens[:, :-1]):
            yield np.asarray(step(params, jnp.asarray(batch.astype(np.int32))))

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the rows of one array in batches."""
        return (rows[start : start + BATCH] for start in range(0, len(self.tokens), BATCH))

    def kl(self, logits: Iterable[np.ndarray]) -> list[float]:
        """Mean KL(float || logits) over the tokens of each sequence, nats, to five digits."""
        targets = self.batches(self.tokens[:, 1:])
        parts = [
            np.asarray(self._step(reference, np.asarray(found), target.astype(np.int32)))
            for reference, found, target in zip(self.reference, logits, targets, strict=True)
        ]
        return [float(f"{value:.4e}") for value in np.concatenate(parts)]


def measure_ours(meter: Meter, model: Decoder, params: Params, name: str, calibration: np.ndarray) -> dict[str, Any]:
    """Quantizes by one recipe and measures what runs; returns a row without its draw."""
    recipe = get_recipes(name)[name]
    start = time.perf_counter()
    qparams = quantize_recipe(model, params, recipe, calibration)
    seconds = time.perf_counter() - start
    kl = meter.kl(meter.run(jq.quantized(model.forward, on_dense="error"), qparams))
    flags = {"summary": recipe.summary, "device": jax.devices()[0].device_kind}
    versions = {"jaxquant": jq.__version__, "jax": jax.__version__}
    bits = jq.summary(qparams).bits_per_weight
    return {"bits": bits, "calibrated": recipe.calibrated, "flags": flags, "versions": versions} | draw_of(kl, seconds)


def measure_theirs(meter: Meter, model: Decoder, folder: pathlib.Path) -> dict[str, Any]:
    """Measures the weights or logits that a peer left in a folder; returns a row without its draw."""
    record = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    if (folder / "logits.npy").exists():
        logits = meter.batches(np.load(folder / "logits.npy", mmap_mode="r"))
    else:
        logits = meter.run(model.forward, jax.device_put(load_hf(folder)[1]))
    row = {key: record[key] for key in ("bits", "calibrated", "flags", "versions")}
    return row | draw_of(meter.kl(logits), record["seconds"])


def draw_of(kl: list[float], seconds: float) -> dict[str, Any]:
    """The part of a row that belongs to one draw."""
    return {"draw": {"kl": float(np.mean(kl)), "seconds": round(seconds, 1), "sequences": kl}}


def put_row(path: pathlib.Path, side: str, name: str, draw: int, row: dict[str, Any]) -> None:
    """Adds one draw of a row to the results, which hold one line for each draw."""
    rows = load_rows(path) if path.exists() else {}
    draws = rows.get(name, {}).get("draws", {}) | {str(draw): row.pop("draw")}
    rows[name] = {"side": side, **row, "draws": dict(sorted(draws.items()))}
    write_rows(path, rows)


def load_rows(path: pathlib.Path) -> dict[str, Any]:
    """The rows of a results file, by name."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: pathlib.Path, rows: dict[str, Any]) -> None:
    """Writes rows with a line for each draw."""
    parts = []
    for name, row in rows.items():
        draws = ",\n".join(f'   "{draw}": {json.dumps(found)}' for draw, found in row["draws"].items())
        rest = json.dumps({key: value for key, value in row.items() if key != "draws"})
        parts.append(f' "{name}": {rest[:-1]}, "draws": {{\n{draws}}}}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def merge_rows(path: pathlib.Path, others: Iterable[pathlib.Path]) -> None:
    """Adds the rows of other results files, of another machine for example, draw by draw; the last one counts."""
    rows = load_rows(path) if path.exists() else {}
    for other in others:
        for name, row in load_rows(other).items():
            draws = rows.get(name, {}).get("draws", {}) | row["draws"]
            rows[name] = row | {"draws": dict(sorted(draws.items()))}
    write_rows(path, rows)


def paired(ours: dict[str, Any], peer: dict[str, Any]) -> np.ndarray:
    """The KL of both sides, sequence by sequence, over the draws that both have.

    What needs no calibration has one draw, which then stands for all.

    Args:
        ours: a row.
        peer: a row.

    Returns:
        float64 [2, draws, sequences].
    """
    sides = (ours, peer)
    of_calibrated = [set(row["draws"]) for row in sides if row["calibrated"]]
    draws = sorted(set.intersection(*of_calibrated)) if of_calibrated else ["0"]
    used = [draws if row["calibrated"] else ["0"] * len(draws) for row in sides]
    return np.array(
        [[row["draws"][draw]["sequences"] for draw in chosen] for row, chosen in zip(sides, used, strict=True)]
    )


def ratio_of(kl: np.ndarray) -> tuple[float, float, float]:
    """The ratio of mean KL, ours over theirs, with a 95 % interval of a paired bootstrap over draws and sequences.

    Args:
        kl: [2, draws, sequences] of `paired`.

    Returns:
        (ratio, low, high).
    """
    _, draws, sequences = kl.shape
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, draws, (RESAMPLES, draws, 1)), rng.integers(0, sequences, (RESAMPLES, 1, sequences))
    ours, theirs = kl[:, *chosen].mean((2, 3))
    low, high = np.quantile(ours / theirs, (0.025, 0.975))
    return float(kl[0].mean() / kl[1].mean()), float(low), float(high)


def comparison_table(rows: dict[str, Any]) -> str:
    """The comparisons as Markdown, those whose rows are there."""
    lines = [
        "| ours | bits | KL | peer | bits | KL | draws | ours / peer (95 %) | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for bar in BARS:
        if bar.ours in rows and bar.peer in rows:
            kl = paired(rows[bar.ours], rows[bar.peer])
            ratio, low, high = ratio_of(kl)
            names = (bar.ours, bar.peer)
            sides = [f"{n} | {rows[n]['bits']:.3f} | {k:.3g}" for n, k in zip(names, kl.mean((1, 2)), strict=True)]
            aim = f"{bar.limit:.2f}: {'met' if ratio <= bar.limit else 'missed'}"
            lines.append(f"| {' | '.join(sides)} | {kl.shape[1]} | {ratio:.3f} ({low:.3f} to {high:.3f}) | {aim} |")
    return "\n".join(lines)


def flags_table(rows: dict[str, Any]) -> str:
    """How each peer ran, as Markdown."""
    lines = ["| peer | draws | flags | versions |", "|---|---|---|---|"]
    for name, row in rows.items():
        if row["side"] == "peer":
            texts = (", ".join(f"{key} {value}" for key, value in row[part].items()) for part in ("flags", "versions"))
            lines.append(f"| {name} | {len(row['draws'])} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.peers", description="Our recipes beside the peers'.")
    parser.add_argument("what", choices=("ours", "theirs", "merge", "table"))
    parser.add_argument("--names", help="comma-separated recipes of ours, or peers; default: those compared")
    parser.add_argument("--peers", type=pathlib.Path, help="folder that holds draw0/PEER, draw1/PEER, ...")
    parser.add_argument("--model", type=pathlib.Path, default=EMBEDDED_MODEL)
    parser.add_argument("--calibration", type=pathlib.Path, nargs="+", default=DRAWS, help="one .npy for each draw")
    parser.add_argument("--draws", default="0,1,2", help="which of them")
    parser.add_argument("--sequences", type=int, default=200, help="evaluate on the first so many: 200")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--others", type=pathlib.Path, nargs="+", help="results files to merge into --json")
    args = parser.parse_args(argv)
    if args.what == "merge":
        merge_rows(args.json, args.others)
        return
    if args.what == "table":
        print(comparison_table(load_rows(args.json)))
        return
    side = "ours" if args.what == "ours" else "peer"
    names = args.names.split(",") if args.names else list(dict.fromkeys(getattr(bar, side) for bar in BARS))
    config, params = load_hf(args.model)
    model, params = Decoder(config), jax.device_put(params)
    start = time.perf_counter()
    meter = Meter(model, params, np.load(args.model / "evaluation.npy")[: args.sequences])
    print(f"float model: {time.perf_counter() - start:.1f} s", flush=True)
    for draw in map(int, args.draws.split(",")):
        for name in names:
            if side == "ours" and (draw == 0 or get_recipes(name)[name].calibrated):
                row = measure_ours(meter, model, params, name, np.load(args.calibration[draw]))
            elif side == "peer" and (args.peers / f"draw{draw}" / name / "peer.json").exists():
                row = measure_theirs(meter, model, args.peers / f"draw{draw}" / name)
            else:
                continue
            print(f"draw {draw} {name}: KL {row['draw']['kl']:.4g}, {row['draw']['seconds']:.1f} s", flush=True)
            put_row(args.json, side, name, draw, row)


if __name__ == "__main__":
    main()
