"""The main job end to end on the embedded model: quantize, evaluate, save, restore, generate (`make quickstart`)."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import jaxquant as jq
from experiments.accuracy import EMBEDDED_MODEL, Row, measure, progress_bar
from experiments.models.decoder import Decoder
from experiments.models.generate import generate
from experiments.models.hf import load_hf
from experiments.recipes import get_recipes

RESULTS = pathlib.Path(__file__).parent / "results"
RECIPES = "float,rtn-w8,rtn-w4,rtn-w4-asym,rtn-w3,w8a8,fp8"
GENERATED_BY = "rtn-w4"
SEQUENCES = 48  # of the evaluation tokens: enough to tell the recipes apart within the quickstart's minutes
PROMPT = "    def __init__(self, name, value=None):\n"
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the quickstart's table: the accuracy row, and the bytes of the saved checkpoint."""

    row: Row
    disk_bytes: int


def main() -> None:
    """Runs the whole job, prints one table, and writes it as JSON and as a picture."""
    start, console = time.perf_counter(), Console()
    config, params = load_hf(EMBEDDED_MODEL)
    params = jax.device_put(params)
    tokens = np.load(EMBEDDED_MODEL / "evaluation.npy", allow_pickle=False)[:SEQUENCES]
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        with progress_bar(console) as bar:
            for name, recipe in get_recipes(RECIPES).items():
                model = Decoder(config, dtype=jnp.bfloat16 if recipe.config is None else jnp.float32)
                label = "bfloat16" if recipe.config is None else name
                task = bar.add_task(label, total=len(tokens))
                row, qparams = measure(
                    label, recipe, model, params, None, tokens, lambda n, task=task: bar.advance(task, n)
                )
                saved = pathlib.Path(scratch) / name
                jq.save(saved, qparams)
                lines.append(Line(row, bytes_on_disk(saved)))
        console.print(_table(lines, len(tokens)))
        before, after = _generate_twice(Decoder(config), params, pathlib.Path(scratch) / GENERATED_BY)
    if before != after:
        raise SystemExit(f"error: the restored parameters generate other text: {before!r} and {after!r}")
    console.print(f"{GENERATED_BY}, restored with no template and no model, writes the same text before and after:\n")
    console.print(before, markup=False, highlight=False)
    seconds = time.perf_counter() - start
    _write(lines, seconds)
    console.print(f"\nwrote {RESULTS.name}/quickstart.json and quickstart.png; {seconds:.0f} s in all")


def bytes_on_disk(folder: pathlib.Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _generate_twice(model: Decoder, params: Any, saved: pathlib.Path) -> tuple[str, str]:
    """The text from parameters quantized in this process, and from those restored from disk."""
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    prompt = jnp.asarray([tokenizer.encode(PROMPT).ids], jnp.int32)
    write = jax.jit(jq.quantized(lambda p, prompt: generate(model, p, prompt, NEW_TOKENS), on_dense="error"))
    fresh = jq.quantize(params, get_recipes(GENERATED_BY)[GENERATED_BY].config)
    before, after = (tokenizer.decode(np.asarray(write(p, prompt))[0].tolist()) for p in (fresh, jq.load(saved)))
    return before, after


def _table(lines: list[Line], sequences: int) -> Table:
    out = Table(
        title=f"the embedded model, {sequences} held-out sequences of 512 tokens",
        caption="bits a weight, scales counted; parameters in memory; KL against float32 arithmetic",
    )
    for column in ("recipe", "bits", "MB", "MB on disk", "perplexity", "KL", "seconds"):
        out.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for line in lines:
        row = line.row
        sizes = (f"{row.bits:.3f}", f"{row.bytes / 1e6:.2f}", f"{line.disk_bytes / 1e6:.2f}")
        out.add_row(row.recipe, *sizes, f"{row.ppl:.4f}", f"{row.kl:.2g}", f"{row.seconds:.2f}")
    return out


def _write(lines: list[Line], seconds: float) -> None:
    """Writes the table as JSON, and as a picture of KL against size."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sequences": SEQUENCES,
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(line.row) | {"disk_bytes": line.disk_bytes} for line in lines],
    }
    (RESULTS / "quickstart.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _draw(lines, RESULTS / "quickstart.png")


def _draw(lines: list[Line], path: pathlib.Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # the backend must be chosen before pyplot is imported

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for place, line in enumerate(lines):
        at, beside = (line.row.bytes / 1e6, line.row.kl), (6, -12 if place % 2 else 4)  # neighbours' names part
        axes.scatter(*at, s=45)
        axes.annotate(line.row.recipe, at, beside, textcoords="offset points")
    axes.set(yscale="log", xlabel="parameters in memory, MB", ylabel="KL(float || quantized), nats a token")
    axes.set_title("Lower and further left is better")
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
