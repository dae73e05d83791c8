"""How fast round-to-nearest is, against the same arithmetic written by hand for one case.

    python -m experiments.bench_rtn [--gigabytes 1] [--rounds 5] [--json F]

For each recipe a float32 tree of [4096, 8192] matrices is quantized in three ways, taken in turns, the fastest of the
rounds counting: `hand`, the jitted absmax, round and pack of that recipe and nothing else; `array`, the library's
`quantize_array` alone; `tree`, `quantize` as users call it, which also checks every weight for NaN and Inf.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant._quantize import quantize
from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS, QuantConfig

SHAPE = (4096, 8192)
GROUP = 128


def int8_channels(w):
    """absmax, round: one scale a column."""
    scale = jnp.max(jnp.abs(w), 0, keepdims=True) / 127.5
    return jnp.clip(jnp.round(w / scale), -128, 127).astype(jnp.int8), scale


def int4_groups(w):
    """absmax, round, pack: one bfloat16 scale for 128 rows of a column, two codes a byte."""
    groups = w.reshape(-1, GROUP, w.shape[1])
    scale = (jnp.max(jnp.abs(groups), 1) / 7.5).astype(jnp.bfloat16)
    codes = jnp.clip(jnp.round(groups / scale[:, None].astype(jnp.float32)), -8, 7) + 8
    return _pairs(codes.astype(jnp.uint8), w.shape), scale


def uint4_groups(w):
    """minmax, round, pack: a scale and a zero point for 128 rows of a column."""
    groups = w.reshape(-1, GROUP, w.shape[1])
    low, high = jnp.minimum(jnp.min(groups, 1), 0), jnp.maximum(jnp.max(groups, 1), 0)
    scale = ((high - low) / 15).astype(jnp.bfloat16)
    step = scale.astype(jnp.float32)
    zero_point = jnp.round(-low / step)
    codes = jnp.clip(jnp.round(groups / step[:, None]) + zero_point[:, None], 0, 15)
    return _pairs(codes.astype(jnp.uint8), w.shape), scale, zero_point.astype(jnp.uint8)


def float8_channels(w):
    """absmax, round to float8: one scale a column."""
    scale = jnp.max(jnp.abs(w), 0, keepdims=True) / 448
    return (w / scale).astype(jnp.float8_e4m3fn), scale


def _pairs(codes, shape):
    pairs = codes.reshape(shape[0] // 2, 2, shape[1])
    return pairs[:, 0] | (pairs[:, 1] << 4)


HAND = {"w8a16": int8_channels, "w4a16": int4_groups, "w4a16-asym": uint4_groups, "fp8": float8_channels}


def measure(recipe: str, arrays: list[jax.Array], rounds: int) -> dict:
    """Seconds of each way over all arrays, and how they compare with the hand-written one."""
    by_hand = jax.jit(HAND[recipe])
    by_array = jax.jit(functools.partial(quantize_array, spec=PRESETS[recipe]))
    tree, config = {f"layer_{i}": {"kernel": w} for i, w in enumerate(arrays)}, QuantConfig.preset(recipe)
    ways = {
        "hand": lambda: [jax.block_until_ready(by_hand(w)) for w in arrays],
        "array": lambda: [jax.block_until_ready(by_array(w)) for w in arrays],
        "tree": lambda: jax.block_until_ready(quantize(tree, config)),
    }
    best = dict.fromkeys(ways, float("inf"))
    for timed in range(rounds + 1):  # the first compiles
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if timed:
                best[name] = min(best[name], time.perf_counter() - start)
    size = sum(w.nbytes for w in arrays)
    return {
        "recipe": recipe,
        "gigabytes": size / 1e9,
        "seconds": best,
        "array_over_hand": best["array"] / best["hand"],
        "tree_over_hand": best["tree"] / best["hand"],
        "tree_gigabytes_per_second": size / best["tree"] / 1e9,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    """Measures every recipe and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="float32 weights to quantize")
    parser.add_argument("--rounds", type=int, default=5, help="the fastest counts")
    parser.add_argument("--json", help="where to write the rows")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    count = max(1, round(args.gigabytes * 1e9 / (4 * SHAPE[0] * SHAPE[1])))
    arrays = [jnp.asarray(rng.normal(0, 0.02, SHAPE).astype(np.float32)) for _ in range(count)]
    rows = [measure(recipe, arrays, args.rounds) for recipe in HAND]
    for row in rows:
        print(
            f"{row['recipe']:12} array {row['array_over_hand']:5.2f} x, tree {row['tree_over_hand']:5.2f} x the"
            f" hand-written program; {row['tree_gigabytes_per_second']:.1f} GB/s"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
