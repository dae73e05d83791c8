"""One small 8-bit product of each cut, and each quantization kernel, for compute-sanitizer.

export XLA_PYTHON_CLIENT_PREALLOCATE=false
timeout 300 compute-sanitizer --tool memcheck python -m experiments.sanitize_int8
timeout 300 compute-sanitizer --tool racecheck python -m experiments.sanitize_int8
"""

from experiments import _int8
from pallas_kernels.int8_matmul import Config

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


def main() -> None:
    """Runs every case once or twice and prints what the checks say."""
    print("siblings", SIBLINGS, _int8.prepare_siblings(0, *SIBLINGS)(), flush=True)
    for number, (problem, cut) in enumerate(PRODUCTS):
        data = _int8.problem(number, k=640, n=384, **problem)
        config = Config(**{"block_n": 128, "num_stages": 2} | cut)
        print(problem, cut, _int8.prepare(data, config)(), flush=True)
    for m, k, dtype, group, norm in QUANTIZATIONS:
        found = _int8.verify_quantization(7, m=m, k=k, dtype=dtype, group=group, x_dtype="bfloat16", norm=norm)
        print("quantization", m, k, dtype, group, norm, found, flush=True)


if __name__ == "__main__":
    main()
