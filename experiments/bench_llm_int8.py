"""LLM.int8's product on the kernels: outlier channels gathered and multiplied in 16 bits, the rest in int8, added.

    python -m experiments.bench_llm_int8 [--shapes ...] [--m ...] [--seconds N] [--json F]

Microseconds a call by CUPTI, everything that `jq.quantized` launches for one product of a bfloat16 activation counted:
`llm_int8_us`, and `w8a8_us` of the same weight without outlier channels. `mm_us` is torch.mm in bfloat16 by CUDA graph
replay. Weights are rotated past the L2 cache. One input channel in 200 is an outlier; one in 100 has a place.
"""

import functools
import os

from experiments import _bars, _bench, _workers
from experiments.bench_w4a8 import time_torch
from pallas_kernels.int8_matmul.cases import SHAPES

# Both forms multiply the same codes and round the result once, half an eps of bfloat16 each; their float rows are
# 16-bit products summed in float32.
TOLERANCE = 2.0**-8


def problem(seed: int, m: int, k: int, n: int) -> tuple:
    """An activation [m, k] with outlier channels, and one weight as LLM.int8 and as w8a8 leave it, not packed."""
    import jax
    import jax.numpy as jnp

    import jaxquant as jq

    keys = jax.random.split(jax.random.key(seed), 3)
    outliers = jax.random.permutation(keys[0], k)[: k // 200]
    x = jax.random.normal(keys[1], (m, k), jnp.bfloat16).at[:, outliers].multiply(20)
    params = {"kernel": jax.random.normal(keys[2], (k, n), jnp.bfloat16) * jnp.bfloat16(0.02)}
    kept = jq.QuantConfig.preset("w8a8", algorithm=jq.llm_int8())
    return x, {
        "llm_int8": jq.quantize(params, kept, apply_fn=multiply, batches=[x]),
        "w8a8": jq.quantize(params, jq.QuantConfig.preset("w8a8")),
    }


def multiply(params, x):
    """The model: one product."""
    return x @ params["kernel"]


def compiled(packed, x, copies: int):
    """A program of `copies` products by weights of their own, and its arguments."""
    import jax
    import jax.numpy as jnp

    import jaxquant as jq

    product = jq.quantized(multiply, on_dense="error")
    args = [jax.tree.map(jnp.copy, packed) for _ in range(copies)], x
    return jax.jit(lambda trees, x: [product(tree, x) for tree in trees]).lower(*args).compile(), args


def difference(out, other) -> float:
    """`|out - other| / |other|`."""
    import jax.numpy as jnp

    wide = [a.astype(jnp.float32) for a in (out, other)]
    return float(jnp.linalg.norm(wide[0] - wide[1]) / jnp.linalg.norm(wide[1]))


def measure(item: dict) -> dict:
    """One item, in a worker."""
    return time_torch(item) if item["what"] == "torch" else _time(item)


def _time(item: dict) -> dict:
    import jax

    import jaxquant as jq
    from experiments import _clock

    (k, n), result = SHAPES[item["shape"]], {"ok": True}
    x, trees = problem(item["seed"], item["m"], k, n)
    by_xla = jax.jit(jq.quantized(multiply, on_dense="error"))
    for name, tree in trees.items():
        program, args = compiled(jq.pack_for(tree, "h200"), x, _clock.rotations(k * n))
        with _workers.device_turn():
            error = difference(program(*args)[0], by_xla(tree, x))
            result |= {f"{name}_error": error, "ok": result["ok"] and error <= TOLERANCE}
            result[f"{name}_us"] = _clock.kernel_microseconds(program, args, calls=len(args[0]), iterations=7)
    return result


def bars(results: list[dict]) -> list[dict]:
    """How many times as fast as torch.mm; reported, and met where it is no slower."""
    mm = {(r["shape"], r["m"]): r["mm_us"] for r in results if "mm_us" in r}
    timed = sorted((r for r in results if r.get("ok") and "llm_int8_us" in r), key=lambda r: r["m"])
    return [
        _bars.bar(f"llm_int8 {r['shape']} M={r['m']} over torch.mm", r["llm_int8_us"], mm[r["shape"], r["m"]], 1.0)
        for r in timed
        if (r["shape"], r["m"]) in mm
    ]


def main():
    parser = _bench.parser(__doc__, shapes=["llama3-8b/o", "llama3-8b/gate_up"], tokens=[16, 256, 4096], seconds=60)
    options = parser.parse_args()
    if options.worker:  # Products by cuBLAS, unsearched: the device must be still while another worker measures.
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        return _workers.serve(measure)
    problems = [{"shape": s, "m": m} for m in options.m for s in options.shapes]
    results = _bench.answers(
        "experiments.bench_llm_int8",
        [{"what": what} | p for what in ("torch", "time") for p in problems],
        workers=options.workers,
        seconds=options.seconds,
        stall=20,
        on_result=functools.partial(_bench.show, where=("what", "shape", "m")),
    )
    _bench.finish(options.json, bars(results), results=results)


if __name__ == "__main__":
    main()
