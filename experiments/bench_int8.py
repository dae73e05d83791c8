"""How fast the 8-bit products are against what else the same card can run, each verified before it is timed.

    python -m experiments.bench_int8 [--shapes ...] [--m ...] [--only verify peaks time xla torch quant sweep]
    [--seconds 230] [--json F]

Microseconds a call: `kernel`, all that the op launches, by CUPTI; `xla`, what implementation="xla" launches, its
products by cuBLASLt, which is autotuned; torch's by CUDA graph replay (`graph`) and, where
gaps between kernels count, by its profiler (`kernel`). Weights are rotated past the L2 cache.
"""

import functools
import os
import time

from experiments import _bars, _bench, _int8_items, _workers
from pallas_kernels.activation_quant.cases import SHAPES as QUANT_SHAPES
from pallas_kernels.int8_matmul.cases import BLOCK_SHAPES, SHAPES

STEPS = ("verify", "siblings", "peaks", "time", "xla", "torch", "quant", "sweep")
BLOCK_TOKENS = (4096, 8192)  # from which block scales are held to a bar


def measure(item: dict) -> dict:
    """One item, in a worker."""
    if item["what"] == "peaks":
        from experiments import _clock

        with _workers.device_turn():  # Without autotuning XLA's bfloat16 product is no ceiling.
            return {"copy_bytes_per_s": _clock.measured_peaks()["copy_bytes_per_s"]}
    steps = {
        "verify": _verify,
        "siblings": _verify_siblings,
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
    from experiments import _int8

    problem = {name: item[name] for name in ("m", "k", "n", "dtype", "form", "bias") if name in item}
    verify = _int8.prepare(_int8.problem(item["seed"], **problem), _config(item), item.get("out_dtype", "bfloat16"))
    with _workers.device_turn():
        return verify()


def _verify_siblings(item: dict) -> dict:
    from experiments import _int8

    verify = _int8.prepare_siblings(*(item[name] for name in ("seed", "m", "k", "outputs", "dtype", "form")))
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

    from experiments import _clock, _int8
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

    from experiments import _clock, _int8
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

    from experiments import _clock

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
    from experiments import _int8

    options = {name: item[name] for name in ("m", "k", "dtype", "group", "x_dtype", "norm")}
    with _workers.device_turn():
        return _int8.verify_quantization(item["seed"], **options)


def _time_quant(item: dict) -> dict:
    """The quantization kernel and XLA's program on one activation, perhaps normalised, rotated past the L2 cache."""
    import jax
    import jax.numpy as jnp

    from experiments import _clock
    from pallas_kernels.activation_quant import activation_quant

    m, k = QUANT_SHAPES[item["shape"]]
    copies = _clock.rotations(2 * m * k) if m > 256 else 8
    xs = [jax.random.normal(jax.random.key(item["seed"] + i), (m, k), jnp.bfloat16) for i in range(copies)]
    result = {"bytes": m * k * 3 + 4 * m * (k // item["group"] if item["group"] else 1)}
    options = {"dtype": item["dtype"], "group_size": item["group"]}
    if item["norm"]:
        options |= {"norm_weight": jnp.full((k,), 1.5, jnp.bfloat16), "epsilon": 1e-6}
    for implementation in ("mosaic_gpu", "xla"):
        quantize = functools.partial(activation_quant, implementation=implementation, **options)
        compiled = jax.jit(lambda xs, quantize=quantize: [quantize(x) for x in xs]).lower(xs).compile()
        with _workers.device_turn():
            result[f"{implementation}_us"] = _clock.kernel_microseconds(compiled, (xs,), calls=copies, iterations=7)
    return result


def _cut(item: dict) -> str:
    """What a hang of one item makes of no use to try again: configurations with clusters of the same sort."""
    config = item.get("config")
    return str([config["weights_first"], config["split_k"] > 1, config["multicast"] > 1] if config else item)


def bars(results: list[dict]) -> list[dict]:
    """Our times against cuBLASLt's and the copy rate."""
    return [*_product_bars(results), *_block_bars(results), *_quantization_bars(results)]


def _product_bars(results: list[dict]) -> list[dict]:
    """fp8 against both forms of `_scaled_mm`, int8 against `_int_mm`."""
    peers = {
        (r["shape"], *name.split("/")): times["graph_us"]
        for r in results
        for name, times in r.get("times", {}).items()
        if "graph_us" in times
    }
    ours = [r for r in results if r["what"] == "time" and "kernel_us" in r and not r.get("config")]
    found = []
    for dtype, peer, few, least in (
        ("float8_e4m3fn", "fp8_tensor", False, 0.97),
        ("float8_e4m3fn", "fp8_row", False, 1.1),
        ("float8_e4m3fn", "fp8_row", True, 1.3),
        ("int8", "int_mm", False, 1.5),
    ):
        rows = [
            _bars.bar(f"{dtype} {r['shape']} M={r['m']} over {peer}", r["kernel_us"], peers[key], least)
            for r in sorted(ours, key=lambda r: r["m"])
            if r["dtype"] == dtype and r["form"] == "token" and (r["m"] <= 128 if few else r["m"] >= 1024)
            if (key := (r["shape"], peer, str(r["m"]))) in peers
        ]
        found += rows + _bars.mean_bar(f"{dtype} {'M<=128' if few else 'M>=1024'} over {peer}", rows, least)
    return found


def _block_bars(results: list[dict]) -> list[dict]:
    """Block scales at 1200 TFLOP/s."""
    found = []
    for r in results:
        if r["what"] == "time" and r.get("form") == "block" and "kernel_us" in r and r["m"] in BLOCK_TOKENS:
            k, n = BLOCK_SHAPES[r["shape"]]
            found.append(
                _bars.bar(f"blocks {r['m']}x{k}x{n} of 1200 TFLOP/s", r["kernel_us"], 2 * r["m"] * k * n / 1200e6, 1.0)
            )
    return found


def _quantization_bars(results: list[dict]) -> list[dict]:
    """Quantization at 80 % of the copy rate, from 4096 x 4096 up."""
    rate = next((r["copy_bytes_per_s"] for r in results if "copy_bytes_per_s" in r), None)
    return [
        _bars.bar(
            f"quantize {r['shape']} {r['dtype']} group {r['group']}{' RMSNorm' * bool(r.get('norm'))} of the copy rate",
            r["mosaic_gpu_us"],
            r["bytes"] / rate * 1e6,
            0.80,
        )
        for r in results
        if rate and r["what"] == "quant" and "mosaic_gpu_us" in r and r["bytes"] >= 3 * 4096 * 4096
    ]


def main():
    parser = _bench.parser(
        __doc__,
        shapes=["llama3-8b/o", "llama3-70b/o", "llama3-8b/gate_up"],
        tokens=[4096, 1024, 16, 128, 1, 64, 256, 32],
        seconds=230,
    )
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=STEPS)
    options = parser.parse_args()
    if options.worker:  # Autotuning would run on the device while others are timed.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
        return _workers.serve(measure)
    timed = _int8_items.time_items(options.shapes, options.m)
    steps = {
        "verify": _int8_items.verify_items(),
        "siblings": _int8_items.sibling_items(),
        "peaks": [{"what": "peaks"}],
        "time": timed,
        "xla": [item | {"what": "xla"} for item in timed],
        "torch": _int8_items.torch_items(options.shapes, options.m),
        "quant": _int8_items.quant_items(),
        "sweep": _int8_items.sweep_items(),
    }
    deadline, results = time.monotonic() + options.seconds, []
    where = ("what", "shape", "m", "k", "n", "dtype", "form", "group", "norm")
    shown = functools.partial(_bench.show, where=where, hidden=("tokens",))
    # Within a phase workers choose items by what they have in memory. PyTorch's profiler keeps CUPTI to itself for the
    # rest of a process, so its measurements have processes of their own; XLA's programs are searched for at the device.
    for phase in (("torch",), ("verify", "siblings", "peaks", "time", "quant"), ("xla",), ("sweep",)):
        items = [item for step in phase if step in options.only for item in steps[step]]
        if items:
            left = {"workers": options.workers, "seconds": deadline - time.monotonic()}
            results += _bench.answers("experiments.bench_int8", items, **left, stall=20, kin=_cut, on_result=shown)
    _bench.finish(options.json, bars(results), results=results)


if __name__ == "__main__":
    main()
