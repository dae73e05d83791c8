"""The grouped product on expert layers of real models, on one GPU: every row verified, then timed.

    python -m experiments.bench_grouped [--checks] [--sweep] [--peers] [--formats w4a16 w4a8] [--layers A B]
        [--tokens 1 16] [--activation silu_mul] [--json FILE] [--seconds S]

Each row runs in a worker process (a kernel that hangs costs only itself). Tokens choose their experts at random.
"us" is every kernel of the call by the profiler, the tile map included; "kernel" the product's alone. The floor is
the larger of the bytes of the experts that were hit at the memory's copy rate and the products at 790 TFLOP/s (1550
with 8-bit activations).
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import secrets
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _bars, _bench, _workers
from experiments._clock import microseconds_of_each_kernel, rotations
from experiments._grouped import FORMATS, GROUP, TOLERANCE, compiled_error, drawn, group_sizes, room_for
from pallas_kernels.grouped_matmul import Config, default_config, grouped_matmul, supports
from pallas_kernels.grouped_matmul.cases import LAYERS, SIZES, STRAINED, TOKENS

PEERS = pathlib.Path(__file__).parent / "results" / "peers_grouped_h200.json"
READ = {"NVIDIA H200": 4.3e12, "NVIDIA H100 80GB HBM3": 3.0e12}  # bytes a second of a large copy


def main():
    """Runs the bench, or as a worker its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checks", action="store_true", help="the strained group sizes, verified only")
    parser.add_argument("--sweep", action="store_true", help="several configurations of each problem")
    parser.add_argument("--peers", action="store_true", help="bfloat16 too: XLA's ragged_dot (8 experts), tokamax's")
    parser.add_argument("--formats", nargs="*", default=["w4a16"], choices=FORMATS)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS), help="most wanted first")
    parser.add_argument("--activation", choices=["silu_mul"], default=None)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.worker:
        return _workers.serve(measure)
    rows = _workers.run(
        "experiments.bench_grouped",
        items(arguments),
        workers=arguments.workers,
        seconds=arguments.seconds,
        stall=20.0,
        kin=lambda row: (row.get("format"), json.dumps(row.get("config"))),
        on_result=lambda row: print(line(row), flush=True),
    )
    _bench.finish(arguments.json, bars(rows), rows=rows)


def bars(rows: list[dict]) -> list[dict]:
    """Few tokens against the floor of the experts hit; many against tokamax, as timed here or else as published."""
    published = {(p["layer"], p["tokens"]): p for p in json.loads(PEERS.read_text())["rows"]}
    here = {(r["shape"], r["m"]): r["us"] for r in rows if r.get("peer") == "tokamax" and "us" in r}
    found = []
    for r in sorted((r for r in rows if "kernel" in r and not r.get("config")), key=lambda r: (r["shape"], r["m"])):
        name, qwen = f"{r['shape']} {r['m']} tokens {r['format']}", r["shape"] == "qwen3-30b-a3b"
        if r["format"] == "w4a16" and r["m"] <= 256:
            least = 0.5 if qwen or r["m"] == 1 else 0.7
            found.append(_bars.bar(f"{name} of the floor", r["us"], r["floor"], least))
        peer = published.get((r["shape"], r["m"]))
        if r["m"] < 4096 or qwen or peer is None or r.get("activation"):
            continue
        bf16 = here.get((r["shape"], r["m"]), peer["tokamax_bf16"])
        least = 1.6 if r["format"] == "w4a16" else 2.4
        found.append(_bars.bar(f"{name} over tokamax bfloat16", r["us"], bf16, least))
        if r["format"] == "w4a16":
            found.append(_bars.bar(f"{name} over tokamax int4", r["us"], peer["tokamax_int4"], 1.2))
        if r["format"] == "w4a16" and r["shape"] == "mixtral-8x7b":
            found.append(_bars.bar(f"{name} of 600 TFLOP/s", r["us"], r["us"] * r["tflops"] / 600, 1.0))
    return found


def items(arguments) -> list[dict]:
    """The rows to run, most wanted first."""
    found = []
    if arguments.checks:
        found = [{"shape": "strained", "m": i, "checks": i} for i in range(len(STRAINING))]
    for m, layer, form in itertools.product(arguments.tokens, arguments.layers, arguments.formats):
        item = {"shape": layer, "m": m, "format": form, "activation": arguments.activation}
        cuts = candidates(layer, m, form) if arguments.sweep else [None]
        found += [item | {"config": cut} for cut in cuts]
        if form != arguments.formats[0]:
            continue
        if arguments.peers and LAYERS[layer][0] == 8 and m <= 256:  # it multiplies every row by every expert
            found.append(item | {"peer": "XLA"})
        if arguments.peers and importlib.util.find_spec("tokamax"):
            found.append(item | {"peer": "tokamax"})
    return found


def candidates(layer: str, m: int, form: str) -> list[dict | None]:
    """The default configuration and its neighbours that the kernel takes."""
    experts, k, n, top = LAYERS[layer]
    weight_dtype, x_dtype, _ = FORMATS[form]
    groups = k // GROUP if weight_dtype == jnp.int32 else 1
    usual = default_config(m * top, experts, k, n, groups, x_dtype, weight_dtype)
    takes = functools.partial(supports, k, groups, x_dtype, weight_dtype)
    cuts = [usual]
    for change in _cuts(usual, weight_dtype):
        cut = dataclasses.replace(usual, **change)
        fitting = (dataclasses.replace(cut, num_stages=stages) for stages in range(8, 1, -1))
        cuts += [config for config in fitting if takes(config=config) is None][:1]
    return [dataclasses.asdict(cut) for cut in dict.fromkeys(cuts)]


def _cuts(usual: Config, weight_dtype):
    """Of few rows, more warpgroups and other stages; of more, tiles of about as many rows."""
    if usual.block_m <= 32:
        for count, block_k in itertools.product((2, 3, 4), (256, 512)):
            yield {"num_warpgroups": count, "block_k": block_k}
        return
    ladder = (48, 64, 80, 96, 112, 128, 256)
    place = ladder.index(usual.block_m)
    row_tiles = (1,) if weight_dtype == jnp.int32 else (1, 2)
    for block_m, count, tiles in itertools.product(ladder[max(0, place - 1) : place + 2], (3, 2), row_tiles):
        if count == 2 or (block_m < 128 and tiles == 1):
            yield {"block_m": block_m, "num_warpgroups": count, "row_tiles": tiles}


def measure(item: dict) -> dict:
    """One row: the error of the product, then its time."""
    if "checks" in item:
        return _check_sizes(*STRAINING[item["checks"]])
    experts, k, n, top = LAYERS[item["shape"]]
    rows, activation = item["m"] * top, item.get("activation")
    rng = np.random.default_rng(secrets.randbits(31))
    routings = [group_sizes(rng, item["m"], experts, top) for _ in range(16)]
    hit = statistics.mean(int((sizes > 0).sum()) for sizes in routings)
    # Calls differ in weights and routing: enough of them that no weight is met in the L2 cache.
    routings = routings[: rotations(int(hit * k * n) // 2)]
    weight_dtype, x_dtype, flop = FORMATS[item["format"]]
    groups = k // GROUP if weight_dtype == jnp.int32 else 1
    weight_bytes = k * n * (0.5 if weight_dtype == jnp.int32 else 1) + 2 * groups * n
    moved = hit * weight_bytes + rows * (jnp.dtype(x_dtype).itemsize * k + (n if activation else 2 * n))
    result = {"hit": hit, "floor": max(moved / READ[jax.devices()[0].device_kind], 2 * rows * k * n / flop) * 1e6}
    if item.get("peer"):
        return result | _time_peer(item["peer"], routings[0], k, n)
    usual = default_config(rows, experts, k, n, groups, x_dtype, weight_dtype)
    config = Config(**item["config"]) if item.get("config") else usual
    product = functools.partial(grouped_matmul, implementation="mosaic_gpu", config=config, activation=activation)
    copies = -(-int(240e6) // (experts * k * n // 2))
    draw = drawn(item["format"], rows, experts, k, n, copies)
    x, weights = draw.out_info
    weights = [weights[i % copies] for i in range(len(routings))]
    sizes = [jax.ShapeDtypeStruct((experts,), jnp.int32)] * len(routings)
    program = jax.jit(lambda x, ws, ss: [_call(product, x, w, s) for w, s in zip(ws, ss, strict=True)])
    compiled = program.lower(x, weights, sizes).compile()
    error_of = compiled_error(compiled.out_info[0], x, *weights[0], sizes[0], room_for(routings[0]), activation)
    with _workers.device_turn():
        x, weights = draw(jax.random.key(secrets.randbits(31)))
        weights, sizes = [weights[i % copies] for i in range(len(routings))], [jnp.asarray(s) for s in routings]
        outs, again = compiled(x, weights, sizes), compiled(x, weights, sizes)
        error = float(error_of(outs[0], x, *weights[0], sizes[0]))
        same = all(bool((a.view(jnp.int16) == b.view(jnp.int16)).all()) for a, b in zip(outs, again, strict=True))
        result |= {"error_norm": error, "deterministic": same, "ran": str(config)}
        if not (error <= TOLERANCE[activation] and same):
            return result | {"error": f"wrong: {error:.2e}, deterministic {same}"}
        del outs, again
        total, each = microseconds_of_each_kernel(compiled, (x, weights, sizes), iterations=5)
    alone = statistics.median(us for _, us in each if us > 0.5 * max(us for _, us in each))
    total = total / len(sizes)
    return result | {"us": total, "kernel": alone, "tflops": 2 * rows * k * n / total / 1e6}


def _call(product, x, weight, sizes):
    codes, x_scale = x
    return product(codes, *weight, group_sizes=sizes, x_scale=x_scale)


# Ways of cutting: format, what differs from two warpgroups and stages of 128 inputs, activation.
STRAINING = (
    ("w4a16", {"block_m": 16, "num_warpgroups": 4, "scale_after": True}, None),
    ("w4a16", {"block_m": 32, "num_warpgroups": 3, "scale_after": True}, None),
    ("w4a16", {"block_m": 64, "scale_after": True}, None),
    ("w4a16", {"block_m": 96}, None),
    ("w4a16", {"block_m": 128, "strip": 2}, None),
    ("w4a16", {"block_m": 256, "strip": 2}, None),
    ("w4a16", {"block_m": 32, "num_warpgroups": 1, "scale_after": True}, "silu_mul"),
    ("w4a16", {"block_m": 112}, "silu_mul"),
    ("w4a16", {"block_m": 128}, "silu_mul"),
    ("w4a8", {"block_m": 80, "block_k": 256, "scale_after": True}, None),
    ("fp8", {"block_m": 128, "row_tiles": 2}, None),
    ("fp8", {"block_m": 96}, "silu_mul"),
    ("int8", {"block_m": 128, "row_tiles": 2}, "silu_mul"),
)


def _check_sizes(form: str, cut: dict, activation: str | None) -> dict:
    """One way of cutting, on group sizes that strain it; rows that belong to nobody must come out zero."""
    (experts, rows), k, n, errors = STRAINED, 1152, 448 if form.startswith("w4") else 384, {}
    config = Config(**{"block_k": 128, "num_stages": 2, "num_warpgroups": 2} | cut)
    product = functools.partial(grouped_matmul, implementation="mosaic_gpu", config=config, activation=activation)
    draw = drawn(form, rows, experts, k, n, 1)
    x, (weight,) = draw.out_info
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    run = jax.jit(lambda x, w, sizes: _call(product, x, w, sizes)).lower(x, weight, sizes).compile()
    error_of = compiled_error(run.out_info, x, *weight, sizes, 1 << (rows - 1).bit_length(), activation)
    with _workers.device_turn():
        x, (weight,) = draw(jax.random.key(secrets.randbits(31)))
        for name, held in SIZES.items():
            sizes = jnp.asarray([held.get(expert, 0) for expert in range(experts)], jnp.int32)
            out = run(x, weight, sizes)
            error, rest = float(error_of(out, x, *weight, sizes)), bool((out[sum(held.values()) :] == 0).all())
            if not (error <= TOLERANCE[activation] and rest):
                errors[name] = (error, rest)
    return {"error": f"wrong: {config} {activation} {errors}"} if errors else {"checked": f"{form} {cut} {activation}"}


def _time_peer(peer: str, sizes, k: int, n: int) -> dict:
    """A peer's grouped product of bfloat16 weights."""
    if peer == "XLA":
        product = jax.lax.ragged_dot
    else:
        import tokamax

        product = functools.partial(tokamax.ragged_dot, implementation="mosaic")
    operands = (
        jax.ShapeDtypeStruct((int(sizes.sum()), k), jnp.bfloat16),
        jax.ShapeDtypeStruct((len(sizes), k, n), jnp.bfloat16),
        jax.ShapeDtypeStruct(sizes.shape, jnp.int32),
    )
    compiled = jax.jit(product).lower(*operands).compile()
    with _workers.device_turn():
        x, weight = (jax.random.normal(jax.random.key(i), operands[i].shape, jnp.bfloat16) for i in range(2))
        total, _ = microseconds_of_each_kernel(compiled, (x, weight, jnp.asarray(sizes)), iterations=5)
    return {"us": total}


def line(row: dict) -> str:
    """A row as text."""
    head = f"{row['shape']:>14} {row['m']:>6} {row.get('format') or '':>6} "
    if "error" in row:
        return head + f"{row.get('config') or ''} {row['error']}"
    if "checked" in row:
        return head + f"right on {len(SIZES)} sets of sizes: {row['checked']}"
    if row.get("peer"):
        return head + f"{row['us']:9.1f} us: {row['peer']}'s ragged_dot, bfloat16"
    cut, share = row["ran"].removeprefix("Config"), row["floor"] / row["us"]
    return head + (
        f"{row['us']:9.1f} us (kernel {row['kernel']:9.1f}), floor {row['floor']:7.1f} = {share:4.0%}, "
        f"{row['tflops']:4.0f} TFLOP/s, {row['hit']} hit, error {row['error_norm']:.1e} {cut}"
    )


if __name__ == "__main__":
    main()
