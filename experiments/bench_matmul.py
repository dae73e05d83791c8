"""How fast the int4 product is, against what a user would otherwise run on the same card, verified before timed.

    python -m experiments.bench_matmul [--op int4] [--shapes ...] [--m ...] [--verify-only] [--seconds 300] [--json F]

Columns in microseconds a call: `kernel`, all the op launches, by CUPTI; `call`, inside one jitted program, gaps
included; PyTorch's products by CUDA graph replay, the clock of the published tables. `floor`: every byte moved once at
this card's copy rate, or the products at its bfloat16 rate, whichever is longer. Weights are rotated past L2.
"""

import functools
import itertools

from experiments import _bench, _workers, compare_int4
from pallas_kernels.int4_matmul.cases import SHAPES, TOKENS

GROUP = 128
IMPLEMENTATIONS = ("mosaic_gpu", "xla_bf16", "xla_int4", "torch")

_PROBLEM = ("m", "k", "n", "group", "dtype", "scale_dtype", "zero", "bias", "code")

# Ragged in every dimension, each group size, zero points, bias, both dtypes.
_RAGGED_TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 128, 129, 200, 256, 300, 1000)
VERIFY = [
    *[{"m": m, "k": 4096, "n": 4096, "group": 128} for m in _RAGGED_TOKENS],
    *[
        {"m": m, "k": 1536 + 64, "n": 1024 + 64, "group": 64, "zero": True, "bias": True}
        for m in (1, 5, 16, 48, 130, 300)
    ],
    *[{"m": m, "k": 1024 + 32, "n": 320, "group": 32, "zero": True, "dtype": "float16"} for m in (3, 16, 64, 150)],
    *[{"m": m, "k": 1000, "n": 100, "group": 1000, "bias": True} for m in (1, 16, 40, 128, 257)],
    *[{"m": m, "k": 14336, "n": 4096, "group": 14336} for m in (4, 16, 512)],
    *[{"m": m, "k": 14336, "n": 4096, "group": 64, "zero": True} for m in (8, 32, 64)],  # warpgroups in turns
    *[{"m": m, "k": 8192, "n": 57344, "group": 128} for m in (1, 64, 4096)],
    *[{"m": m, "k": 4096, "n": 4096, "group": 128, "code": code} for m in (8, 300) for code in (-8, 7)],
    *[{"m": m, "k": 4096, "n": 1024, "group": g, "scale_dtype": "float32"} for m in (2, 150) for g in (128, 4096)],
    *[
        {"m": m, "k": 14336, "n": 4096, "group": 128, "config": {"block_k": 256, "num_stages": 2} | config}
        for m, config in (
            (5, {"block_m": 8, "num_warpgroups": 1, "split_k": 4, "scale_after": True, "blocks_per_sm": 2}),
            (16, {"block_m": 16, "num_warpgroups": 1, "split_k": 3, "scale_after": True, "blocks_per_sm": 3}),
            (50, {"block_m": 64, "num_warpgroups": 2, "split_k": 2, "scale_after": False}),
        )
    ],
    *[
        {"m": m, "k": 4096, "n": 4096, "group": 128, "config": {"num_warpgroups": 2, "snake_width": 4} | config}
        for m, config in (
            (60, {"block_m": 64, "block_k": 256, "num_stages": 4, "split_k": 2, "multicast": 2, "scale_after": True}),
            (
                300,
                {"block_m": 128, "block_k": 128, "num_stages": 4, "split_k": 2, "multicast": 2, "scale_after": False},
            ),
            (
                900,
                {"block_m": 256, "block_k": 128, "num_stages": 2, "split_k": 1, "multicast": 2, "scale_after": False},
            ),
        )
    ],
]


def floor_microseconds(m: int, k: int, n: int, peaks: dict, *, weight_bits: float = 4 + 16 / GROUP) -> float:
    """No version runs faster than this."""
    moved = k * n * weight_bits / 8 + 2 * m * (k + n)
    return max(moved / peaks["copy_bytes_per_s"], 2 * m * k * n / peaks["bf16_flop_per_s"]) * 1e6


def measure(item: dict) -> dict:
    """One problem by one implementation, in a worker."""
    if item["what"] == "verify":
        return _verify(item)
    if item["what"] == "peaks":
        from experiments import _clock

        with _workers.device_turn():
            return _clock.measured_peaks()
    return _time_torch(item) if item["what"] == "torch" else _time_jax(item)


def _verify(item: dict) -> dict:
    import jax

    from experiments import _int4
    from pallas_kernels.int4_matmul import Config, int4_matmul

    options = {name: item[name] for name in _PROBLEM if name in item}
    data = _int4.problem(item["seed"], **options)
    operands = (data["x"], *data["weights"][0])
    config = Config(**item["config"]) if "config" in item else None
    product = jax.jit(functools.partial(int4_matmul, implementation="mosaic_gpu", config=config))
    run = product.lower(*operands, bias=data["bias"]).compile()
    check = _int4.compiled_check(data, lambda: run(*operands, bias=data["bias"]))
    with _workers.device_turn():
        return check()


def _time_jax(item: dict) -> dict:
    """The kernel, XLA's bfloat16 product, or XLA's own int4 product."""
    import jax
    import jax.numpy as jnp

    from experiments import _clock, _int4
    from pallas_kernels.int4_matmul import int4_matmul

    (k, n), m = SHAPES[item["shape"]], item["m"]
    checked = {}
    if item["what"] == "mosaic_gpu":
        data = _int4.problem(item["seed"], m, k, n, GROUP, copies=_int4.copies_for(k, n))
        x, weights = data["x"], data["weights"]
        product = jax.jit(functools.partial(int4_matmul, implementation="mosaic_gpu"))
    else:
        keys = jax.random.split(jax.random.key(item["seed"]), 65)
        x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        if item["what"] == "xla_bf16":
            make = lambda key: (jax.random.normal(key, (k, n), jnp.bfloat16) * 0.02,)  # noqa: E731
            product = jax.jit(jnp.matmul)
        else:
            make = lambda key: (  # noqa: E731
                jax.random.randint(key, (k // GROUP, GROUP, n), -8, 8, jnp.int8).astype(jnp.int4),
                jnp.full((k // GROUP, 1, n), 0.02, jnp.bfloat16),
            )
            product = jax.jit(_xla_int4)
        copies = _clock.rotations(k * n * 2) if item["what"] == "xla_bf16" else _int4.copies_for(k, n)
        weights = [make(key) for key in keys[1 : copies + 1]]
    program = jax.jit(lambda x, weights: [product(x, *[a for a in w if a is not None]) for w in weights])
    compiled = program.lower(x, weights).compile()
    check = item["what"] == "mosaic_gpu" and _int4.compiled_check(data, lambda: compiled(x, weights)[0])
    with _workers.device_turn():
        if check:
            checked = check()
            if not checked["ok"]:
                return checked
        _workers.stage("timing")
        kernel = _clock.kernel_microseconds(compiled, (x, weights), calls=len(weights))
        return checked | {
            "kernel_us": kernel,
            "call_us": _clock.wall_microseconds(compiled, (x, weights), calls=len(weights)),
        }


def _xla_int4(x, codes, scale):
    """What a user writes without a kernel: dequantize in the program and multiply."""
    weight = (codes.astype(x.dtype) * scale).reshape(x.shape[-1], -1)
    return x @ weight


def _time_torch(item: dict) -> dict:
    """torch.mm and tinygemm, by graph replay."""
    import torch

    from experiments import _clock

    (k, n), m = SHAPES[item["shape"]], item["m"]
    torch.manual_seed(item["seed"])
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = [torch.randn(k, n, device="cuda", dtype=torch.bfloat16) for _ in range(_clock.rotations(k * n * 2))]
    result = {}
    with _workers.device_turn():
        result["torch_mm_us"] = _clock.graph_microseconds([functools.partial(torch.mm, x, w) for w in dense])
        del dense
        if m <= 256:
            codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
            packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(_clock.rotations(k * n // 2))]
            scales = torch.rand(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16)
            calls = [functools.partial(torch.ops.aten._weight_int4pack_mm, x, w, GROUP, scales) for w in packed]
            result["tinygemm_us"] = _clock.graph_microseconds(calls)
            del packed
    return result


def report(results: list[dict], shapes: list[str], tokens: list[int]) -> list[dict]:
    """One row a problem: each implementation's times side by side, with the floor."""
    peaks = next((r for r in results if r["what"] == "peaks" and "error" not in r), None)
    rows = []
    for shape in shapes:
        for m in tokens:
            found = {r["what"]: r for r in results if r.get("shape") == shape and r.get("m") == m}
            if not found:
                continue
            row: dict = {"shape": shape, "m": m}
            for what, r in found.items():
                if "error" in r or r.get("ok") is False:
                    row[f"{what}_failed"] = r.get("error", f"relative error {r.get('relative_error')}")
                row |= {
                    f"{what}_{name}" if what != "torch" else name: value
                    for name, value in r.items()
                    if name.endswith("_us")
                }
            if peaks:
                row["floor_us"] = floor_microseconds(m, *SHAPES[shape], peaks)
            rows.append(row)
    return rows


def show(result: dict) -> None:
    """One line a result, as it comes."""
    _bench.show(result, where=("what", "shape", "m", "k", "n", "group", "dtype"), hidden=("config",))


def main():
    parser = _bench.parser(__doc__, shapes=list(SHAPES), tokens=TOKENS, seconds=300)
    parser.add_argument("--op", choices=["int4"], default="int4")
    parser.add_argument("--implementations", nargs="*", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--verify-only", action="store_true")
    options = parser.parse_args()
    if options.worker:
        return _workers.serve(measure)
    items = [{"what": "verify"} | case for case in VERIFY]
    if not options.verify_only:
        wanted = itertools.product(options.m, options.shapes, options.implementations)
        items = [{"what": "peaks"}, *({"what": what, "shape": s, "m": m} for m, s, what in wanted)]
    limits = {"workers": options.workers, "seconds": options.seconds, "stall": 15, "on_result": show}
    results = _bench.answers("experiments.bench_matmul", items, **limits)
    rows = report(results, options.shapes, options.m)
    peers = compare_int4.peers_of_run(rows, compare_int4.published_peers()["rows"])
    bars = compare_int4.bars(compare_int4.compare(compare_int4.times_of(rows), peers))
    _bench.finish(options.json, bars, rows=rows, all=results)


if __name__ == "__main__":
    main()
