"""What the op means."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul.layout import unpack


def dequantize(qweight: jax.Array, scale: jax.Array, zero_point: jax.Array | None, k: int) -> jax.Array:
    """`(code - zero_point) * scale` in float32: `[K, N]` from the packed codes, N that of the scales."""
    codes = unpack(qweight)[:k, : scale.shape[1]].astype(jnp.float32)
    groups = scale.shape[0]
    grouped = codes.reshape(groups, k // groups, codes.shape[1])
    if zero_point is not None:
        grouped = grouped - zero_point.astype(jnp.float32)[:, None, :]
    return (grouped * scale.astype(jnp.float32)[:, None, :]).reshape(codes.shape)


def int4_matmul_reference(x, qweight, scale, zero_point=None, bias=None) -> jax.Array:
    """`x @ dequantize(weight) + bias`, the weight rounded to x's dtype, float32 sums: `[M, N padded to 64]`."""
    x = lax.optimization_barrier(
        x
    )  # XLA's CPU backend (jax 0.11.2) refuses a 16-bit product that a gather is fused into
    weight = dequantize(qweight, scale, zero_point, x.shape[-1]).astype(x.dtype)
    out = lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(x.dtype)
