"""A decode step and a prefill of Llama-3-8B's shapes: the unmodified decoder in bfloat16 against packed weights.

    python -m experiments.bench_decode [--batch 1 16] [--prefill 4096] [--loop 0] [--trees ...] [--json F]

Random weights, made on the device. `step_ms` is a call of the jitted step, gaps included, with its cache donated;
`kernel_ms` is what its kernels take by CUPTI, and `budget_ms` splits that by kernel; `loop_ms` is a step of so many
under one `lax.scan`, as `generate` runs them, the host out of the way. Before anything is timed, one layer of the same
widths is compared with the same codes multiplied by XLA. That every quantized product is in a launch of a kernel is
asserted in the compiled program: four a layer (q, k and v together, gate and up together), and four more for the codes
of activations. Memory is the allocator's.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from experiments import _bars, _clock
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder, KVCache

LLAMA3_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
)
CAPACITY = 1024  # tokens of the cache
PRODUCTS = 7  # of a layer: q, k, v, o, gate, up, down
# Launches a layer: q with k and v, o, gate with up, down; codes of activations are made before each of them.
LAUNCHES = {"w4a16": 4, "w8a8": 4 + 4, "w4a8": 4 + 4}
TREES = {"w4a16": ("w4a16", False), "w4a16+head": ("w4a16", True), "w8a8": ("w8a8", False), "w4a8": ("w4a8", False)}
TIMED = {"decode": ("bf16", "w4a16", "w4a16+head"), "prefill": ("bf16", "w4a16", "w8a8", "w4a8")}
TIMED["loop"] = TIMED["decode"]
# Speed-ups asked for, by kind, tree, and batch or tokens.
BARS = {
    ("decode", "w4a16", 1): 1.9,
    ("decode", "w4a16", 16): 1.6,
    ("decode", "w4a16+head", 1): 2.1,
    ("decode", "w4a16+head", 16): 1.75,
    ("prefill", "w4a16", 4096): 0.95,
    ("prefill", "w8a8", 4096): 1.4,
    ("prefill", "w4a8", 4096): 1.25,
}
BARS |= {("loop", tree, size): least for (kind, tree, size), least in BARS.items() if kind == "decode"}
KERNEL = 'custom_call_target="mosaic_gpu_v2"'


def random_params(model: Decoder, key: jax.Array) -> Any:
    """Weights of a trained model's sizes, made on the device leaf by leaf."""
    shapes = jax.eval_shape(model.init_params, key)
    leaves, tree = jax.tree.flatten(shapes)
    make = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02), static_argnums=1
    )
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([make(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def bytes_in_use() -> int:
    """What the allocator holds now; 0 where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else 0


def quantize(params: Any, name: str) -> Any:
    """A tree of `TREES`, not packed."""
    preset, head = TREES[name]
    config = jq.QuantConfig.preset(preset)
    if head:
        config = dataclasses.replace(config, rules=(jq.Rule("lm_head/kernel", config.default), *config.rules))
    return jq.quantize(params, config)


def pack(params: Any, name: str) -> tuple[Any, dict]:
    """A tree of `TREES`, packed; also the bits a quantized weight takes, by the allocator."""
    before, (preset, head) = bytes_in_use(), TREES[name]
    qparams = jq.pack_for(quantize(params, name), "h200")
    jax.block_until_ready(qparams)
    weights = [leaf for leaf in jax.tree.leaves(qparams, is_leaf=_is_weight) if _is_weight(leaf)]
    elements = sum(weight.size for weight in weights)
    report = {
        "weights": len(weights),
        "packed": sum(weight.layout != "plain" for weight in weights),
        "launches": len(weights) // PRODUCTS * LAUNCHES[preset] + head,
        "bits_by_size": 8 * sum(weight.nbytes for weight in weights) / elements,
    }
    if after := bytes_in_use():
        report["bits_by_allocator"] = 8 * (after - before) / elements
    return qparams, report


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, jq.QArray)


def verify(config: DecoderConfig, name: str, tokens: int = 256) -> float:
    """Compares one layer by the kernels with the same codes by XLA: the relative error of its logits.

    Raises:
        RuntimeError: it is more than rounding explains.
    """
    small = dataclasses.replace(config, num_hidden_layers=1, vocab_size=1024)
    model = Decoder(small, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    plain = quantize(random_params(model, jax.random.key(time.time_ns() % 2**31)), name)
    prompt = jax.random.randint(jax.random.key(time.time_ns() % 2**31), (1, tokens), 0, small.vocab_size)
    run = jax.jit(jq.quantized(model.forward))
    got, want = run(jq.pack_for(plain, "h200"), prompt), run(plain, prompt)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    # About ten values a layer are rounded to bfloat16, 2^-9 of their size each; where activations are rounded to codes,
    # such differences move some to the next code, whose distance is some ten times as large.
    if not error <= (2.0**-6 if name.startswith("w4a16") else 2.0**-5):
        raise RuntimeError(f"{name}: one layer differs from XLA's by {error}")
    return error


def programs(
    model: Decoder, trees: dict[str, Any], batches: list[int], prefill: int, loop: int = 0
) -> dict[tuple, tuple]:
    """Every program to measure: (kind, tree, size) to (jitted function, its arguments' shapes)."""
    kinds = {"decode": batches, "prefill": [prefill] if prefill else [], "loop": batches if loop else []}

    def steps(params: Any, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            logits, cache = model.decode_step(params, *carry)
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (token, cache), None, length=loop)[0]

    functions = {"decode": model.decode_step, "loop": steps, "prefill": model.forward}
    found = {}
    for kind, sizes in kinds.items():
        for size in sizes:
            for name in (name for name in TIMED[kind] if name in trees):
                fn, cached = functions[kind], kind != "prefill"
                run = jax.jit(jq.quantized(fn) if name != "bf16" else fn, donate_argnums=(2,) if cached else ())
                args = [trees[name], jax.ShapeDtypeStruct((size,) if cached else (1, size), jnp.int32)]
                if cached:
                    args.append(jax.eval_shape(lambda size=size: model.init_cache(size, CAPACITY)))
                found[kind, name, size] = run, args
    return found


def check_kernels(compiled: Any, tree: dict) -> int:
    """Counts the launches of the kernel in a compiled program.

    Raises:
        RuntimeError: they are not as many as the packed weights need.
    """
    launches, needed = compiled.as_text().count(KERNEL), tree.get("launches", 0)
    if launches != needed:
        raise RuntimeError(f"the program launches the kernel {launches} times, not {needed}")
    return launches


def time_decode(model: Decoder, compiled: Any, params: Any, batch: int, seconds: float = 3.0) -> dict:
    """Times steps that each append a token to a nearly full cache.

    A step's logits are dropped before the next one, whose then lie in the same place: XLA launches a step as one CUDA
    graph, and new addresses would have it rewrite the graph's nodes on the host.
    """
    cache = dataclasses.replace(model.init_cache(batch, CAPACITY), length=jnp.int32(CAPACITY - 256))
    token = jnp.ones((batch,), jnp.int32)

    def steps(count: int) -> None:
        nonlocal cache
        for _ in range(count):
            cache = compiled(params, token, cache)[1]
        jax.block_until_ready(cache)

    steps(2)
    start, samples = time.perf_counter(), []
    while len(samples) < 3 or (time.perf_counter() - start < seconds and len(samples) < 10):
        begun = time.perf_counter()
        steps(16)
        samples.append((time.perf_counter() - begun) / 16)
    return {"step_ms": statistics.median(samples) * 1e3, **budget(lambda: steps(4), 4)}


def time_loop(model: Decoder, compiled: Any, params: Any, batch: int, steps: int) -> dict:
    """Times programs that append `steps` tokens each, on a cache of which three quarters are filled."""
    samples = []
    for _ in range(4):
        cache = dataclasses.replace(model.init_cache(batch, CAPACITY), length=jnp.int32(CAPACITY - 256))
        token = jax.block_until_ready(jnp.ones((batch,), jnp.int32))
        begun = time.perf_counter()
        jax.block_until_ready(compiled(params, token, cache))
        samples.append((time.perf_counter() - begun) / steps)
    return {"loop_ms": statistics.median(samples[1:]) * 1e3}


def time_prefill(compiled: Any, params: Any, tokens: jax.Array) -> dict:
    """Times whole forward passes."""

    def run() -> None:
        jax.block_until_ready(compiled(params, tokens))

    run()
    samples = []
    for _ in range(3):
        begun = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begun)
    return {"step_ms": statistics.median(samples) * 1e3, **budget(run, 1)}


def timed(model: Decoder, kind: str, compiled: Any, params: Any, size: int, loop: int) -> dict:
    """Times a program of any kind."""
    if kind == "decode":
        return time_decode(model, compiled, params, size)
    if kind == "loop":
        return time_loop(model, compiled, params, size, loop)
    return time_prefill(compiled, params, jnp.ones((1, size), jnp.int32))


def budget(run, calls: int) -> dict:
    """Milliseconds a call by kernel, the largest twelve by name."""
    kernels = _clock.launched_kernels(run)
    totals: collections.Counter = collections.Counter()
    for name, milliseconds in kernels:
        totals[re.sub(r"[_.]?\d+", "", name)[:60]] += milliseconds / calls
    return {
        "kernel_ms": sum(totals.values()),
        "launches": len(kernels) / calls,
        "budget_ms": dict(totals.most_common(12)),
    }


def ratios(rows: list[dict]) -> list[dict]:
    """Each quantized row's speed-up over the bfloat16 one."""
    plain = {(row["kind"], row["size"]): row for row in rows if row["tree"] == "bf16"}
    return [
        {
            "kind": row["kind"],
            "size": row["size"],
            "tree": row["tree"],
            **{
                f"{clock}_speedup": plain[row["kind"], row["size"]][f"{clock}_ms"] / row[f"{clock}_ms"]
                for clock in ("step", "kernel", "loop")
                if f"{clock}_ms" in row
            },
        }
        for row in rows
        if row["tree"] != "bf16" and (row["kind"], row["size"]) in plain
    ]


def bars(rows: list[dict]) -> list[dict]:
    """The speed-ups over bfloat16 that a decode step (by the wall clock of its steps) and a prefill are held to."""
    plain = {(row["kind"], row["size"]): row for row in rows if row["tree"] == "bf16"}
    found = []
    for row in rows:
        least = BARS.get((row["kind"], row["tree"], row["size"]))
        if least is None or (row["kind"], row["size"]) not in plain:
            continue
        for clock in ("step_ms", "kernel_ms", "loop_ms"):
            if clock in row:
                name = f"{row['kind']} {row['tree']} {row['size']}, {clock.removesuffix('_ms')}"
                found.append(_bars.bar(name, row[clock], plain[row["kind"], row["size"]][clock], least))
    return found


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA3_8B.num_hidden_layers)
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--loop", type=int, default=0, help="steps of a program that runs several; 0 leaves it out")
    parser.add_argument("--trees", nargs="*", choices=list(TREES), default=list(TREES))
    parser.add_argument("--prefill", type=int, default=4096, help="tokens; 0 leaves it out")
    parser.add_argument("--attention", choices=["cudnn", "xla"], default="cudnn", help="of the prefill")
    parser.add_argument("--seconds", type=float, default=150, help="programs not begun by then are left out, by name")
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    """Compiles every program at once, then times them one after the other."""
    options = parsed()
    begun = time.perf_counter()
    config = dataclasses.replace(LLAMA3_8B, num_hidden_layers=options.layers)
    model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, implementation=options.attention)
    params = random_params(model, jax.random.key(time.time_ns() % 2**31))
    trees, memory = {"bf16": params}, {"bf16": {}}
    for name in options.trees:
        trees[name], memory[name] = pack(params, name)
        print(name, json.dumps(memory[name]), flush=True)
    report = {"conditions": _clock.conditions(), "layers": options.layers, "capacity": CAPACITY, "memory": memory}
    rows, failed = [], []

    def write() -> None:
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                results = {"rows": rows, "speedups": ratios(rows), "bars": bars(rows), "failed": failed}
                json.dump(report | results, file, indent=1)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        errors = {name: pool.submit(verify, LLAMA3_8B, name) for name in options.trees}
        wanted = programs(model, trees, options.batch, options.prefill, options.loop)
        compiling = {
            key: pool.submit(lambda run=run, args=args: run.lower(*args).compile())
            for key, (run, args) in wanted.items()
        }
        for (kind, name, size), future in compiling.items():
            try:
                compiled = future.result(timeout=max(0.1, options.seconds - (time.perf_counter() - begun)))
                row: dict = {"kind": kind, "size": size, "tree": name, "kernels": check_kernels(compiled, memory[name])}
                if name in errors:
                    row["error_of_one_layer"] = errors[name].result()
                if len(rows) == 0:  # measurements want the device and the host to themselves
                    concurrent.futures.wait(compiling.values(), options.seconds - (time.perf_counter() - begun))
                row |= timed(model, kind, compiled, trees[name], size, options.loop)
            except Exception as error:  # one program's failure must not take the others' results with it
                failed.append(
                    {"kind": kind, "size": size, "tree": name, "error": f"{type(error).__name__}: {error}"[:500]}
                )
                print("failed", json.dumps(failed[-1]), flush=True)
                continue
            rows.append(row)
            print(json.dumps(row), f"at {time.perf_counter() - begun:.0f} s", flush=True)
            write()
        pool.shutdown(wait=False, cancel_futures=True)
    for row in ratios(rows):
        print(json.dumps(row))
    _bars.show(bars(rows))
    write()


if __name__ == "__main__":
    main()
