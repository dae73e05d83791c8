"""How fast int4 weights by 8-bit activations are, each product verified before it is timed.

    python -m experiments.bench_w4a8 [--shapes ...] [--m ...] [--only verify time torch sweep] [--seconds N] [--json F]

Microseconds a call by CUPTI: `kernel_us`, the product of codes; `total_us`, with the quantization of a bfloat16
activation before it; `w4a16_us`, the 16-bit product of the same weight. `mm_us` is torch.mm in bfloat16 by CUDA graph
replay. Weights are rotated past the L2 cache.
"""

import argparse
import dataclasses
import functools

from pallas_kernels.int4_matmul.cases import SHAPES

STEPS = ("verify", "time", "torch", "sweep")
FORMS = {"int8-g128": ("int8", 128), "int8-channel": ("int8", None), "fp8-g128": ("float8_e4m3fn", 128)}
SWEPT = 8  # configurations of a problem that a sweep times
_PROBLEM = ("m", "k", "n", "group", "dtype", "bias", "code")

_cut = lambda **cut: {"block_k": 256, "num_stages": 2, "num_warpgroups": 2, "split_k": 1, "scale_after": True} | cut  # noqa: E731
# Ragged in every dimension, groups and channels, results of each width, clusters that split and share, extreme codes.
VERIFY = [
    *[{"m": m, "k": 4096, "n": 4096, "group": 128} for m in (1, 7, 16, 33, 64, 100, 300)],
    *[{"m": m, "k": 1600, "n": 1088, "group": 64, "bias": True} for m in (5, 48, 257)],
    *[{"m": m, "k": 1000, "n": 100, "group": 1000, "bias": True, "out_dtype": "float32"} for m in (1, 40, 150)],
    *[{"m": m, "k": 14336, "n": 4096, "group": 14336, "out_dtype": "float16"} for m in (4, 520)],
    *[{"m": 40, "k": 4096, "n": 4096, "group": 128, "code": code} for code in (-8, 7)],
    {"m": 1000, "k": 4096, "n": 4096, "group": 128, "config": _cut(block_m=128, multicast=2)},
    {"m": 300, "k": 4096, "n": 4096, "group": 128, "config": _cut(block_m=128, split_k=2), "out_dtype": "float32"},
    {"m": 60, "k": 4096, "n": 4096, "group": 4096, "config": _cut(block_m=64, split_k=2)},
]


def verify_items() -> list[dict]:
    """Every case in both formats, and int8's widest tile."""
    items = [case | {"dtype": dtype} for case in VERIFY for dtype in ("int8", "float8_e4m3fn")]
    wide = _cut(block_m=256, multicast=2)
    items.append({"m": 900, "k": 4096, "n": 4096, "group": 4096, "dtype": "int8", "config": wide})
    return [{"what": "verify"} | item for item in items]


def sweep_items(shapes: list[str], tokens: list[int], forms: list[str]) -> list[dict]:
    """What the cost model likes best for each problem."""
    from pallas_kernels.int4_matmul.choice import candidates, predicted_microseconds, predicted_microseconds_of_codes

    queues = []
    for shape, m, form in ((s, m, f) for m in tokens for s in shapes for f in forms):
        (k, n), (dtype, group) = SHAPES[shape], FORMS[form]
        groups = k // group if group else 1
        predicted = functools.partial(predicted_microseconds_of_codes, num_groups=groups, dtype=dtype)
        predicted = predicted_microseconds if m <= 64 else predicted
        configs = candidates(m, k, n, groups, dtype)
        configs = sorted(configs, key=lambda c, m=m, k=k, n=n, predicted=predicted: predicted(c, m, k, n))[:SWEPT]
        problem = {"what": "sweep", "shape": shape, "m": m, "form": form}
        queues.append([problem | {"config": dataclasses.asdict(c)} for c in configs])
    return [queue[i] for i in range(SWEPT) for queue in queues if i < len(queue)]


def measure(item: dict) -> dict:
    """One item, in a worker."""
    return {"verify": _verify, "time": _time, "torch": _time_torch, "sweep": _sweep}[item["what"]](item)


def _product(item: dict, **options):
    from pallas_kernels.int4_matmul import Config, int4_matmul

    config = Config(**item["config"]) if item.get("config") else None
    return functools.partial(int4_matmul, implementation="mosaic_gpu", config=config, **options)


def _verify(item: dict) -> dict:
    import jax

    from experiments import _int4, _workers

    data = _int4.problem(item["seed"], **{name: item[name] for name in _PROBLEM if name in item})
    out_dtype = item.get("out_dtype", "bfloat16")
    operands, rest = (data["x"], *data["weights"][0]), {name: data[name] for name in ("x_scale", "bias")}
    run = jax.jit(_product(item, out_dtype=out_dtype)).lower(*operands, **rest).compile()
    check = _int4.compiled_check(data, lambda: run(*operands, **rest), out_dtype)
    with _workers.device_turn():
        return check()


@functools.lru_cache(maxsize=1)
def _problem(shape: str, m: int, form: str) -> dict:
    from experiments import _int4

    (k, n), (dtype, group) = SHAPES[shape], FORMS[form]
    return _int4.problem(hash((shape, m)) % 2**31, m, k, n, group or k, dtype=dtype, copies=_int4.copies_for(k, n))


def _sweep(item: dict) -> dict:
    """The product of codes by one configuration, verified and timed."""
    import jax

    from experiments import _clock, _int4, _workers

    data = _problem(item["shape"], item["m"], item["form"])
    product, weights = jax.jit(_product(item)), data["weights"]
    program = jax.jit(lambda x, x_scale, weights: [product(x, *w[:2], x_scale=x_scale) for w in weights])
    args = (data["x"], data["x_scale"], weights)
    compiled = program.lower(*args).compile()
    check = _int4.compiled_check(data, lambda: compiled(*args)[0], "bfloat16")
    with _workers.device_turn():
        checked = check()
        if not checked["ok"]:
            return checked
        _workers.stage("timing")
        return checked | {"kernel_us": _clock.kernel_microseconds(compiled, args, calls=len(weights), iterations=7)}


def _time(item: dict) -> dict:
    """The default configuration: the product, all of it from a bfloat16 activation on, and the 16-bit product."""
    import jax
    import jax.numpy as jnp

    from experiments import _clock, _workers
    from pallas_kernels.activation_quant import activation_quant

    result = _sweep(item)
    data, product = _problem(item["shape"], item["m"], item["form"]), jax.jit(_product(item))
    weights, dtype = data["weights"], FORMS[item["form"]][0]
    keys = jax.random.split(jax.random.key(item["seed"]), len(weights))
    xs = [jax.random.normal(key, data["x"].shape, jnp.bfloat16) for key in keys]  # not one x: it would be shared

    def whole(x, weight):
        codes, scale = activation_quant(x, dtype, implementation="mosaic_gpu")
        return product(codes, *weight[:2], x_scale=scale)

    programs = {"total": lambda xs, weights: [whole(x, w) for x, w in zip(xs, weights, strict=True)]}
    if item["m"] <= 256:
        programs["w4a16"] = lambda xs, weights: [product(x, *w[:2]) for x, w in zip(xs, weights, strict=True)]
    compiled = {name: jax.jit(program).lower(xs, weights).compile() for name, program in programs.items()}
    with _workers.device_turn():
        for name, program in compiled.items():
            _workers.stage("timing " + name)
            microseconds = _clock.kernel_microseconds(program, (xs, weights), calls=len(weights), iterations=7)
            result[f"{name}_us"] = microseconds
    return result


def _time_torch(item: dict) -> dict:
    """torch.mm in bfloat16."""
    import torch

    from experiments import _clock, _workers

    (k, n), m = SHAPES[item["shape"]], item["m"]
    weights = [torch.randn(k, n, device="cuda", dtype=torch.bfloat16) for _ in range(_clock.rotations(k * n * 2))]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    with _workers.device_turn():
        return {"mm_us": _clock.graph_microseconds([functools.partial(torch.mm, x, w) for w in weights], replays=10)}


def show(result: dict):
    """One line a result."""
    failed = "error" in result or result.get("ok") is False
    shown = {name: round(v, 2 if v > 1 else 6) if isinstance(v, float) else v for name, v in result.items()}
    hidden = ("seed", "ok", "deterministic")
    print("FAILED" if failed else "", " ".join(f"{k}={v}" for k, v in shown.items() if k not in hidden), flush=True)


def summary(results: list[dict]):
    """Speed-up over torch.mm with the quantization counted, and time beside the 16-bit product's."""
    mm = {(r["shape"], r["m"]): r["mm_us"] for r in results if "mm_us" in r}
    for r in sorted((r for r in results if "total_us" in r), key=lambda r: (r["form"], r["m"])):
        peer = mm.get((r["shape"], r["m"]))
        against = f"torch.mm {peer:8.1f} ({peer / r['total_us']:.2f}x)" if peer else ""
        w4a16 = f"W4A16 {r['w4a16_us']:7.1f} ({r['kernel_us'] / r['w4a16_us']:.2f} of it)" if "w4a16_us" in r else ""
        times = f"product {r['kernel_us']:8.1f} total {r['total_us']:8.1f}"
        print(f"{r['form']:13} {r['shape']:20} m={r['m']:<5} {times} {against} {w4a16}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["llama3-8b/o", "llama3-70b/o", "llama3-8b/gate_up"])
    parser.add_argument("--m", nargs="*", type=int, default=[1, 16, 32, 128, 256, 1024, 4096])
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--only", nargs="*", default=["verify", "time", "torch"], choices=STEPS)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from experiments import _workers

    if options.worker:
        return _workers.serve(measure)
    import secrets

    problems = [{"shape": s, "m": m} for m in options.m for s in options.shapes]
    items = {
        "verify": verify_items(),
        "time": [{"what": "time", "form": f} | p for f in options.forms for p in problems],
        "torch": [{"what": "torch"} | p for p in problems],
        "sweep": sweep_items(options.shapes, options.m, options.forms) if "sweep" in options.only else [],
    }
    asked = [item | {"seed": secrets.randbelow(2**31)} for step in options.only for item in items[step]]
    results = _workers.run(
        "experiments.bench_w4a8", asked, workers=options.workers, seconds=options.seconds, stall=20, on_result=show
    )
    checked = [r for r in results if "ok" in r or "error" in r]
    print(f"{len(results)} of {len(asked)} items; {sum(not r.get('ok') for r in checked)} of {len(checked)} failed")
    summary(results)
    if options.json:
        from experiments._clock import write_results

        write_results(options.json, results=results)


if __name__ == "__main__":
    main()
