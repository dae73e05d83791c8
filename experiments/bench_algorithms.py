"""How long each algorithm takes for the products of one Llama-3-8B layer, on one GPU.

    python -m experiments.bench_algorithms [--scale 1] [--json F]

Weights of one input are side by side, as the walk gives them to an algorithm. A stage's seconds are the fastest of
three runs after compilation; `model` is 32 layers' worth, walking and loading not counted. `--scale 16` divides every
dimension, to try the script on a CPU.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp

from jaxquant.algorithms._apply import quantize_weight
from jaxquant.algorithms._factor import factor_upper, regularize
from jaxquant.algorithms._statistics import init_statistics, update_statistics
from jaxquant.algorithms._transform import chain
from jaxquant.algorithms.awq import awq
from jaxquant.algorithms.gptq import gptq
from jaxquant.algorithms.rtn import rtn
from jaxquant.arrays._spec import PerGroup, QuantSpec, TensorSpec

PRODUCTS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
LAYERS = 32
TOKENS = 128 * 2048
BATCH = 2048
NEEDS = {"hessian", "mean_abs"}
SIGNED = QuantSpec(TensorSpec("int4", PerGroup(128), range="mse", grid="signed", scale_dtype="bfloat16"))
PLAIN = QuantSpec(TensorSpec("int4", PerGroup(128), scale_dtype="bfloat16"))
ALGORITHMS = {
    "rtn": (PLAIN, rtn()),
    "gptq_reference": (PLAIN, gptq(scales="static", rounds=0)),
    "gptq_rounds_0": (SIGNED, gptq(rounds=0)),
    "gptq": (SIGNED, gptq()),
    "awq": (PLAIN, awq()),
    "awq_gptq": (SIGNED, chain(awq(clip=False), gptq())),
}


def fastest_seconds(fn, *args) -> tuple[float, float]:
    """(seconds of the first call, of the fastest of three more)."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:])


def inputs(key: jax.Array, channels: int, tokens: int) -> jax.Array:
    """Correlated bfloat16 activations with uneven channels."""
    mix, noise, spread = jax.random.split(key, 3)
    shared = jax.random.normal(mix, (tokens, 64)) @ jax.random.normal(noise, (64, channels)) / 4
    x = shared + jax.random.normal(noise, (tokens, channels))
    return (x * jnp.exp(jax.random.normal(spread, (1, channels)))).astype(jnp.bfloat16)


def bench_product(shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Seconds of each stage and algorithm for one product."""
    channels = shape[0]
    x = inputs(jax.random.key(0), channels, BATCH)
    w = (jax.random.normal(jax.random.key(1), shape) * 0.02).astype(jnp.bfloat16)
    update, empty = jax.jit(update_statistics), init_statistics(NEEDS, channels)
    stats = update(empty, x)
    rows = {"statistics": fastest_seconds(update, stats, x)}
    rows["factor"] = fastest_seconds(jax.jit(lambda h: factor_upper(regularize(h)[0], 0.01)), stats.hessian)
    for name, (spec, transform) in ALGORITHMS.items():
        rows[name] = fastest_seconds(lambda s=spec, t=transform: quantize_weight(w, s, t, stats))
    return {name: {"first": first, "again": again} for name, (first, again) in rows.items()}


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    table = {}
    for product, shape in PRODUCTS.items():
        table[product] = bench_product((shape[0] // options.scale, shape[1] // options.scale))
        for stage, seconds in table[product].items():
            print(f"{product:8} {stage:16} {seconds['again']:9.4f} s   first {seconds['first']:7.2f} s", flush=True)
    stages = table["down"]
    model = {stage: LAYERS * sum(rows[stage]["again"] for rows in table.values()) for stage in stages}
    model["statistics"] *= TOKENS / BATCH
    for stage, seconds in model.items():
        print(f"model    {stage:16} {seconds:9.1f} s")
    if options.json:
        device = jax.devices()[0].device_kind
        options.json.write_text(json.dumps({"device": device, "products": table, "model": model}, indent=1))


if __name__ == "__main__":
    main()
