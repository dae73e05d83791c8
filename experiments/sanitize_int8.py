"""One small 8-bit product of each cut, and each quantization kernel, for compute-sanitizer.

export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
timeout 300 compute-sanitizer --tool memcheck python -m experiments.sanitize_int8 [parts]
timeout 300 compute-sanitizer --tool racecheck python -m experiments.sanitize_int8 [parts]
"""

import argparse
import functools

import jax

from experiments import _int4, _int8
from pallas_kernels.int4_matmul import Config as Int4Config
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int8_matmul import Config
from pallas_kernels.low_bit_matmul import low_bit_matmul

# Ragged tokens and outputs; clusters that split K and that share either operand; block scales; zero points.
PRODUCTS = (
    ({"m": 5, "dtype": "int8", "form": "token", "bias": True}, {"weights_first": True, "block_m": 8, "split_k": 2}),
    ({"m": 60, "dtype": "float8_e4m3fn", "form": "token"}, {"weights_first": True, "block_m": 64, "multicast": 2}),
    ({"m": 30, "dtype": "float8_e4m3fn", "form": "block"}, {"weights_first": True, "block_m": 64}),
    ({"m": 200, "dtype": "int8", "form": "asymmetric"}, {"block_m": 128, "multicast": 2}),
    ({"m": 300, "dtype": "float8_e4m3fn", "form": "token"}, {"block_m": 256, "multicast": 2}),
    ({"m": 200, "dtype": "float8_e4m3fn", "form": "block"}, {"block_m": 128}),
)
SIBLINGS = (13, 640, (384, 128), "int8", "token")
QUANTIZATIONS = ((3, 512, "int8", None, False), (70, 640, "float8_e4m3fn", 128, False), (9, 512, "int8", None, True))
# int4 weights by 8-bit codes: groups with a split cluster, channels with a shared operand.
W4A8 = (
    ({"m": 13, "dtype": "int8", "group": 64}, {"block_m": 16, "num_warpgroups": 1, "split_k": 2}),
    ({"m": 150, "dtype": "float8_e4m3fn", "group": 64}, {"block_m": 128, "num_warpgroups": 2}),
    ({"m": 60, "dtype": "int8", "group": 1088}, {"block_m": 64, "num_warpgroups": 2, "multicast": 2}),
)
W8A16 = ((5, "int8"), (150, "float8_e4m3fn"))


def siblings() -> None:
    """Two weights in one launch."""
    print("siblings", SIBLINGS, _int8.prepare_siblings(0, *SIBLINGS)(), flush=True)


def products() -> None:
    """8-bit weights by 8-bit activations."""
    for number, (problem, cut) in enumerate(PRODUCTS):
        data = _int8.problem(number, k=640, n=384, **problem)
        config = Config(**{"block_n": 128, "num_stages": 2} | cut)
        print(problem, cut, _int8.prepare(data, config)(), flush=True)


def quantizations() -> None:
    """Codes of activations."""
    for m, k, dtype, group, norm in QUANTIZATIONS:
        found = _int8.verify_quantization(7, m=m, k=k, dtype=dtype, group=group, x_dtype="bfloat16", norm=norm)
        print("quantization", m, k, dtype, group, norm, found, flush=True)


def w4a8() -> None:
    """int4 weights by 8-bit activations."""
    for number, (problem, cut) in enumerate(W4A8):
        config = Int4Config(**{"block_k": 128, "num_stages": 2, "split_k": 1, "scale_after": True} | cut)
        product = functools.partial(int4_matmul, config=config)
        _check(("w4a8", problem, cut), _int4.problem(number, k=1088, n=448, **problem), product)


def w8a16() -> None:
    """8-bit weights by 16-bit activations."""
    for number, (m, qtype) in enumerate(W8A16):
        data = _int4.problem(number, m, 1088, 448, 1088, qtype=qtype)
        _check(("w8a16", m, qtype), data, functools.partial(low_bit_matmul, qtype=qtype), qtype=qtype)


def _check(name: tuple, data: dict, product, **form) -> None:
    """Multiplies once and prints the relative error."""
    qweight, scale, _ = data["weights"][0]
    codes = {} if data["x_scale"] is None else {"x_scale": data["x_scale"]}
    out = jax.jit(functools.partial(product, implementation="mosaic_gpu"))(data["x"], qweight, scale, **codes)
    error = float(_int4.relative_error(out, data["x"], qweight, scale, None, None, data["x_scale"], **form))
    print(*name, {"relative_error": error, "ok": error <= _int4.TOLERANCE["bfloat16"]}, flush=True)


PARTS = {run.__name__: run for run in (siblings, products, quantizations, w4a8, w8a16)}


def main() -> None:
    """Runs every case of the parts named and prints what the checks say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=PARTS)
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
