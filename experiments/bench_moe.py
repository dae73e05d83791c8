"""A whole mixture-of-experts layer, routing to weighted sum, beside its products: verified, then timed, on a GPU.

    python -m experiments.bench_moe [--layers A B] [--tokens 64 1024] [--json FILE] [--seconds S]

Each row runs in a worker process, which compiles all of its programs before its turn at the device. W4A16 experts in
groups of 128, gate and up merged, tokens routed by random logits. "layer" is every kernel of `jq.moe` by the profiler,
"products" its grouped products alone, "wall" the time of a call among many enqueued.
"""

import argparse
import functools
import itertools
import pathlib
import statistics

import jax
import jax.numpy as jnp

import jaxquant as jq
from experiments import _bars, _bench, _workers
from experiments._clock import microseconds_of_each_kernel, rotations, wall_microseconds
from jaxquant.arrays._packed import INT4_LAYOUT
from pallas_kernels.grouped_matmul import separate
from pallas_kernels.grouped_matmul.cases import LAYERS
from pallas_kernels.int4_matmul import dequantize

GROUP = 128
# x, the hidden rows, the experts' outputs and the result are rounded to bfloat16, and so is each weight of the two
# products where it is scaled first: half an eps each, silu's slope reaching 1.1.
TOLERANCE = 8 * 2.0**-8
# Of the oracle: the device must be still while another worker measures.
UNSEARCHED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def main() -> None:
    """Runs the bench, or as a worker its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="*", type=int, default=[64, 256, 1024, 4096, 16, 1], help="most wanted first")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.worker:
        return _workers.serve(lambda item: measure(item["shape"], item["m"]))
    rows = _workers.run(
        "experiments.bench_moe",
        [{"shape": layer, "m": m} for m, layer in itertools.product(arguments.tokens, arguments.layers)],
        workers=arguments.workers,
        seconds=arguments.seconds,
        on_result=lambda row: print(line(row), flush=True),
    )
    _bench.finish(arguments.json, bars(rows), rows=rows)


def bars(rows: list[dict]) -> list[dict]:
    """The whole layer within 1.25 of its products from 64 tokens up."""
    timed = [row for row in rows if "layer_us" in row and row["m"] >= 64]
    return [
        _bars.bar(f"{r['shape']} {r['m']} tokens, layer beside products", r["layer_us"], r["products_us"], 1 / 1.25)
        for r in timed
    ]


def random_experts(key: jax.Array, experts: int, k: int, n: int) -> jq.QArray:
    """A packed int4 weight [E, K, N]: any word is eight codes."""
    words, scales = jax.random.split(key)
    codes = jax.random.bits(words, (experts, -(-n // 64), -(-k // 64), 2, 256), jnp.uint32)
    scale = jax.random.uniform(scales, (experts, k // GROUP, n), jnp.float32, 0.5, 1.5) * 0.2 / k**0.5
    empty = dict.fromkeys(("zero_point", "pre_scale", "act_scale", "act_zero_point", "perm", "activation"))
    form = {"qtype": "int4", "axis": (-2,), "trailing": (k, n), "padded": k, "dtype": jnp.dtype(jnp.bfloat16)}
    packed = {"qvalue": jax.lax.bitcast_convert_type(codes, jnp.int32), "layout": INT4_LAYOUT}
    return jq.QArray(scale=scale.astype(jnp.bfloat16), **packed, **form, **empty)


@functools.partial(jax.jit, static_argnums=4)
def exact(x: jax.Array, logits: jax.Array, merged: jq.QArray, down: jq.QArray, routing: jq.Routing) -> jax.Array:
    """The layer in float32, every expert computed for every token, expert by expert."""
    weights, chosen = jq.route(logits, routing)
    gates = jnp.zeros(logits.shape).at[jnp.arange(len(x))[:, None], chosen].set(weights)

    def expert(total, operands):
        (up_words, up_scale, down_words, down_scale), share = operands
        product = functools.partial(jnp.matmul, precision="highest")
        gate, up = separate(product(x.astype(jnp.float32), dequantize(up_words, up_scale, None, x.shape[1])))
        hidden = jax.nn.silu(gate) * up
        return total + share[:, None] * product(hidden, dequantize(down_words, down_scale, None, hidden.shape[1])), None

    leaves = merged.qvalue, merged.scale, down.qvalue, down.scale
    return jax.lax.scan(expert, jnp.zeros(x.shape), (leaves, gates.T))[0]


def measure(layer: str, tokens: int) -> dict:
    """One row: the error of the layer, then its times."""
    experts, width, hidden, top = LAYERS[layer]
    routing = jq.Routing(per_token=top)
    copies = -(-int(240e6) // (experts * width * hidden * 3 // 2))
    calls = rotations(min(experts, tokens * top) * width * hidden * 3 // 2)

    def draw(key: jax.Array):
        x, *keys = jax.random.split(key, 1 + 2 * copies + calls)
        sizes = (width, 2 * hidden), (hidden, width)
        weights = [[random_experts(keys.pop(), experts, *size) for size in sizes] for _ in range(copies)]
        logits = [jax.random.normal(keys.pop(), (tokens, experts)) for _ in range(calls)]
        return jax.random.normal(x, (tokens, width), jnp.bfloat16), logits, weights

    def layers(x: jax.Array, logits: list[jax.Array], weights: list) -> list[jax.Array]:
        chosen = (weights[i % copies] for i in range(calls))
        return [jq.moe(x, a, merged, None, down, routing) for a, (merged, down) in zip(logits, chosen, strict=True)]

    made = jax.jit(draw).lower(jax.random.key(0)).compile()
    program = jax.jit(layers).lower(*made.out_info).compile()
    x, logits, weights = made.out_info
    wanted = exact.lower(x, logits[0], *weights[0], routing).compile(compiler_options=UNSEARCHED)
    row = {"calls": calls}
    with _workers.device_turn():
        given = x, logits, weights = made(jax.random.key(tokens))
        got, again = program(*given), program(*given)
        row["deterministic"] = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
        if tokens <= 256:
            right = wanted(x, logits[0], *weights[0])
            row["error_norm"] = float(jnp.linalg.norm(got[0].astype(jnp.float32) - right) / jnp.linalg.norm(right))
        if not (row.get("error_norm", 0.0) <= TOLERANCE and row["deterministic"]):
            return row | {"error": f"wrong: {row}"}
        total, each = microseconds_of_each_kernel(program, given, iterations=5)
        wall = wall_microseconds(program, given, calls=calls)
    times = sorted((us for _, us in each), reverse=True)
    products = sum(times[: 2 * calls])  # the grouped products are the longest kernels by far
    rest: dict[str, list[float]] = {}
    for name, us in each:
        rest.setdefault(name, []).append(us)
    return row | {
        "layer_us": total / calls,
        "products_us": products / calls,
        "wall_us": wall,
        "kernels": len(each) / calls,
        "each": {name: [len(us), round(statistics.median(us), 2)] for name, us in rest.items()},
    }


def line(row: dict) -> str:
    """A row as text."""
    head = f"{row['shape']:>14} {row['m']:>6} "
    if "error" in row:
        return head + row["error"]
    checked = f", error {row['error_norm']:.1e}" if "error_norm" in row else ""
    share = row["layer_us"] / row["products_us"]
    return head + (
        f"layer {row['layer_us']:9.1f} us, products {row['products_us']:9.1f} ({share:.2f}x), wall "
        f"{row['wall_us']:9.1f}, {row['kernels']:.1f} kernels{checked}"
    )


if __name__ == "__main__":
    main()
