"""What the op means."""

import jax
import jax.numpy as jnp
from jax import lax

# What the largest magnitude becomes in units of the scale, and the range of codes.
LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}
LOWEST = {"int8": -128.0, "float8_e4m3fn": -448.0}
# Scales whose inverses are normal float32.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126


def activation_quant_reference(x, gain, dtype, group_size, limit, epsilon) -> tuple[jax.Array, jax.Array]:
    """Quantize rows, or groups of rows, by their largest magnitude.

    Args:
        x: [M, K].
        gain: float32 [K] that x is multiplied by, or None.
        dtype: of the codes.
        group_size: inputs that share a scale, K for a scale a token.
        limit: what the largest magnitude becomes in units of the scale.
        epsilon: added to the mean square if rows are normalised first, else None.

    Returns:
        Codes [M, K] and float32 scales [M, K / group_size]; a scale is NaN where an element is.
    """
    values = x.astype(jnp.float32)
    inverse_rms = None if epsilon is None else lax.rsqrt(jnp.mean(values * values, axis=1, keepdims=True) + epsilon)
    if gain is not None:
        values = values * gain[None, :]
    if inverse_rms is not None:
        values = values * inverse_rms
    groups = values.reshape(x.shape[0], x.shape[1] // group_size, group_size)
    absmax = jnp.max(jnp.abs(groups), axis=2)
    absmax = jnp.where(jnp.any(jnp.isnan(groups), axis=2), jnp.nan, absmax)  # Not every backend's maximum keeps it.
    scale = scale_of(absmax, limit)
    codes = round_to(groups * (1.0 / scale)[:, :, None], dtype)
    return codes.reshape(x.shape), scale


def scale_of(absmax, limit: float):
    """The scale of a group; 1 if it is all zeros."""
    return jnp.where(absmax == 0.0, 1.0, jnp.clip(absmax * (1.0 / limit), SMALLEST_SCALE, LARGEST_SCALE))


def round_to(values, dtype):
    """The nearest code, ties to even."""
    name = jnp.dtype(dtype).name
    values = jnp.clip(values, LOWEST[name], LIMITS[name])
    return (jnp.round(values) if name == "int8" else values).astype(dtype)
