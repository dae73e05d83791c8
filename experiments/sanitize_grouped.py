"""One small grouped product of each form, for compute-sanitizer.

XLA_PYTHON_CLIENT_PREALLOCATE=false compute-sanitizer --tool memcheck python -m experiments.sanitize_grouped
XLA_PYTHON_CLIENT_PREALLOCATE=false compute-sanitizer --tool racecheck python -m experiments.sanitize_grouped
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments._grouped import FORMATS, TOLERANCE, relative_error
from pallas_kernels.grouped_matmul import Config, grouped_matmul

SIZES = (3, 0, 130, 7, 8)
K, N, ROWS = 512, 192, 150
# Few rows, and many, of which the last tiles are cut; rows that belong to nobody.
CASES = (
    ("w4a16", {"block_m": 16, "block_k": 256, "num_warpgroups": 2, "scale_after": True}, None),
    ("w4a16", {"block_m": 96, "block_k": 128, "num_warpgroups": 2}, None),
    ("w4a16", {"block_m": 128, "block_k": 128, "num_warpgroups": 2}, "silu_mul"),
    ("w4a8", {"block_m": 32, "block_k": 256, "num_warpgroups": 2, "scale_after": True}, None),
    ("int8", {"block_m": 128, "block_k": 128, "num_warpgroups": 1, "row_tiles": 2}, None),
    ("fp8", {"block_m": 32, "block_k": 128, "num_warpgroups": 2}, "silu_mul"),
)


def main() -> None:
    """Runs every case once and prints its relative error."""
    rng, sizes = np.random.default_rng(0), jnp.asarray(SIZES, jnp.int32)
    for form, cut, activation in CASES:
        weight_dtype, x_dtype, _ = FORMATS[form]
        groups, codes = (K // 128, jnp.dtype(x_dtype).itemsize == 1) if weight_dtype == jnp.int32 else (1, True)
        x = jnp.asarray(rng.normal(size=(ROWS, K)) * (30 if codes else 1), jnp.float32).astype(x_dtype)
        x_scale = jnp.asarray(rng.uniform(0.01, 0.03, (ROWS, 1)), jnp.float32) if codes else None
        if weight_dtype == jnp.int32:
            qweight = jnp.asarray(rng.integers(-(2**31), 2**31, (len(SIZES), N // 64, K // 64, 2, 256)), jnp.int32)
        else:
            padded = (len(SIZES), -(-N // 128) * 128, K)
            qweight = jnp.asarray(rng.integers(-100, 101, padded), jnp.float32).astype(weight_dtype)
        scale = jnp.asarray(rng.uniform(0.5, 1.5, (len(SIZES), groups, N)) * 0.01, jnp.bfloat16)
        config = Config(num_stages=2, **cut)
        product = functools.partial(
            grouped_matmul, implementation="mosaic_gpu", config=config, activation=activation, group_sizes=sizes
        )
        out = jax.jit(product)(x, qweight, scale, x_scale=x_scale)
        wide = qweight if weight_dtype == jnp.int32 else qweight[:, :N]
        error = float(relative_error(out, (x, x_scale), wide, scale, sizes, 256, activation))
        print(f"{form} {cut} {activation}: error {error:.2e}, at most {TOLERANCE[activation]:.2e}", flush=True)


if __name__ == "__main__":
    main()
