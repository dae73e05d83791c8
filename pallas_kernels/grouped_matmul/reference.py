"""What the op means."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.layout import separate
from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.int8_matmul.reference import int8_matmul_reference


def grouped_matmul_reference(
    x, qweight, scale, zero_point, group_sizes, x_scale, row_scale, *, activation, out_dtype
) -> jax.Array:
    """Each row times its expert's weight, expert by expert; float32 until the result is rounded.

    Args:
      x: `[T, K]` float, or 8-bit codes.
      qweight: `[E, N / 64, K / 64, 2, 256]` int32, or 8-bit `[E, N, K]`.
      scale: `[E, G, N]`.
      zero_point: like `scale`, or None.
      group_sizes: `[E]` rows of each expert; rows past their sum become zeros.
      x_scale: `[T, 1]` of 8-bit codes, or None.
      row_scale: `[T]`, or None.
      activation: None, or "silu_mul" over columns merged by `interleave`.
      out_dtype: of the result.

    Returns:
      `[T, N]`, or `[T, N / 2]` after "silu_mul".
    """
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0], dtype=ends.dtype)[:, None]

    def multiply(out, weight, end, size):
        own = (rows >= end - size) & (rows < end)
        return jnp.where(own, _product(x, x_scale, *weight), out)

    def expert(out, operands):
        *weight, end, size = operands
        return lax.cond(size > 0, multiply, lambda out, *_: out, out, weight, end, size), None

    zeros = jnp.zeros((x.shape[0], scale.shape[2]), jnp.float32)
    out, _ = lax.scan(expert, zeros, (qweight, scale, zero_point, ends, group_sizes))
    if activation == "silu_mul":
        gate, up = separate(out)
        out = jax.nn.silu(gate) * up
    return (out if row_scale is None else out * row_scale.astype(jnp.float32)[:, None]).astype(out_dtype)


def _product(x, x_scale, qweight, scale, zero_point) -> jax.Array:
    """`[T, N]` float32: every row times one expert's weight."""
    if qweight.ndim == 2 and scale.shape[0] == 1:
        return int8_matmul_reference(x, qweight, x_scale, scale, None, None, None, jnp.float32)
    if qweight.ndim == 2:
        spread = jnp.repeat(scale.astype(jnp.float32), x.shape[1] // scale.shape[0], axis=0)
        weight = qweight.T.astype(jnp.float32) * spread
        return jnp.matmul(x.astype(jnp.float32), weight, precision="highest") * x_scale
    return int4_matmul_reference(x, x_scale, qweight, scale, zero_point, None, out_dtype=jnp.float32)
