"""One small int4 product of each regime, for compute-sanitizer.

export XLA_PYTHON_CLIENT_PREALLOCATE=false
timeout 300 compute-sanitizer --tool memcheck python -m experiments.sanitize_int4
timeout 300 compute-sanitizer --tool racecheck python -m experiments.sanitize_int4
"""

import functools

import jax

from experiments import _int4
from pallas_kernels.int4_matmul import Config, int4_matmul

_TURNS = {"scale_after": True, "k_warpgroups": 2}
# Ragged K and N, zero points and bias; split and shared clusters; both places of the scale; blocks that share an SM;
# codes of activations.
CASES = (
    ({"m": 5, "zero": True, "bias": True}, {"block_m": 8, "num_warpgroups": 2, "split_k": 2, "scale_after": True}),
    ({"m": 13}, {"block_m": 16, "num_warpgroups": 1, "split_k": 4, "scale_after": True, "blocks_per_sm": 2}),
    ({"m": 16}, {"block_m": 16, "num_warpgroups": 1, "split_k": 2, **_TURNS}),
    ({"m": 60}, {"block_m": 64, "num_warpgroups": 2, "split_k": 1, "scale_after": True, "multicast": 2}),
    ({"m": 60, "zero": True}, {"block_m": 64, "num_warpgroups": 2, "split_k": 2, "scale_after": False}),
    ({"m": 150}, {"block_m": 128, "num_warpgroups": 2, "split_k": 2, "scale_after": False, "multicast": 2}),
    ({"m": 300, "bias": True}, {"block_m": 256, "num_warpgroups": 2, "split_k": 1, "scale_after": False}),
    ({"m": 13, "dtype": "int8"}, {"block_m": 16, "num_warpgroups": 1, "split_k": 2, "scale_after": True}),
    ({"m": 150, "dtype": "float8_e4m3fn"}, {"block_m": 128, "num_warpgroups": 2, "split_k": 1, "scale_after": True}),
)


def main() -> None:
    """Runs every case once and prints its relative error."""
    for number, (options, cut) in enumerate(CASES):
        data = _int4.problem(number, k=1088, n=448, group=64, **options)
        operands = (data["x"], *data["weights"][0])
        config = Config(block_k=128, num_stages=2, **cut)
        product = jax.jit(functools.partial(int4_matmul, implementation="mosaic_gpu", config=config))
        out = product(*operands, bias=data["bias"], x_scale=data["x_scale"])
        error = float(_int4.relative_error(out, *operands, data["bias"], data["x_scale"]))
        print(f"{options} {cut}: relative error {error:.2e}, at most {_int4.TOLERANCE['bfloat16']:.2e}", flush=True)


if __name__ == "__main__":
    main()
