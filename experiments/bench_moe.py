"""A whole mixture-of-experts layer, routing to weighted sum, beside its products: verified, then timed, on a GPU.

    python -m experiments.bench_moe [--layers A B] [--tokens 64 1024] [--json FILE]

W4A16 experts in groups of 128, gate and up merged, tokens routed by random logits. "layer" is every kernel of
`jq.moe` by the profiler, "products" its grouped products alone, "wall" the time of a call among many enqueued.
"""

import argparse
import functools
import itertools
import pathlib
import statistics

import jax
import jax.numpy as jnp

import jaxquant as jq
from experiments import _bars
from experiments._clock import microseconds_of_each_kernel, rotations, wall_microseconds, write_results
from jaxquant.arrays._packed import INT4_LAYOUT
from pallas_kernels.grouped_matmul import separate
from pallas_kernels.grouped_matmul.cases import LAYERS
from pallas_kernels.int4_matmul import dequantize

GROUP = 128
# x, the hidden rows, the experts' outputs and the result are rounded to bfloat16, and so is each weight of the two
# products where it is scaled first: half an eps each, silu's slope reaching 1.1.
TOLERANCE = 8 * 2.0**-8


def main() -> None:
    """Runs the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="*", type=int, default=[64, 256, 1024, 4096, 16, 1], help="most wanted first")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = []
    for tokens, layer in itertools.product(arguments.tokens, arguments.layers):
        rows.append(measure(layer, tokens))
        print(line(rows[-1]), flush=True)
        if arguments.json:
            write_results(arguments.json, rows=rows, bars=bars(rows))
    _bars.show(bars(rows))


def bars(rows: list[dict]) -> list[dict]:
    """The whole layer within 1.25 of its products from 64 tokens up."""
    timed = [row for row in rows if "layer_us" in row and row["tokens"] >= 64]
    return [
        _bars.bar(
            f"{r['layer']} {r['tokens']} tokens, layer beside products", r["layer_us"], r["products_us"], 1 / 1.25
        )
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
    keys = iter(jax.random.split(jax.random.key(tokens), 100))
    copies = -(-int(240e6) // (experts * width * hidden * 3 // 2))
    make = jax.jit(random_experts, static_argnums=(1, 2, 3))
    weights = [
        (make(next(keys), experts, width, 2 * hidden), make(next(keys), experts, hidden, width)) for _ in range(copies)
    ]
    hit = min(experts, tokens * top)
    calls = rotations(hit * width * hidden * 3 // 2)
    x = jax.random.normal(next(keys), (tokens, width), jnp.bfloat16)
    logits = [jax.random.normal(next(keys), (tokens, experts)) for _ in range(min(calls, 16))]
    inputs = [(logits[i % len(logits)], *weights[i % copies]) for i in range(calls)]
    one = jax.jit(lambda x, logits, merged, down: jq.moe(x, logits, merged, None, down, routing))
    row = {"layer": layer, "tokens": tokens, "calls": calls}
    if tokens <= 256:
        got, again = (one(x, *inputs[0]).astype(jnp.float32) for _ in range(2))
        wanted = exact(x, *inputs[0], routing)
        row |= {
            "error": float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)),
            "deterministic": bool((got == again).all()),
        }
        if not (row["error"] <= TOLERANCE and row["deterministic"]):
            return row
    program = jax.jit(lambda x, inputs: [jq.moe(x, a, merged, None, b, routing) for a, merged, b in inputs])
    total, each = microseconds_of_each_kernel(program, (x, inputs), iterations=5)
    times = sorted((us for _, us in each), reverse=True)
    products = sum(times[: 2 * calls])  # the grouped products are the longest kernels by far
    rest: dict[str, list[float]] = {}
    for name, us in each:
        rest.setdefault(name, []).append(us)
    return row | {
        "layer_us": total / calls,
        "products_us": products / calls,
        "wall_us": wall_microseconds(program, (x, inputs), calls=calls),
        "kernels": len(each) / calls,
        "each": {name: [len(us), round(statistics.median(us), 2)] for name, us in rest.items()},
    }


def line(row: dict) -> str:
    """A row as text."""
    head = f"{row['layer']:>14} {row['tokens']:>6} "
    if "layer_us" not in row:
        return head + f"wrong: error {row['error']:.2e}, deterministic {row['deterministic']}"
    checked = f", error {row['error']:.1e}" if "error" in row else ""
    share = row["layer_us"] / row["products_us"]
    return head + (
        f"layer {row['layer_us']:9.1f} us, products {row['products_us']:9.1f} ({share:.2f}x), wall "
        f"{row['wall_us']:9.1f}, {row['kernels']:.1f} kernels{checked}"
    )


if __name__ == "__main__":
    main()
