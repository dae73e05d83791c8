"""Quantized attention against bfloat16 attention on one GPU: every row verified, then timed.

    python -m experiments.bench_attention [--verify-only] [--sweep] [--json FILE] [--time-limit SECONDS]

Each row runs in a process of its own (a kernel that hangs costs only itself). "op us" is every kernel of the call,
quantization included; "kernel us" the attention kernel alone; both from the profiler. TFLOP/s count the mathematical
products, half of them for causal.
"""

import functools
import secrets
import sys

import jax
import jax.numpy as jnp
from jax import lax

from experiments import _attention, _workers
from experiments._clock import graph_microseconds, microseconds_of_each_kernel
from pallas_kernels.attention import MODES, Config, attention
from pallas_kernels.attention.cases import CORRECTNESS, SPEED, Case
from pallas_kernels.attention.quantize import E4M3, LOG2_E, round_to, values_absmax

# Candidates by head_dim and mode: keys of a tile, stages, warpgroups, exponentials by polynomial.
SWEEP = {
    64: {"f16_fp8": [(128, 2, 4, 4), (192, 2, 4, 4), (256, 2, 3, 4), (128, 2, 4, 6), (128, 2, 4, 0)]},
    128: {
        "f16_fp8": [(128, 2, 3, 0), (128, 2, 3, 2)],
        "int8_fp8": [(128, 2, 3, 2), (128, 2, 3, 3), (128, 2, 3, 0)],
    },
}
SWEPT = ("d64_s8192_full", "d128_s8192_full", "d128_s8192_causal", "d64_s8192_causal", "d128_s2048_full")


def main():
    """Runs the bench, or as a worker its rows."""
    parser = _attention.command_line(__doc__, seconds=280.0, workers=8)
    parser.add_argument("--verify-only", action="store_true", help="no timing")
    parser.add_argument("--sweep", action="store_true", help="only several configurations")
    arguments = parser.parse_args()
    if arguments.worker:
        return _workers.serve(measure)
    rows = items(arguments.verify_only, arguments.sweep)
    return _attention.run("experiments.bench_attention", arguments, rows, line)


def items(verify_only: bool, sweep: bool) -> list[dict]:
    """The rows to run, most wanted first."""
    item = lambda case, mode, config=None, timed=not verify_only: {  # noqa: E731
        "case": case, "mode": mode, "config": config, "timed": timed
    }  # fmt: skip
    fast, more = (
        [item(case, mode) for mode in modes for case in reversed(SPEED)]
        for modes in (("cudnn", "f16_fp8", "int8_fp8"), ("int8_f16",))
    )
    checks = [item(case, mode, timed=False) for case in CORRECTNESS for mode in MODES]
    if sweep:
        candidates = [(case, *more) for case in SWEPT for more in SWEEP[SPEED[case].head_dim].items()]
        swept = [item(case, mode, list(config)) for case, mode, configs in candidates for config in configs]
        return [item(case, "cudnn") for case in SWEPT] + swept
    rest = [item(case, "torch_sdpa") for case in reversed(SPEED)] if not verify_only else []
    return fast + checks + more + rest


def measure(item: dict) -> dict:
    """One row: the error against exact attention on two kinds of input, then the time."""
    case = (SPEED | CORRECTNESS)[item["case"]]
    if item["mode"] == "torch_sdpa":
        return _torch_row(case)
    swept = item["config"] is not None
    program = _compiled(_program(case, item), case)
    references = _references(item["case"], item["mode"], swept)
    with _workers.device_turn():
        row = {"ok": True}
        for kind in ("normal",) if swept else ("biased", "normal"):
            qkv = inputs(case, kind)
            row[kind] = verify(program, references, qkv, item["mode"])
            row["ok"] &= row[kind]["ok"]
        if row["ok"] and item["timed"]:
            row |= _times(program, qkv, case)
    return row


def _compiled(fn, case: Case):
    """Compiles outside the turn at the device."""
    shapes = [(case.batch, case.tokens, case.heads, case.head_dim)]
    shapes += 2 * [(case.batch, case.kv_tokens, case.kv_heads, case.head_dim)]
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)).compile()


@functools.cache
def _references(name: str, mode: str, swept: bool) -> dict:
    """Compiled references of a row: exact attention, and unless swept its method in plain jnp and fp8 P and V alone."""
    case = (SPEED | CORRECTNESS)[name]
    references = {"exact": _exact_program(name, None)}
    if not swept and mode in MODES:
        references["e4m3"] = _exact_program(name, E4M3)
        if name in CORRECTNESS:  # it holds every score
            method = functools.partial(attention, mode=mode, implementation="xla", **options(case))
            references["method"] = _compiled(method, case)
    return references


@functools.cache
def _exact_program(name: str, rounded):
    case = (SPEED | CORRECTNESS)[name]
    return _compiled(functools.partial(_exact, case=case, rounded=rounded), case)


def _program(case: Case, item: dict):
    if item["mode"] == "cudnn":
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=case.options.get("causal", False), implementation="cudnn"
        )
    config = None if item["config"] is None else Config(*item["config"])
    return lambda q, k, v: attention(
        q, k, v, mode=item["mode"], implementation="mosaic_gpu", config=config, **options(case)
    )


def options(case: Case) -> dict:
    """The case's options with lengths as arrays."""
    return {key: jnp.array(value) if key.endswith("lengths") else value for key, value in case.options.items()}


def inputs(case: Case, kind: str, dtype=jnp.bfloat16) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fresh normal values; "biased" adds a strong channel bias to K and outlier channels to V."""
    keys = jax.random.split(jax.random.key(secrets.randbits(31)), 5)
    q = jax.random.normal(keys[0], (case.batch, case.tokens, case.heads, case.head_dim))
    k, v = (jax.random.normal(key, (case.batch, case.kv_tokens, case.kv_heads, case.head_dim)) for key in keys[1:3])
    if kind == "biased":
        channels = (case.batch, 1, case.kv_heads, case.head_dim)
        k = k + jnp.broadcast_to(8 * jax.random.normal(keys[3], channels), k.shape)
        v = v * jnp.broadcast_to(jnp.where(jax.random.uniform(keys[4], channels) < 0.05, 20.0, 1.0), v.shape)
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def verify(program, references: dict, qkv, mode: str) -> dict:
    """Errors against exact attention: the program's, the same method's in plain jnp, and fp8 P and V alone.

    The program is right if it errs no more than the method it computes (its weights are rounded against a running
    maximum, the method's against the final one: the same error, other roundings) and repeats itself to the bit.
    """
    first, second = (jax.block_until_ready(program(*qkv)) for _ in range(2))
    same = bool((first.view(jnp.int16) == second.view(jnp.int16)).all())
    exact = references["exact"](*qkv)

    def error(out) -> float:
        return float(jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))

    row = {"error": error(first), "deterministic": same}
    row |= {f"{name}_error": error(run(*qkv)) for name, run in references.items() if name != "exact"}
    fixed = {"cudnn": 2.0**-8, "int8_f16": 0.016, "fp8": 0.07}.get(mode, 0.045)
    allowed = 1.05 * row.get("method_error", fixed) + 2.0**-8
    return row | {"ok": same and row["error"] <= allowed}


def _exact(q, k, v, *, case: Case, rounded):
    """Attention in float32, or with P and V rounded to e4m3 around exact scores; one head at a time."""
    given = options(case)
    window = given.get("window", (None, None))
    left, right = window if isinstance(window, tuple) else (window, window)
    right = 0 if given.get("causal") else right
    query, key = (lax.broadcasted_iota(jnp.int32, (case.tokens, case.kv_tokens), i) for i in range(2))
    seen = jnp.ones((case.tokens, case.kv_tokens), bool)
    seen = seen if left is None else seen & (key >= query - left)
    seen = seen if right is None else seen & (key <= query + right)
    q_lengths = given.get("query_lengths", jnp.full((case.batch,), case.tokens))
    kv_lengths = given.get("kv_lengths", jnp.full((case.batch,), case.kv_tokens))
    if rounded is not None:
        step = (values_absmax(v, given.get("kv_lengths")) * (1 / 448.0))[:, None]
        codes = lax.optimization_barrier(round_to(v.astype(jnp.float32) / step, rounded))
        v = codes.astype(jnp.float32) * step

    def head(index):
        b, n = index // case.heads, index % case.heads
        group = n // (case.heads // case.kv_heads)
        one = lambda x, h: x[b, :, h].astype(jnp.float32)  # noqa: E731
        scores = jnp.matmul(one(q, n), one(k, group).T, precision="highest") * (case.head_dim**-0.5 * LOG2_E)
        visible = seen & (query < q_lengths[b]) & (key < kv_lengths[b])
        scores = jnp.where(visible, scores, -1e30)
        p = jnp.where(visible, jnp.exp2(scores - jnp.max(scores, axis=1, keepdims=True)), 0.0)
        total = jnp.sum(p, axis=1, keepdims=True)
        if rounded is not None:
            codes = lax.optimization_barrier(round_to(p * 448.0, rounded))  # or XLA drops the round trip
            p = codes.astype(jnp.float32) * (1 / 448.0)
        return jnp.matmul(p, one(v, group), precision="highest") / jnp.where(total == 0, 1.0, total)

    out = lax.map(head, jnp.arange(case.batch * case.heads))
    return out.reshape(case.batch, case.heads, case.tokens, case.head_dim).swapaxes(1, 2)


def _times(program, qkv, case: Case) -> dict:
    op, medians = microseconds_of_each_kernel(program, qkv)
    kernel = next((us for name, us in reversed(medians) if "mosaic" in name), op)  # after those that quantize
    return {
        "op_us": op,
        "kernel_us": kernel,
        "op_tflops": case.flop / op / 1e6,
        "kernel_tflops": case.flop / kernel / 1e6,
        "kernels": [[name[:60], round(us, 1)] for name, us in medians],
    }


def _torch_row(case: Case) -> dict:
    import torch

    q, k, v = (
        torch.randn(case.batch, case.heads, case.tokens, case.head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    call = lambda: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
        q, k, v, is_causal=case.options.get("causal", False)
    )
    with _workers.device_turn():
        us = graph_microseconds([call], replays=5)
    return {
        "ok": True,
        "op_us": us,
        "kernel_us": us,
        "op_tflops": case.flop / us / 1e6,
        "kernel_tflops": case.flop / us / 1e6,
    }


def line(row: dict) -> str:
    """One row as text."""
    text = f"{row['case']:24} {row['mode']:10} {row['config'] or 'default'!s:20} {'ok ' if row.get('ok') else 'BAD'}"
    if "error" in row:
        return f"{text} {row['error']}"
    for kind in ("normal", "biased"):
        if kind in row:
            text += f" {kind} {row[kind]['error']:.4f}"
            text += f" (method {row[kind].get('method_error', float('nan')):.4f}" if "e4m3_error" in row[kind] else ""
            text += f" e4m3 {row[kind]['e4m3_error']:.4f})" if "e4m3_error" in row[kind] else ""
    if "op_us" in row:
        text += f" | op {row['op_us']:8.1f} us {row['op_tflops']:5.0f} TF/s, kernel {row['kernel_us']:8.1f} us"
        text += f" {row['kernel_tflops']:5.0f} TF/s"
    return text


if __name__ == "__main__":
    sys.exit(main())
