"""Groups of a cache in 4 or 2 bits: keys per channel over runs of tokens, values per token over runs of channels.

Keys have channels that are always large, values do not (KIVI): a key's scale belongs to a channel, so a run of tokens
must be complete before it can be quantized. The latest tokens therefore wait in float, in a ring.

References:
    Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024), arXiv:2402.02750.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant._qtypes import get_qtype, pack_codes, unpack_codes

SCALE_DTYPE = jnp.float16


def quantize_groups(x: jax.Array, bits: int, axis: int, group_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes x [..., K, A, B] in groups along its axis -1 or -2: packed codes, scales and minima.

    Codes are packed along the same axis; scales and minima have one entry a group there.
    """
    groups = _split(x.astype(jnp.float32), axis, group_size)
    least, most = (reduce(groups, axis=axis, keepdims=True) for reduce in (jnp.min, jnp.max))
    least = jnp.where(jnp.all(jnp.isfinite(groups), axis=axis, keepdims=True), least, jnp.nan)
    minimum = least.astype(SCALE_DTYPE)
    low = minimum.astype(jnp.float32)
    scale = ((most - low) * (1 / (2**bits - 1))).astype(SCALE_DTYPE)
    step = scale.astype(jnp.float32)
    step = jnp.where(step > 0, step, 1.0)
    codes = jnp.clip(jnp.round((groups - jnp.broadcast_to(low, groups.shape)) / step), 0, 2**bits - 1)
    codes = jnp.where(jnp.isfinite(codes), codes, 0.0).astype(jnp.uint8).reshape(x.shape)
    return pack_codes(codes, get_qtype(f"uint{bits}"), axis), scale.squeeze(axis), minimum.squeeze(axis)


def dequantize_groups(codes: jax.Array, scale: jax.Array, minimum: jax.Array, bits: int, axis: int) -> jax.Array:
    """Undoes `quantize_groups`, in float32."""
    unpacked = unpack_codes(codes, get_qtype(f"uint{bits}"), axis)
    groups = _split(unpacked.astype(jnp.float32), axis, unpacked.shape[axis] // scale.shape[axis])
    scale, minimum = (jnp.expand_dims(x.astype(jnp.float32), axis) for x in (scale, minimum))
    x = groups * jnp.broadcast_to(scale, groups.shape) + jnp.broadcast_to(minimum, groups.shape)
    return x.reshape(unpacked.shape)


def _split(x: jax.Array, axis: int, group_size: int) -> jax.Array:
    """Splits axis -1 or -2 in two, so that the elements of a group lie along that same negative axis."""
    position = x.ndim + axis
    groups = (x.shape[position] // group_size, group_size)
    return x.reshape(*x.shape[:position], *groups, *x.shape[position + 1 :])


def quantized_tokens(lengths: jax.Array, window: int, group_size: int) -> jax.Array:
    """How many tokens of each sequence have left the ring: whole groups, no more than needed."""
    return (jnp.maximum(lengths - window, 0) + group_size - 1) // group_size * group_size


def unroll_ring(ring: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last `window` tokens of each sequence in order, from a ring [B, K, window, H]; before the first, anything."""
    window = ring.shape[2]
    positions = lengths[:, None] - window + lax.broadcasted_iota(jnp.int32, (ring.shape[0], window), 1)
    return _take_tokens(ring, positions % window)


def fill_ring(recent: jax.Array, start: jax.Array, lengths: jax.Array, window: int) -> jax.Array:
    """The ring [B, K, window, H] of sequences of `lengths` whose tokens from `start` on are `recent` [B, K, T, H]."""
    slots = lax.broadcasted_iota(jnp.int32, (recent.shape[0], window), 1)
    latest = lengths[:, None] - 1
    return _take_tokens(recent, latest - (latest - slots) % window - start[:, None])


def take_groups(recent: jax.Array, first: jax.Array, count: int, group_size: int) -> jax.Array:
    """`count` runs of `group_size` tokens of recent [B, K, T, H] from index `first` [B] on; past the end, the last."""
    index = lax.broadcasted_iota(jnp.int32, (recent.shape[0], count * group_size), 1) + first[:, None]
    return _take_tokens(recent, index)


def _take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    index = jnp.clip(index, 0, x.shape[2] - 1)[:, None, :, None]
    return jnp.take_along_axis(x, jnp.broadcast_to(index, (*x.shape[:2], index.shape[2], 1)), axis=2)
