"""How long a whole model of Llama-3-8B's shapes takes to quantize, and how much memory, on one GPU.

    python -m experiments.bench_quantize [--algorithms rtn,gptq,awq] [--layers 32] [--sequences 128] [--json F]

Weights are random, scaled as trained ones are (normal, 1 / sqrt(inputs)), bfloat16, real widths and depth; calibration
is random tokens, 2048 a sequence. GPTQ and AWQ run in one sequential pass, in which one weight's statistics live at a
time. `compile` is what XLA took, `weights` what rounding took, `model` the rest: the model's own products, statistics
and dispatch. `--scale 16` divides every width, to try the script on a CPU.
"""

import argparse
import gc
import json
import pathlib
import time

import jax
import jax.monitoring
import jax.numpy as jnp

import jaxquant as jq
from experiments import _clock
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder

LENGTH = 2048
BATCH = 4  # sequences a step
SIGNED = jq.QuantSpec(jq.TensorSpec("int4", jq.PerGroup(128), range="mse", grid="signed", scale_dtype="bfloat16"))
PLAIN = jq.QuantSpec(jq.TensorSpec("int4", jq.PerGroup(128), scale_dtype="bfloat16"))
CONFIGS = {
    "rtn": jq.QuantConfig(PLAIN),
    "gptq": jq.QuantConfig(SIGNED, algorithm=jq.gptq()),
    "gptq_rounds_0": jq.QuantConfig(SIGNED, algorithm=jq.gptq(rounds=0)),
    "awq": jq.QuantConfig(PLAIN, algorithm=jq.awq()),
}


def llama_shapes(layers: int, scale: int) -> DecoderConfig:
    """Llama-3-8B, or that divided."""
    return DecoderConfig(
        vocab_size=128256 // scale,
        hidden_size=4096 // scale,
        intermediate_size=14336 // scale,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=max(2, 128 // scale),
        rope_theta=500000.0,
    )


def random_params(model: Decoder) -> dict:
    """Weights of variance 1 / inputs, norms of one, in bfloat16; made leaf by leaf."""
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    make = jax.jit(
        lambda key, shape: (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(jnp.bfloat16), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(1), len(leaves))
    made = [
        make(key, leaf.shape) if leaf.ndim > 1 else jnp.ones(leaf.shape, jnp.bfloat16)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.block_until_ready(jax.tree.unflatten(tree, made))


def measure(name: str, model: Decoder, params: dict, batches: list[jax.Array]) -> dict:
    """Seconds of each stage, and peak memory."""
    compiled: list[float] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    config, report = CONFIGS[name], jq.Report()
    options = {} if config.algorithm is None else {"apply_fn": model.forward, "batches": batches, "sequential": True}
    start = time.perf_counter()
    qparams = jax.block_until_ready(jq.quantize(params, config, report=report, **options))
    total, weights = time.perf_counter() - start, sum(row.seconds for row in report.rows)
    seconds = {"total": total, "weights": weights, "compile": sum(compiled), "model": total - weights}
    errors = [row.error / row.error_rtn for row in report.rows if row.error is not None and row.error_rtn]
    stats = jax.devices()[0].memory_stats() or {}
    summary = jq.summary(qparams)
    return {
        "algorithm": name,
        "layers": model.config.num_hidden_layers,
        "tokens": sum(batch.size for batch in batches),
        "seconds": seconds,
        "slowest_weights": sorted(((row.seconds, row.path) for row in report.rows), reverse=True)[:8],
        "error_over_rtn": sum(errors) / len(errors) if errors else None,
        "bits": summary.bits_per_weight,
        "peak_gigabytes": stats.get("peak_bytes_in_use", 0) / 1e9,
    }


def main() -> None:
    """Measures each algorithm and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="rtn,gptq,awq", help=f"comma-separated; there are {', '.join(CONFIGS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--scale", type=int, default=1, help="divides every width")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
    args = parser.parse_args()
    model = Decoder(llama_shapes(args.layers, args.scale), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params, length = random_params(model), LENGTH // args.scale
    tokens = jax.random.randint(jax.random.key(2), (args.sequences, length), 0, model.config.vocab_size, jnp.int32)
    batches = [tokens[start : start + BATCH] for start in range(0, args.sequences, BATCH)]
    rows = []
    for name in args.algorithms.split(","):
        gc.collect()
        rows.append(measure(name, model, params, batches))
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in rows[-1]["seconds"].items())
        print(f"{name:14} {seconds}; peak {rows[-1]['peak_gigabytes']:.1f} GB", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            report = {"conditions": _clock.conditions(), "rows": rows}
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
