"""How fast int4 weights by 8-bit activations are, each product verified before it is timed.

    python -m experiments.bench_w4a8 [--shapes ...] [--m ...] [--only verify time torch sweep] [--seconds N] [--json F]

Microseconds a call by CUPTI: `kernel_us`, the product of codes; `total_us`, with the quantization of a bfloat16
activation before it; `w4a16_us`, the 16-bit product of the same weight. `mm_us` is torch.mm in bfloat16 by CUDA graph
replay. Weights are rotated past the L2 cache.
"""

import dataclasses
import functools
import itertools

from experiments import _bars, _bench, _workers
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
    return {"verify": _verify, "time": _time, "torch": time_torch, "sweep": _sweep}[item["what"]](item)


def _product(item: dict, **options):
    from pallas_kernels.int4_matmul import Config, int4_matmul

    config = Config(**item["config"]) if item.get("config") else None
    return functools.partial(int4_matmul, implementation="mosaic_gpu", config=config, **options)


def _verify(item: dict) -> dict:
    import jax

    from experiments import _int4

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

    from experiments import _clock, _int4

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

    from experiments import _clock
    from pallas_kernels.activation_quant import activation_quant

    result = _sweep(item)
    if not result["ok"]:
        return result
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


def time_torch(item: dict) -> dict:
    """torch.mm in bfloat16: of an item, its `shape` and `m`."""
    import torch

    from experiments import _clock

    (k, n), m = SHAPES[item["shape"]], item["m"]
    weights = [torch.randn(k, n, device="cuda", dtype=torch.bfloat16) for _ in range(_clock.rotations(k * n * 2))]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    with _workers.device_turn():
        return {"mm_us": _clock.graph_microseconds([functools.partial(torch.mm, x, w) for w in weights], replays=10)}


def summary(results: list[dict]) -> None:
    """Speed-up over torch.mm with the quantization counted, and time beside the 16-bit product's."""
    mm = {(r["shape"], r["m"]): r["mm_us"] for r in results if "mm_us" in r}
    for r in sorted((r for r in results if "total_us" in r), key=lambda r: (r["form"], r["m"])):
        peer = mm.get((r["shape"], r["m"]))
        against = f"torch.mm {peer:8.1f} ({peer / r['total_us']:.2f}x)" if peer else ""
        w4a16 = f"W4A16 {r['w4a16_us']:7.1f} ({r['kernel_us'] / r['w4a16_us']:.2f} of it)" if "w4a16_us" in r else ""
        times = f"product {r['kernel_us']:8.1f} total {r['total_us']:8.1f}"
        print(f"{r['form']:13} {r['shape']:20} m={r['m']:<5} {times} {against} {w4a16}")


def bars(results: list[dict]) -> list[dict]:
    """The quantization counted against torch.mm from 256 tokens, and beside W4A16 below."""
    mm = {(r["shape"], r["m"]): r["mm_us"] for r in results if "mm_us" in r}
    timed = sorted((r for r in results if "total_us" in r), key=lambda r: (r["form"], r["m"]))
    found = []
    for form, least in (("int8-channel", 1.5), ("int8-g128", 1.3)):
        rows = [r for r in timed if r["form"] == form]
        against = {
            m: [
                _bars.bar(f"{form} {r['shape']} M={m} over torch.mm", r["total_us"], mm[r["shape"], m], bar)
                for r in rows
                if r["m"] == m and (r["shape"], m) in mm
            ]
            for m, bar in ((256, 1.2), (1024, least), (4096, least))
        }
        found += [*itertools.chain(*against.values()), *_bars.mean_bar(f"{form} M=256", against[256], 1.2)]
        found += _bars.mean_bar(f"{form} M>=1024", against[1024] + against[4096], least)
        for r in (r for r in rows if "w4a16_us" in r and r["m"] <= 128):
            few = r["m"] <= 32  # there without the quantization
            name = f"{form} {r['shape']} M={r['m']} over W4A16{'' if few else ', quantization counted'}"
            ours = r["kernel_us"] if few else r["total_us"]
            found.append(_bars.bar(name, ours, r["w4a16_us"], 1 / 1.05 if few else 1.0))
    return found


def main():
    parser = _bench.parser(
        __doc__,
        shapes=["llama3-8b/o", "llama3-70b/o", "llama3-8b/gate_up"],
        tokens=[4096, 1024, 256, 128, 16, 32, 1],
        seconds=150,
    )
    parser.add_argument("--forms", nargs="*", default=["int8-g128", "int8-channel", "fp8-g128"], choices=FORMS)
    parser.add_argument("--only", nargs="*", default=["verify", "torch", "time"], choices=STEPS)
    options = parser.parse_args()
    if options.worker:
        return _workers.serve(measure)
    problems = [{"shape": s, "m": m} for m in options.m for s in options.shapes]
    items = {
        "verify": verify_items(),
        "time": [{"what": "time", "form": f} | p for f in options.forms for p in problems],
        "torch": [{"what": "torch"} | p for p in problems],
        "sweep": sweep_items(options.shapes, options.m, options.forms) if "sweep" in options.only else [],
    }
    results = _bench.answers(
        "experiments.bench_w4a8",
        [item for step in options.only for item in items[step]],
        workers=options.workers,
        seconds=options.seconds,
        stall=20,
        on_result=functools.partial(_bench.show, where=("what", "form", "shape", "m", "k", "n", "dtype", "group")),
    )
    summary(results)
    _bench.finish(options.json, bars(results), results=results)


if __name__ == "__main__":
    main()
