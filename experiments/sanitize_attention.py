"""One small call of prefill attention in each mode, for compute-sanitizer.

export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
timeout 300 compute-sanitizer --tool memcheck python -m experiments.sanitize_attention
timeout 300 compute-sanitizer --tool racecheck python -m experiments.sanitize_attention
"""

import functools

import jax
import jax.numpy as jnp

from experiments.bench_attention import inputs, options
from pallas_kernels.attention import MODES, attention
from pallas_kernels.attention.cases import CORRECTNESS

CASES = ("lengths", "ragged_causal")  # head_dim 128 and 64; queries without keys, keys and queries past the end


def main() -> None:
    """Computes every case in every mode and prints how far it is from the same in plain jnp."""
    for name in CASES:
        case = CORRECTNESS[name]
        qkv = inputs(case, "biased")
        for mode in MODES:
            run = functools.partial(attention, mode=mode, **options(case))
            out, expected = (
                jax.jit(functools.partial(run, implementation=implementation))(*qkv).astype(jnp.float32)
                for implementation in ("mosaic_gpu", "xla")
            )
            error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
            print(name, mode, {"relative_difference": error, "ok": error < 0.06}, flush=True)


if __name__ == "__main__":
    main()
