"""GPTQ of the embedded mixture with few calibration tokens: routed to each expert, borrowed from its layer, or all.

    python -m experiments.expert_tokens --json experiments/results/expert_tokens.json

KL to the float model over 32 held-out sequences, W4 in groups of 128 (recipe gptq-w4 of `experiments.recipes`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments.accuracy import EMBEDDED_MODEL
from experiments.evaluation import evaluate
from experiments.models import Decoder, load_hf
from experiments.recipes import RECIPES

MODEL = EMBEDDED_MODEL.with_name("tiny_moe")
EVALUATED = 32  # sequences
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"borrow": 0.02}, {"borrow": 0.1}, {"expert_tokens": "all"})


def main() -> None:
    """Quantizes and evaluates once for each number of sequences and option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="1,4", help="calibration sequences of 512 tokens, comma-separated")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    config, params = load_hf(MODEL)
    params, model = jax.device_put(params), Decoder(config)
    calibration, tokens = (np.load(MODEL / f"{name}.npy") for name in ("calibration", "evaluation"))
    recipe, rows = RECIPES["gptq-w4"].config, []

    def kl(qparams: Any) -> float:
        forward = jq.quantized(model.forward, on_dense="error")
        return float(evaluate(model.forward, params, forward, qparams, tokens[:EVALUATED]).kl.mean())

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows.append(row)

    add({"recipe": "rtn-w4", "kl": kl(jq.quantize(params, RECIPES["rtn-w4"].config))})
    for count in map(int, arguments.sequences.split(",")):
        batches = [jnp.asarray(calibration[n : n + 1, :-1].astype(np.int32)) for n in range(count)]
        for options in OPTIONS:
            report = jq.Report()
            data = {"apply_fn": model.forward, "batches": batches, "report": report, "unseen": "rtn"}
            qparams = jq.quantize(params, recipe, **data, **options)
            fewest = min(row.tokens for row in report.rows)
            add({"recipe": "gptq-w4", "sequences": count, **options, "fewest_tokens": fewest, "kl": kl(qparams)})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
