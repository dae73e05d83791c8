"""Evaluates recipes on any Hugging Face folder of the Llama family: `python -m experiments.accuracy --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxquant as jq
from experiments.evaluation import evaluate
from experiments.memory import peak_bytes, reset_peak
from experiments.models.decoder import Decoder, Params
from experiments.models.generate import continue_text
from experiments.models.hf import load_hf
from experiments.recipes import RECIPES, Recipe, get_recipes

BATCH = 8  # calibration sequences a step
ROUNDS = 6  # of distillation over all texts
DEFAULT = "float,rtn-w8,rtn-w4,rtn-w4-asym,rtn-w3,w8a8,fp8"
IMPORTED = {"imported": Recipe(None, "a quantized folder, as it is")}
EMBEDDED_MODEL = pathlib.Path(__file__).parent / "models" / "tiny_python"


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one recipe.

    Attributes:
        recipe: its name.
        bits: bits a quantized weight, scales counted; those of the checkpoint for the float model.
        bytes: bytes of all parameters in memory.
        ppl: perplexity.
        kl: mean KL(float || quantized), nats a token.
        top1: share of tokens where both models' likeliest next tokens agree.
        seconds: of quantization, compilation included.
        peak_bytes: peak memory of quantization and evaluation.
    """

    recipe: str
    bits: float
    bytes: int
    ppl: float
    kl: float
    top1: float
    seconds: float
    peak_bytes: int


def quantize_recipe(model: Decoder, params: Params, recipe: Recipe, calibration: np.ndarray | None) -> Any:
    """Quantizes the model's parameters by a recipe.

    Args:
        model: the architecture.
        params: float parameters.
        recipe: how; its `config` is not None.
        calibration: integer [sequences, T + 1], for recipes that need it.

    Returns:
        The quantized parameter tree, ready on the device.

    Raises:
        ValueError: the recipe needs calibration tokens and there are none.
    """
    if recipe.calibrated and calibration is None:
        raise ValueError(f"{recipe.summary}: needs calibration tokens; give --calibration X.npy")
    if not recipe.calibrated:
        return jax.block_until_ready(jq.quantize(params, recipe.config))
    inputs = np.asarray(calibration)[:, :-1].astype(np.int32)
    written = continue_text(model, params, inputs, max(recipe.continued, recipe.distilled))
    batches = batches_of(np.concatenate([inputs, *written[: recipe.continued]]))
    options = {"apply_fn": model.forward, "batches": batches, "sequential": recipe.sequential}
    qparams = jq.quantize(params, recipe.config, **options)
    if recipe.distilled:
        batches = batches_of(np.concatenate([inputs, *written]))
        steps = ROUNDS * (len(batches) - 1)
        qparams = jq.distill(model.clone(dtype=jnp.float32).forward, params, qparams, batches, steps=steps)
    return jax.block_until_ready(qparams)


def batches_of(tokens: np.ndarray) -> list[jax.Array]:
    """Sequences as the batches that calibrate, a step each."""
    return [jnp.asarray(tokens[start : start + BATCH]) for start in range(0, len(tokens), BATCH)]


def measure(
    name: str,
    recipe: Recipe,
    model: Decoder,
    params: Params,
    calibration: np.ndarray | None,
    tokens: np.ndarray,
    progress: Callable[[int], None],
) -> tuple[Row, Any]:
    """Quantizes by one recipe and compares the result with the float model computed in float32.

    Where `params` are quantized already, the float model is that of the weights they stand for.

    Args:
        name: the recipe's name in the row.
        recipe: how to quantize.
        model: the architecture, and the dtype that the model under test computes in.
        params: float parameters; quantized ones where the recipe keeps the checkpoint's own weights.
        calibration: integer [sequences, T + 1] or None.
        tokens: integer [sequences, T + 1] to evaluate on.
        progress: called with the number of sequences done in each step.

    Returns:
        (the row, the quantized parameters).
    """
    reset_peak()
    start = time.perf_counter()
    qparams = params if recipe.config is None else quantize_recipe(model, params, recipe, calibration)
    seconds = time.perf_counter() - start
    summary = jq.summary(qparams)
    forward = jq.quantized(model.forward, on_dense="error") if summary.bits_per_weight else model.forward
    reference = model.clone(dtype=jnp.float32).forward
    result = evaluate(reference, jq.dequantize(params), forward, qparams, tokens, progress=progress)
    bits = summary.bits_per_weight or 8.0 * np.dtype(jax.tree.leaves(params)[0].dtype).itemsize
    means = (result.perplexity, float(result.kl.mean()), float(result.agreement.mean()))
    return Row(name, bits, summary.nbytes, *means, seconds, peak_bytes()), qparams


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    out = Table(title=title)
    for column in ("recipe", "bits", "MB", "perplexity", "KL", "top-1", "seconds", "peak MB"):
        out.add_column(column, justify="left" if column == "recipe" else "right")
    for row in rows:
        numbers = (f"{row.bits:.3f}", f"{row.bytes / 1e6:.2f}", f"{row.ppl:.4f}", f"{row.kl:.3g}", f"{row.top1:.4f}")
        out.add_row(row.recipe, *numbers, f"{row.seconds:.2f}", f"{row.peak_bytes / 1e6:.0f}")
    return out


def progress_bar(console: Console) -> Progress:
    """A bar that counts sequences."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run(
    folder: pathlib.Path,
    recipes: dict[str, Recipe] | None,
    tokens: np.ndarray,
    calibration: np.ndarray | None,
    json_path: pathlib.Path | None,
) -> list[Row]:
    """Evaluates each recipe on the model in `folder`, with a progress bar where the terminal shows one.

    None stands for the default ones, or, where the folder is quantized (GPTQ, AWQ, compressed-tensors), for one row of
    it as it is. The rows so far are written to `json_path` after each recipe.
    """
    config, params = load_hf(folder)
    quantized = bool(jq.summary(params).bits_per_weight)
    if quantized and recipes is not None:
        raise ValueError(f"--recipes: {folder} is quantized already; leave --recipes out, or give the float model")
    recipes = recipes or (IMPORTED if quantized else get_recipes(DEFAULT))
    params = jax.device_put(params)
    model = Decoder(config)
    rows = []
    with progress_bar(Console(stderr=True)) as bar:
        for name, recipe in recipes.items():
            task = bar.add_task(name, total=len(tokens))
            row, _ = measure(
                name, recipe, model, params, calibration, tokens, lambda n, task=task: bar.advance(task, n)
            )
            rows.append(row)
            if json_path is not None:
                json_path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
                json_path.write_text(text + "\n", encoding="utf-8")
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = "\n".join(f"  {name:<16} {recipe.summary}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments.accuracy",
        description="Perplexity, KL and agreement of quantized forms of a Llama-family model.",
        epilog=f"recipes:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        default=EMBEDDED_MODEL,
        help="Hugging Face folder, float or quantized (GPTQ, AWQ, compressed-tensors); default: the embedded model",
    )
    parser.add_argument(
        "--recipes", help=f"comma-separated names; default: {DEFAULT}; of a quantized folder: only as it is"
    )
    parser.add_argument(
        "--calibration", type=pathlib.Path, help=".npy of integers [sequences, T+1]; default: the folder's own"
    )
    parser.add_argument(
        "--tokens", type=pathlib.Path, help=".npy of integers [sequences, T+1]; default: the folder's own"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
    return parser.parse_args(argv)


def load_tokens(given: pathlib.Path | None, folder: pathlib.Path, name: str) -> np.ndarray | None:
    """Reads a token array: the one given, else the model folder's own, else None."""
    path = given or folder / name
    return np.load(path, allow_pickle=False) if given or path.exists() else None


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_args(argv)
    try:
        recipes = get_recipes(args.recipes) if args.recipes is not None else None
        tokens = load_tokens(args.tokens, args.model, "evaluation.npy")
        if tokens is None:
            raise ValueError(f"{args.model} has no evaluation.npy; give --tokens Y.npy")
        calibration = load_tokens(args.calibration, args.model, "calibration.npy")
        rows = run(args.model, recipes, tokens, calibration, args.json)
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    Console().print(table(rows, f"{args.model.name}: {len(tokens)} sequences of {tokens.shape[1] - 1} tokens"))


if __name__ == "__main__":
    main()
