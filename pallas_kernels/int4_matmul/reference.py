"""What the op means."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul.formats import values_of
from pallas_kernels.int4_matmul.layout import unpack


def dequantize(
    qweight: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    k: int,
    *,
    x_bytes: int = 2,
    qtype: str = "int4",
) -> jax.Array:
    """`(code - zero_point) * scale` in float32: `[K, N]` from the packed codes, N that of the scales."""
    codes = values_of(unpack(qweight, x_bytes=x_bytes, qtype=qtype)[:k, : scale.shape[1]], qtype)
    groups = scale.shape[0]
    grouped = codes.reshape(groups, k // groups, codes.shape[1])
    if zero_point is not None:
        grouped = grouped - zero_point.astype(jnp.float32)[:, None, :]
    return (grouped * scale.astype(jnp.float32)[:, None, :]).reshape(codes.shape)


def int4_matmul_reference(x, x_scale, qweight, scale, zero_point, bias, *, out_dtype, qtype="int4") -> jax.Array:
    """`(x @ dequantize(weight)) * x_scale + bias`, float32 sums: `[M, N padded to 64]`.

    The weight is rounded to 16 bits, unless its scale is a channel's, which the result is multiplied by.
    """
    x = lax.optimization_barrier(
        x
    )  # XLA's CPU backend (jax 0.11.2) refuses a 16-bit product that a gather is fused into
    x_bytes, channels = x.dtype.itemsize, scale.shape[0] == 1
    held = jnp.ones_like(scale) if channels else scale
    wide = x if x_bytes == 2 else x.astype(jnp.bfloat16)  # exact
    weight = dequantize(qweight, held, zero_point, x.shape[-1], x_bytes=x_bytes, qtype=qtype).astype(wide.dtype)
    out = lax.dot_general(wide, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    if channels:
        out = out * scale.astype(jnp.float32)
    if x_scale is not None:
        out = out * x_scale
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(out_dtype)
