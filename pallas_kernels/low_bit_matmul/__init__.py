"""int8, float8_e4m3fn, int2 and NF4 weights times 16-bit activations: the int4 kernel with another unpacking."""

import jax

from pallas_kernels.int4_matmul.config import Config, supports
from pallas_kernels.int4_matmul.core import Implementation, Int4Weight, packed_matmul
from pallas_kernels.int4_matmul.formats import FORMATS
from pallas_kernels.int4_matmul.layout import pack, unpack
from pallas_kernels.int4_matmul.reference import dequantize

__all__ = ["FORMATS", "Config", "dequantize", "low_bit_matmul", "pack", "supports", "unpack"]


def low_bit_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    qtype: str,
    pre_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply activations by a weight of few bits: `(x * pre_scale) @ (value(code) * scale) + bias`.

    The weight's bytes are what few tokens wait for: 8 bits take half of bfloat16's time. Sums are float32.
    Differentiable and batchable as `int4_matmul`.

    Args:
      x: `[..., K]` bfloat16 or float16.
      qweight: int32 from `pack(codes, qtype=qtype)`.
      scale: `[K / group, N]`, any sign; one row for per-channel scales.
      zero_point: like `scale`, of int2 codes only.
      qtype: "int8", "float8_e4m3fn", "int2", "nf4" or "int4". Three bits do not divide a word: int3 codes go as int4.
      pre_scale: `[K]`; x is multiplied by it first.
      bias: `[N]`.
      implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the kernel on a CUDA device
        if it takes the problem, else "xla".
      config: the kernel's configuration; by default a cost model's choice.

    Returns:
      `[..., N]` in x's dtype.

    Raises:
      ValueError: for an unknown format, or operands whose shapes do not fit.
      NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> qweight = pack(jnp.full((128, 64), 100, jnp.int8), qtype="int8")
    >>> out = low_bit_matmul(jnp.ones((2, 128), jnp.bfloat16), qweight, jnp.full((1, 64), 0.5), qtype="int8")
    >>> out.shape, float(out[0, 0])
    ((2, 64), 6400.0)
    """
    if qtype not in FORMATS:
        raise ValueError(f"qtype={qtype!r}; accepted are {', '.join(map(repr, FORMATS))}")
    if x.dtype.itemsize == 1:
        raise ValueError(f"x is {x.dtype}; low_bit_matmul takes bfloat16 or float16 (see int8_matmul and int4_matmul)")
    weight = Int4Weight(qweight, scale, zero_point, bias)
    options = {"pre_scale": pre_scale, "implementation": implementation, "config": config}
    return packed_matmul(x, [weight], qtype=qtype, **options)[0]
