"""How fast the 8-bit products are against what else the same card can run, each verified before it is timed.

    python -m experiments.bench_int8 [--shapes ...] [--m ...] [--only verify peaks time xla torch quant sweep]
    [--time-limit 230]

Microseconds a call: `kernel`, all that the op launches, by CUPTI; `xla`, what implementation="xla" launches, its
products by cuBLASLt, which is autotuned; torch's by CUDA graph replay (`graph`) and, where
gaps between kernels count, by its profiler (`kernel`). Weights are rotated past the L2 cache.
"""

import argparse
import dataclasses
import functools
import os
import time

from pallas_kernels.activation_quant.cases import SHAPES as QUANT_SHAPES
from pallas_kernels.int8_matmul.cases import BLOCK_SHAPES, SHAPES

STEPS = ("verify", "peaks", "time", "xla", "torch", "quant", "sweep")
DTYPES = ("float8_e4m3fn", "int8")
SWEPT = 12  # configurations of a problem that a sweep times


def verify_items() -> list[dict]:
    """Each form, each cut of the kernel, ragged in every dimension that is not padded."""
    config = lambda **cut: {"num_stages": 4, "block_k": 128, "weights_first": False, "multicast": 1, "split_k": 1} | cut  # noqa: E731
    first = lambda m, **cut: config(weights_first=True, block_m=m, block_n=128, **cut)  # noqa: E731
    cuts = [
        (300, config(block_m=256, block_n=128), "float8_e4m3fn"),
        (1000, config(block_m=256, block_n=128, multicast=2), "float8_e4m3fn"),
        (300, config(block_m=128, block_n=128), "float8_e4m3fn"),
        (1000, config(block_m=128, block_n=128, multicast=2), "float8_e4m3fn"),
        (300, config(block_m=128, block_n=256), "int8"),
        (1000, config(block_m=128, block_n=256, multicast=2), "int8"),
        (1000, config(block_m=256, block_n=128, multicast=2), "int8"),
        (16, first(16), "int8"),
        (16, first(16, split_k=2), "int8"),
        (7, first(8, split_k=4), "int8"),
        (64, first(64, split_k=4), "float8_e4m3fn"),
        (100, first(128, split_k=2), "float8_e4m3fn"),
        (33, config(block_m=64, block_n=128, num_warpgroups=1, split_k=2), "int8"),
        (64, first(64, multicast=2), "int8"),
        (200, first(64, multicast=2), "float8_e4m3fn"),
    ]
    items = [
        {"m": m, "k": 2048 + 128, "n": 1024 + 128, "dtype": dtype, "form": "token", "config": c} for m, c, dtype in cuts
    ]
    # Several tiles a block: both slots of scales are used.
    narrow = first(16, num_warpgroups=1) | {"block_n": 64}
    items += [
        {"m": 16, "k": 512, "n": 150 * 128, "dtype": dtype, "form": "token", "config": narrow | {"split_k": split}}
        for dtype in DTYPES
        for split in (1, 2)
    ]
    sizes = (
        (1, 4096, 4096),
        (8, 14336, 4096),
        (17, 4096, 6144),
        (64, 4096, 4096),
        (130, 4096, 4096),
        (520, 2048, 1152),
    )
    thirds = config(block_m=192, block_n=128, num_warpgroups=3)
    items += [
        {"m": 1000, "k": 2048, "n": 1152, "dtype": dtype, "form": form, "config": thirds | {"multicast": multicast}}
        for dtype, form, multicast in (
            ("float8_e4m3fn", "block", 1),
            ("float8_e4m3fn", "block", 2),
            ("int8", "token", 2),
        )
    ]
    for dtype in DTYPES:
        items += [{"m": m, "k": k, "n": n, "dtype": dtype, "form": "token", "bias": True} for m, k, n in sizes]
        items += [{"m": m, "k": 2048, "n": 1152, "dtype": dtype, "form": "tensor"} for m in (5, 300)]
        items += [{"m": m, "k": 2048, "n": 1152, "dtype": dtype, "form": "block"} for m in (1, 16, 64, 100, 1000)]
        items += [
            {"m": m, "k": 2048, "n": 1152, "dtype": dtype, "form": "token", "out_dtype": out}
            for m in (9, 200)
            for out in ("float32", "float16")
        ]
    items += [{"m": m, "k": 2048, "n": 1152, "dtype": "int8", "form": "asymmetric", "bias": True} for m in (1, 40, 300)]
    return [item | {"what": "verify"} for item in items]


def quant_items() -> list[dict]:
    """The quantization kernels, verified on ragged rows, then timed on real ones."""
    cases = [(m, k, group, x_dtype, norm) for m, k in ((3, 4096), (70, 1664)) for group in (None, 128)
             for x_dtype, norm in (("bfloat16", False), ("float32", True), ("float16", False))]  # fmt: skip
    names = ("m", "k", "group", "x_dtype", "norm")
    items = [
        {"what": "quant_verify", "dtype": dtype} | dict(zip(names, case, strict=True))
        for case in cases
        for dtype in DTYPES
    ]
    return items + [
        {"what": "quant", "shape": shape, "dtype": dtype, "group": group}
        for shape in QUANT_SHAPES
        for dtype, group in (("int8", None), ("float8_e4m3fn", None), ("float8_e4m3fn", 128))
    ]


def time_items(shapes: list[str], tokens: list[int]) -> list[dict]:
    """Every problem with the default configuration, and the block-scaled ones."""
    items = [
        {"what": "time", "shape": s, "m": m, "dtype": dtype, "form": "token"}
        for m in tokens
        for s in shapes
        for dtype in DTYPES
    ]
    return items + [
        {"what": "time", "shape": s, "m": m, "dtype": "float8_e4m3fn", "form": "block"}
        for s, m in (("deepseek-v3/o", 4096), ("square", 8192), ("deepseek-v3/o", 64))
    ]


def sweep_items() -> list[dict]:
    """What the cost model likes best for each problem, problems interleaved: a run cut short covers all of them."""
    from pallas_kernels.int8_matmul import candidates
    from pallas_kernels.int8_matmul.config import predicted_microseconds

    tables = {
        ("llama3-70b/o", "float8_e4m3fn"): (16, 128, 256),
        ("llama3-8b/o", "float8_e4m3fn"): (16, 128, 256, 1024),
        ("llama3-8b/gate_up", "float8_e4m3fn"): (1, 16, 64, 128, 256, 1024),
        ("llama3-70b/o", "int8"): (1, 64, 256, 1024, 4096),
        ("llama3-8b/o", "int8"): (1, 64, 256, 1024, 4096),
        ("llama3-8b/gate_up", "int8"): (1, 64, 256, 1024, 4096),
    }
    problems = [(shape, m, dtype, "token") for (shape, dtype), tokens in tables.items() for m in tokens]
    problems += [(shape, m, "float8_e4m3fn", "block") for shape, m in (("deepseek-v3/o", 4096), ("square", 8192))]
    queues = []
    for shape, m, dtype, form in problems:
        k, n = (SHAPES | BLOCK_SHAPES)[shape]
        configs = candidates(m, k, n, dtype, blocked=form == "block")
        configs = sorted(configs, key=lambda c, m=m, k=k, n=n: predicted_microseconds(c, m, k, n))[:SWEPT]
        problem = {"what": "time", "shape": shape, "m": m, "dtype": dtype, "form": form}
        queues.append([problem | {"config": dataclasses.asdict(c)} for c in configs])
    return [queue[i] for i in range(SWEPT) for queue in queues if i < len(queue)]


def torch_items(shapes: list[str], tokens: list[int]) -> list[dict]:
    """Two token counts an item: few enough to be done before a worker counts as hung."""
    return [
        {"what": "torch", "shape": s, "tokens": tokens[i : i + 2]} for i in range(0, len(tokens), 2) for s in shapes
    ]


def measure(item: dict) -> dict:
    """One item, in a worker."""
    if item["what"] == "peaks":
        from experiments import _clock, _workers

        with _workers.device_turn():  # Without autotuning XLA's bfloat16 product is no ceiling.
            return {"copy_bytes_per_s": _clock.measured_peaks()["copy_bytes_per_s"]}
    steps = {
        "verify": _verify,
        "time": _time,
        "xla": _time_xla,
        "torch": _time_torch,
        "quant_verify": _verify_quant,
        "quant": _time_quant,
    }
    return steps[item["what"]](item)


def _config(item: dict):
    from pallas_kernels.int8_matmul import Config

    return Config(**item["config"]) if item.get("config") else None


def _verify(item: dict) -> dict:
    from experiments import _int8, _workers

    problem = {name: item[name] for name in ("m", "k", "n", "dtype", "form", "bias") if name in item}
    verify = _int8.prepare(_int8.problem(item["seed"], **problem), _config(item), item.get("out_dtype", "bfloat16"))
    with _workers.device_turn():
        return verify()


@functools.lru_cache(maxsize=1)
def _problem(shape: str, m: int, dtype: str, form: str) -> dict:
    from experiments import _int8

    k, n = (SHAPES | BLOCK_SHAPES)[shape]
    return _int8.problem(hash((shape, m)) % 2**31, m, k, n, dtype, form, copies=_int8.copies_for(k, n))


def _time(item: dict) -> dict:
    """The kernel on one problem."""
    import jax

    from experiments import _clock, _int8, _workers
    from pallas_kernels.int8_matmul import int8_matmul

    data, config = _problem(item["shape"], item["m"], item["dtype"], item["form"]), _config(item)
    product = jax.jit(functools.partial(int8_matmul, implementation="mosaic_gpu", config=config))
    program = jax.jit(lambda x, x_scale, weights: [product(x, *w, x_scale) for w in weights])
    args = (data["x"], data["x_scale"], data["weights"])
    compiled, verify = program.lower(*args).compile(), _int8.prepare(data, config)
    with _workers.device_turn():
        checked = verify()
        if not checked["ok"]:
            return checked
        return checked | {
            "kernel_us": _clock.kernel_microseconds(compiled, args, calls=len(data["weights"]), iterations=7)
        }


def _time_xla(item: dict) -> dict:
    """XLA's program for one problem, compiled at the device, which autotuning keeps busy."""
    import jax

    from experiments import _clock, _int8, _workers
    from pallas_kernels.int8_matmul import int8_matmul

    data = _problem(item["shape"], item["m"], item["dtype"], item["form"])
    cublas = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 4}
    product = functools.partial(int8_matmul, implementation="xla")
    program = jax.jit(lambda x, x_scale, weights: [product(x, *w, x_scale) for w in weights])
    args = (data["x"], data["x_scale"], data["weights"])
    with _workers.device_turn():
        checked = _int8.prepare(data, implementation="xla", compiler_options=cublas)()
        if not checked["ok"]:
            return checked
        compiled = program.lower(*args).compile(compiler_options=cublas)
        calls = len(data["weights"])
        return checked | {"xla_us": _clock.kernel_microseconds(compiled, args, calls=calls, iterations=7)}


def _time_torch(item: dict) -> dict:
    """PyTorch's bfloat16, fp8 and int8 products of one shape, for every token count."""
    import torch

    from experiments import _clock, _workers

    (k, n), results = SHAPES[item["shape"]], {}
    torch.manual_seed(item["seed"])
    copies = _clock.rotations(k * n)
    dense = [torch.randn(k, n, device="cuda", dtype=torch.bfloat16) for _ in range(_clock.rotations(k * n * 2))]
    fp8 = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn).t() for _ in range(copies)]
    int8 = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8).t() for _ in range(copies)]
    one, columns = torch.ones((), device="cuda"), torch.rand(1, n, device="cuda")
    for m in item["tokens"]:
        x, rows = torch.randn(m, k, device="cuda"), torch.rand(m, 1, device="cuda")
        x8 = x.to(torch.float8_e4m3fn)
        scaled = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16)
        calls = {
            "mm_bf16": [functools.partial(torch.mm, x.to(torch.bfloat16), w) for w in dense],
            "fp8_tensor": [functools.partial(scaled, x8, w, scale_a=one, scale_b=one) for w in fp8],
            "fp8_tensor_fast": [
                functools.partial(scaled, x8, w, scale_a=one, scale_b=one, use_fast_accum=True) for w in fp8
            ],
            "fp8_row": [functools.partial(scaled, x8, w, scale_a=rows, scale_b=columns) for w in fp8],
            "fp8_row_fast": [
                functools.partial(scaled, x8, w, scale_a=rows, scale_b=columns, use_fast_accum=True) for w in fp8
            ],
        }
        if m > 16:
            x_int8 = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
            calls["int_mm"] = [functools.partial(torch._int_mm, x_int8, w) for w in int8]
        with _workers.device_turn():
            for name, these in calls.items():
                try:
                    results[f"{name}/{m}"] = {"graph_us": _clock.graph_microseconds(these, replays=5)}
                    if m <= 256:
                        results[f"{name}/{m}"]["kernel_us"] = _profiled(these)
                except Exception as error:  # a peer that refuses a shape is a result
                    results[f"{name}/{m}"] = {"error": str(error).splitlines()[0][:150]}
    return {"times": results}


def _profiled(calls: list) -> float:
    """Kernel time a call by torch's profiler."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages()) / (3 * len(calls))


def _verify_quant(item: dict) -> dict:
    from experiments import _int8, _workers

    options = {name: item[name] for name in ("m", "k", "dtype", "group", "x_dtype", "norm")}
    with _workers.device_turn():
        return _int8.verify_quantization(item["seed"], **options)


def _time_quant(item: dict) -> dict:
    """The quantization kernel and XLA's program on one activation, rotated past the L2 cache."""
    import jax
    import jax.numpy as jnp

    from experiments import _clock, _workers
    from pallas_kernels.activation_quant import activation_quant

    m, k = QUANT_SHAPES[item["shape"]]
    copies = _clock.rotations(2 * m * k) if m > 256 else 8
    xs = [jax.random.normal(jax.random.key(item["seed"] + i), (m, k), jnp.bfloat16) for i in range(copies)]
    result = {"bytes": m * k * 3 + 4 * m * (k // item["group"] if item["group"] else 1)}
    for implementation in ("mosaic_gpu", "xla"):
        quantize = functools.partial(
            activation_quant, dtype=item["dtype"], group_size=item["group"], implementation=implementation
        )
        compiled = jax.jit(lambda xs, quantize=quantize: [quantize(x) for x in xs]).lower(xs).compile()
        with _workers.device_turn():
            result[f"{implementation}_us"] = _clock.kernel_microseconds(compiled, (xs,), calls=copies, iterations=7)
    return result


def _cut(item: dict) -> str:
    """What a hang of one item makes of no use to try again: configurations with clusters of the same sort."""
    config = item.get("config")
    return str([config["weights_first"], config["split_k"] > 1, config["multicast"] > 1] if config else item)


def show(result: dict):
    """One line a result."""
    names = ("what", "shape", "m", "k", "n", "dtype", "form", "group")
    where = " ".join(str(result[name]) for name in names if result.get(name) is not None)
    hidden = (*names, "seed", "tokens", "times", "ok", "deterministic")
    rest = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in result.items()
        if name not in hidden
    )
    failed = "error" in result or result.get("ok") is False
    print(("FAILED " if failed else "") + where, rest, flush=True)
    for name, times in result.get("times", {}).items():
        print(f"    {result['shape']} {name} {times}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["llama3-8b/o", "llama3-70b/o", "llama3-8b/gate_up"])
    parser.add_argument("--m", nargs="*", type=int, default=[1, 16, 64, 128, 256, 1024, 4096])
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--time-limit", type=float, default=230)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from experiments import _workers

    if options.worker:  # Autotuning would run on the device while others are timed.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
        return _workers.serve(measure)
    import secrets

    steps = {
        "verify": verify_items(),
        "peaks": [{"what": "peaks"}],
        "time": time_items(options.shapes, options.m),
        "xla": [item | {"what": "xla"} for item in time_items(options.shapes, options.m)],
        "torch": torch_items(options.shapes, options.m),
        "quant": quant_items(),
        "sweep": sweep_items(),
    }
    deadline, results, asked = time.monotonic() + options.time_limit, [], 0
    # Within a phase workers choose items by what they have in memory. PyTorch's profiler keeps CUPTI to itself for the
    # rest of a process, so its measurements have processes of their own.
    for phase in (("torch",), ("verify", "peaks", "time", "xla", "quant"), ("sweep",)):
        items = [item for step in phase if step in options.only for item in steps[step]]
        asked += len(items)
        results += _workers.run(
            "experiments.bench_int8",
            [item | {"seed": secrets.randbelow(2**31)} for item in items],
            workers=options.workers,
            seconds=deadline - time.monotonic(),
            stall=20,
            kin=_cut,
            on_result=show,
        )
    checked = [r for r in results if "ok" in r or "error" in r]
    print(f"{len(results)} of {asked} items; {sum(not r.get('ok') for r in checked)} of {len(checked)} checks failed")
    if options.json:
        from experiments._clock import write_results

        write_results(options.json, results=results)


if __name__ == "__main__":
    main()
