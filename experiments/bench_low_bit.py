"""How fast int8, e4m3, int2 and NF4 weights by 16-bit activations are, each product verified before it is timed.

    python -m experiments.bench_low_bit [--formats ...] [--shapes ...] [--m ...] [--seconds N] [--json F]

`kernel_us`: microseconds a call by CUPTI, weights rotated past the L2 cache; `floor_us`: every byte moved once at 4.3
TB/s (an H200's copy), or the products at 790 TFLOP/s.
"""

import argparse
import functools

from pallas_kernels.int4_matmul.cases import SHAPES

GROUPS = {"int8": None, "float8_e4m3fn": None, "int2": 128, "nf4": 64}


def measure(item: dict) -> dict:
    """One product by the default configuration, in a worker."""
    import jax

    from experiments import _clock, _int4, _workers
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


def show(result: dict):
    """One line a result."""
    failed = "error" in result or result.get("ok") is False
    where = " ".join(str(result[name]) for name in ("qtype", "dtype", "shape", "m"))
    times = " ".join(f"{name} {result[name]:.2f}" for name in ("kernel_us", "floor_us") if name in result)
    rest = {name: result[name] for name in ("relative_error", "error") if name in result}
    print("FAILED" if failed else "ok", where, times, rest, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--shapes", nargs="*", default=["llama3-70b/o", "llama3-8b/gate_up"], choices=SHAPES)
    parser.add_argument("--m", nargs="*", type=int, default=[1, 16, 64, 1024])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], choices=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from experiments import _workers

    if options.worker:
        return _workers.serve(measure)
    import secrets

    items = [
        {"what": "time", "qtype": qtype, "shape": shape, "m": m, "dtype": dtype, "seed": secrets.randbelow(2**31)}
        for m in options.m
        for shape in options.shapes
        for dtype in options.dtypes
        for qtype in options.formats
    ]
    results = _workers.run(
        "experiments.bench_low_bit", items, workers=options.workers, seconds=options.seconds, stall=20, on_result=show
    )
    print(f"{len(results)} of {len(items)} items, {sum(not r.get('ok') for r in results)} failed")
    if options.json:
        from experiments._clock import write_results

        write_results(options.json, results=results)


if __name__ == "__main__":
    main()
