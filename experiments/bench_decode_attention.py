"""Decode attention over quantized caches against cuDNN's bfloat16 on one GPU: every row verified, then timed.

    python -m experiments.bench_decode_attention [--sweep] [--json FILE] [--time-limit SECONDS]

Each row runs in a process of its own (a kernel that hangs costs only itself). "us" is every kernel of the call by the
profiler; TB/s counts the bytes of keys, values and scales.
"""

import functools
import secrets
import sys
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _attention, _workers
from experiments._clock import microseconds_of_each_kernel
from pallas_kernels.decode_attention import Cache, Config, decode_attention
from pallas_kernels.decode_attention.cases import CORRECTNESS, SPEED, Case

BITS = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4, "int2": 2}
SWEEP = {
    "int8": [(64, 2, 1), (64, 3, 1), (64, 3, 2), (64, 4, 2), (64, 4, 4), (128, 2, 1), (128, 2, 2)],
    "int4": [(64, 2, 1), (64, 3, 1), (64, 4, 1), (64, 4, 2), (64, 6, 2), (128, 2, 1), (128, 3, 2)],
}
WINDOW = 128  # recent tokens in bfloat16
# Weights and the result are rounded to bfloat16 (relative 2**-9 each, 2**-8 at worst) once more than the reference's.
TOLERANCE = 2.0**-7


def main():
    """Runs the bench, or as a worker its rows."""
    parser = _attention.command_line(__doc__, seconds=120.0, workers=6)
    parser.add_argument("--sweep", action="store_true", help="several configurations on two of the rows")
    arguments = parser.parse_args()
    if arguments.worker:
        return _workers.serve(measure)
    return _attention.run("experiments.bench_decode_attention", arguments, items(arguments.sweep), line)


def items(sweep: bool) -> list[dict]:
    """The rows to run, most wanted first."""
    item = lambda case, mode, config=None: {"case": case, "mode": mode, "config": config}  # noqa: E731
    fast = [item(case, mode) for modes in (("cudnn", "int4", "int8", "fp8"), ("bf16", "int2")) for case in SPEED
            for mode in modes]  # fmt: skip
    checks = [item(case, mode) for case in CORRECTNESS for mode in BITS]
    first = [check for check in checks if check["case"] in ("ragged", "paged")]
    splits = [item("ragged", mode, [64, 2, split]) for mode in ("int8", "int4") for split in (1, 2, 4, 8)]
    swept = [
        item(case, mode, list(config)) for mode, configs in SWEEP.items() for config in configs
        for case in ("b16_s4096", "b64_s8192")
    ]  # fmt: skip
    return first + fast + [check for check in checks if check not in first] + splits + (swept if sweep else [])


def measure(item: dict) -> dict:
    """One row: its error on some of the sequences, then its time. All that compiles does so before its turn comes."""
    case, mode = (SPEED | CORRECTNESS)[item["case"]], item["mode"]
    make = functools.partial(inputs, case, mode)
    key = jax.random.key(secrets.randbits(31))
    args = jax.eval_shape(make, key)
    run, to_check, make = _compiled(program(case, item), *args), checks(case, mode, args), _compiled(make, key)
    with _workers.device_turn():
        args = make(key)
        row = verify(run, args, case, mode, to_check)
        if row["ok"] and item["case"] in SPEED:
            row |= _times(run, args, case, mode)
    return row


def checks(case: Case, mode: str, args):
    """Compiles what `verify` asks of results, for arguments like args."""
    out = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    difference = functools.partial(_difference, mode=mode, case=case)
    return _compiled(_repeats, out, out), _compiled(difference, args, out, jax.ShapeDtypeStruct((), jnp.int32))


def _compiled(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile()


def inputs(case: Case, mode: str, key: jax.Array) -> tuple:
    """Random queries, cache and lengths; cuDNN's cache is [B, S, K, H]."""
    keys = jax.random.split(key, 6)
    q = jax.random.normal(keys[0], (case.batch, case.heads, case.head_dim), jnp.bfloat16)
    lengths = jnp.full((case.batch,), case.tokens) if case.lengths is None else jnp.array(case.lengths)
    if mode == "cudnn":
        shape = (case.batch, case.tokens, case.kv_heads, case.head_dim)
        return q, *(jax.random.normal(k, shape, jnp.bfloat16) for k in keys[1:3]), lengths
    cache = _cache(case, mode, keys[1:])
    return q, {name: x for name, x in cache._asdict().items() if x is not None}, lengths


def _cache(case: Case, mode: str, keys) -> Cache:
    """Bytes of any value but NaN's: the kernel must take every code."""
    size = case.page_size or case.tokens
    rows = case.batch * case.tokens // size
    head = rows, case.kv_heads
    k_shape, v_shape = (*head, size, case.head_dim), (*head, case.head_dim, size)
    table = None
    if case.page_size is not None:
        table = jax.random.permutation(keys[4], rows).astype(jnp.int32).reshape(case.batch, -1)
    if mode == "bf16":
        k, v = map(jax.random.normal, keys[:2], (k_shape, v_shape), 2 * [jnp.bfloat16])
        return Cache(k, v, page_table=table)
    shapes = [(case.batch, case.kv_heads, *x) for x in ((WINDOW, case.head_dim), (case.head_dim, WINDOW))]
    recent = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys[3:], shapes, strict=False)]
    if BITS[mode] < 8:
        packed = 8 // BITS[mode]
        k_shape, v_shape = (*head, size // packed, case.head_dim), (*head, case.head_dim // packed, size)
        codes = [jax.random.bits(k, s, jnp.uint8) for k, s in zip(keys, (k_shape, v_shape), strict=False)]
        grids = [(*head, size // 32, case.head_dim), (*head, case.head_dim // 32, size)]
        scales = [jax.random.uniform(k, s, jnp.float16, 1, 3) for k, s in zip(keys[2:], grids, strict=False)]
        offsets = [-1.5 * x for x in scales]  # elements from -scale / 2 to scale / 2
        return Cache._make((*codes, *scales, *offsets, *recent, table))
    codes = [jax.lax.bitcast_convert_type(jax.random.bits(k, s, jnp.uint8), jnp.int8) for k, s in
             ((keys[0], k_shape), (keys[1], v_shape))]  # fmt: skip
    if mode == "fp8":
        codes = [jax.lax.bitcast_convert_type(jnp.where((c & 127) == 127, 0, c), jnp.float8_e4m3fn) for c in codes]
    largest = 127.0 if mode == "int8" else 448.0
    scales = (jax.random.uniform(k, k_shape[:3], minval=1 / largest, maxval=4 / largest) for k in keys[2:4])
    return Cache._make((*codes, *scales, None, None, *recent, table))


def program(case: Case, item: dict):
    """The step of a row, of the arguments that `inputs` makes."""
    if item["mode"] == "cudnn":

        def cudnn(q, k, v, lengths):
            return jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn")[:, 0]

        return cudnn
    config = None if item["config"] is None else Config(*item["config"])

    def ours(q, cache, lengths):
        return decode_attention(q, **cache, lengths=lengths, implementation="mosaic_gpu", config=config)

    return ours


def verify(run, args, case: Case, mode: str, to_check) -> dict:
    """The error of the first and the last sequence, and whether the program repeats itself to the bit."""
    repeats, difference = to_check
    first, second = (jax.block_until_ready(run(*args)) for _ in range(2))
    same, finite = repeats(first, second)
    sequences = range(case.batch) if case.lengths is not None else sorted({0, case.batch - 1})
    errors = [float(difference(args, first, jnp.int32(b))) for b in sequences]
    row = {"deterministic": bool(same), "finite": bool(finite), "max_error": max(errors)}
    right = row["finite"] and row["max_error"] < TOLERANCE
    return row | {"ok": right and (row["deterministic"] or mode == "cudnn")}  # a peer may add in any order


def _repeats(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether two results are the same to the bit, and whether the first is finite."""
    return (first.view(jnp.int16) == second.view(jnp.int16)).all(), jnp.isfinite(first).all()


def _difference(args, out: jax.Array, sequence: jax.Array, *, mode: str, case: Case) -> jax.Array:
    """The error of one sequence relative to its norm, if that is not zero."""
    exact = _exact(args, sequence, mode=mode, case=case)
    norm, error = (jnp.linalg.norm(x) for x in (exact, out[sequence].astype(jnp.float32) - exact))
    return error / jnp.where(norm > 0, norm, 1.0)


def _exact(args, sequence: jax.Array, *, mode: str, case: Case) -> jax.Array:
    """The reference in float32 on one sequence."""
    own = lambda x: jax.lax.dynamic_slice_in_dim(x, sequence, 1)  # noqa: E731
    q, rest, lengths = own(args[0]).astype(jnp.float32), args[1:-1], own(args[-1])
    cache: dict[str, Any]
    if mode == "cudnn":
        k, v = (own(x).astype(jnp.float32) for x in rest)
        cache = {"k": k.transpose(0, 2, 1, 3), "v": v.transpose(0, 2, 3, 1)}
    else:
        shared = () if case.page_size is None else set(Cache._fields) - {"page_table", "recent_k", "recent_v"}
        cache = {name: x if name in shared else own(x) for name, x in rest[0].items()}
    if mode == "bf16":
        cache |= {name: cache[name].astype(jnp.float32) for name in ("k", "v")}
    with jax.default_matmul_precision("highest"):
        return decode_attention(q, **cache, lengths=lengths, implementation="xla")[0]


def _times(run, args, case: Case, mode: str) -> dict:
    us, medians = microseconds_of_each_kernel(run, args)
    bytes_read = case.bytes_read(BITS.get(mode, 16))
    return {
        "us": us,
        "terabytes_per_s": bytes_read / us / 1e6,
        "kernels": [[name[:60], round(time, 1)] for name, time in medians],
    }


def line(row: dict) -> str:
    """One row as text."""
    text = f"{row['case']:14} {row['mode']:6} {row['config'] or 'default'!s:12} {'ok ' if row.get('ok') else 'BAD'}"
    if "error" in row:
        return f"{text} {row['error']}"
    text += f" error {row['max_error']:.4f}{'' if row['deterministic'] else ' NOT DETERMINISTIC'}"
    if "us" in row:
        text += f" | {row['us']:8.1f} us {row['terabytes_per_s']:5.2f} TB/s"
    return text


if __name__ == "__main__":
    sys.exit(main())
