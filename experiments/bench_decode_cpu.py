"""How long one decode step of the embedded model takes on this CPU, float32 against quantized weights.

    python -m experiments.bench_decode_cpu [--rounds 60] [--steps 8] [--json F]

A round times `steps` greedy tokens of each recipe in turn, one sequence, each step one call of the jitted program with
its cache donated, as a server would. The fastest round of each counts: the one that other work on the machine disturbed
least. The median ratio within a round stands beside.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments.accuracy import EMBEDDED_MODEL
from experiments.models.decoder import Decoder
from experiments.models.hf import load_hf

CAPACITY = 256  # tokens of the cache
PRESETS = ("w8a16", "w4a16", "w4a16-asym", "w8a8", "w4a8")


def stepper(model: Decoder, params: Any, steps: int) -> Any:
    """A function that decodes `steps` tokens from an empty cache and returns the seconds that took."""
    run = jax.jit(jq.quantized(model.decode_step, on_dense="error"), donate_argnums=2)

    def timed() -> float:
        token, cache = jnp.ones(1, jnp.int32), jax.block_until_ready(model.init_cache(1, CAPACITY))
        start = time.perf_counter()
        for _ in range(steps):
            logits, cache = run(params, token, cache)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        jax.block_until_ready(token)
        return time.perf_counter() - start

    return timed


def measure(model: Decoder, params: Any, presets: tuple[str, ...], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step of the float32 model and of each preset, and their ratio.

    Args:
        model: the architecture, computing in float32.
        params: float32 parameters.
        presets: names of `QuantConfig.preset`.
        rounds: the fastest counts; one more compiles.
        steps: tokens decoded in a round.

    Returns:
        One row for each preset.
    """
    trees = {"float32": params} | {name: jq.quantize(params, jq.QuantConfig.preset(name)) for name in presets}
    timers = {name: stepper(model, tree, steps) for name, tree in trees.items()}
    times = [{name: timer() for name, timer in timers.items()} for _ in range(rounds + 1)][1:]

    fastest = {name: min(row[name] for row in times) * 1e3 / steps for name in timers}
    return [
        {
            "recipe": name,
            "milliseconds": fastest[name],
            "float32_milliseconds": fastest["float32"],
            "ratio": fastest[name] / fastest["float32"],
            "median_ratio": statistics.median(row[name] / row["float32"] for row in times),
        }
        for name in presets
    ]


def main() -> None:
    """Measures, prints a line for each preset, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="the fastest counts")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded in a round")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
    args = parser.parse_args()
    config, params = load_hf(EMBEDDED_MODEL)
    params = jax.tree.map(lambda p: jnp.asarray(p.astype(np.float32)), params)
    rows = measure(Decoder(config), params, PRESETS, args.rounds, args.steps)
    for row in rows:
        print(
            f"{row['recipe']:12} {row['milliseconds']:.2f} ms a step, float32 {row['float32_milliseconds']:.2f} ms:"
            f" {row['ratio']:.2f} x (median of rounds {row['median_ratio']:.2f} x)"
        )
    if args.json:
        result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
