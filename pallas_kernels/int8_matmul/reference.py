"""What the op means."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int8_matmul.layout import BLOCK


def int8_matmul_reference(x, weight, x_scale, w_scale, x_zero_point, weight_sum, bias, out_dtype) -> jax.Array:
    """Multiply codes exactly (int8) or in float32 (fp8), scale, add the bias, round once.

    Args:
        x: codes [M, K].
        weight: codes [N, K].
        x_scale: float32 [M or 1, 1], or [M, K / 128].
        w_scale: [1, N or 1], or [K / 128, N / 128].
        x_zero_point: int32 [M or 1, 1], or None.
        weight_sum: int32 [N], the sum of each output's codes; goes with x_zero_point.
        bias: [N], or None.
        out_dtype: of the result.

    Returns:
        [M, N].
    """
    x_scale, w_scale = x_scale.astype(jnp.float32), w_scale.astype(jnp.float32)
    if x_scale.shape[1] > 1 or is_blocked(w_scale, weight):
        out = _blocked_product(x, weight, x_scale, w_scale)
    else:
        product = _product(x, weight)
        if x_zero_point is not None:
            product = product - x_zero_point * weight_sum[None, :]
        out = product.astype(jnp.float32) * x_scale * w_scale
    return (out if bias is None else out + bias.astype(jnp.float32)[None, :]).astype(out_dtype)


def is_blocked(w_scale: jax.Array, weight: jax.Array) -> bool:
    """Whether scales belong to 128 x 128 blocks of a packed weight."""
    n, k = weight.shape
    return w_scale.shape == (k // BLOCK, n // BLOCK) != (1, 1)


def _product(x, weight) -> jax.Array:
    accumulator = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=accumulator)


def _blocked_product(x, weight, x_scale, w_scale) -> jax.Array:
    """The sum of the scaled products of every 128 inputs."""
    groups = x.shape[1] // BLOCK
    w_scale = jnp.repeat(w_scale, BLOCK, axis=1) if is_blocked(w_scale, weight) else w_scale
    w_scale = jnp.broadcast_to(w_scale, (groups, w_scale.shape[1]))
    x_scale = jnp.broadcast_to(x_scale, (x_scale.shape[0], groups))

    stacked = [codes.reshape(codes.shape[0], groups, BLOCK).swapaxes(0, 1) for codes in (x, weight)]

    def add(total, operands):
        x, weight, x_scale, w_scale = operands
        return total + _product(x, weight).astype(jnp.float32) * (x_scale[:, None] * w_scale[None, :]), None

    zeros = jnp.zeros((x.shape[0], weight.shape[0]), jnp.float32)
    return lax.scan(add, zeros, (*stacked, x_scale.T, w_scale))[0]
