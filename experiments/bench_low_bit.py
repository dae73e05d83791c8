"""How fast int8, e4m3, int2 and NF4 weights by 16-bit activations are, each product verified before it is timed.

    python -m experiments.bench_low_bit [--formats ...] [--shapes ...] [--m ...] [--seconds N] [--json F]

`kernel_us`: microseconds a call by CUPTI, weights rotated past the L2 cache; `floor_us`: every byte moved once at 4.3
TB/s (an H200's copy), or the products at 790 TFLOP/s.
"""

import functools
import itertools

from experiments import _bars, _bench, _workers
from pallas_kernels.int4_matmul.cases import SHAPES

GROUPS = {"int8": None, "float8_e4m3fn": None, "int2": 128, "nf4": 64}


def measure(item: dict) -> dict:
    """One product by the default configuration, in a worker."""
    import jax

    from experiments import _clock, _int4
    from pallas_kernels.low_bit_matmul import FORMATS, low_bit_matmul

    (k, n), m, qtype = SHAPES[item["shape"]], item["m"], item["qtype"]
    group, bits = GROUPS[qtype] or k, FORMATS[qtype].bits
    data = _int4.problem(
        item["seed"], m, k, n, group, qtype=qtype, dtype=item["dtype"], copies=_clock.rotations(k * n * bits // 8)
    )
    weights, x = data["weights"], data["x"]
    product = jax.jit(functools.partial(low_bit_matmul, qtype=qtype, implementation="mosaic_gpu"))
    program = jax.jit(lambda x, weights: [product(x, *w[:2]) for w in weights])
    compiled = program.lower(x, weights).compile()
    check = _int4.compiled_check(data, lambda: compiled(x, weights)[0])
    with _workers.device_turn():
        checked = check()
        if not checked["ok"]:
            return checked
        _workers.stage("timing")
        microseconds = _clock.kernel_microseconds(compiled, (x, weights), calls=len(weights), iterations=7)
    moved = k * n * bits / 8 + 2 * m * (k + n) + 2 * k * n // group
    return checked | {"kernel_us": microseconds, "floor_us": max(moved / 4.3e6, 2 * m * k * n / 790e6)}


def bars(results: list[dict]) -> list[dict]:
    """Few tokens against the floor: what int4 is to reach on the large layers (85 %)."""
    timed = [r for r in results if r.get("ok") and r["m"] <= 16 and r["qtype"] != "nf4"]
    return [_bars.bar(f"{r['qtype']} {r['shape']} M={r['m']}", r["kernel_us"], r["floor_us"], 0.85) for r in timed]


def main():
    parser = _bench.parser(__doc__, shapes=["llama3-70b/o", "llama3-8b/gate_up"], tokens=[1, 16, 64, 1024], seconds=100)
    parser.add_argument("--formats", nargs="*", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], choices=["bfloat16", "float16"])
    options = parser.parse_args()
    if options.worker:
        return _workers.serve(measure)
    wanted = itertools.product(options.m, options.shapes, options.dtypes, options.formats)
    items = [{"what": "time", "qtype": q, "shape": s, "m": m, "dtype": d} for m, s, d, q in wanted]
    where = ("qtype", "dtype", "shape", "m")
    results = _bench.answers(
        "experiments.bench_low_bit",
        items,
        workers=options.workers,
        seconds=options.seconds,
        stall=20,
        on_result=functools.partial(_bench.show, where=where, hidden=("what",)),
    )
    _bench.finish(options.json, bars(results), results=results)


if __name__ == "__main__":
    main()
