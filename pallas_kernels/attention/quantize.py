"""Smoothing and quantization of queries, keys and values: what SageAttention does before its two products.

A scale may only vary along an axis that survives its product, so that it can be divided out of the accumulator: queries
carry one per token, keys one per group of tokens, values one per channel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)
INT8 = jnp.dtype(jnp.int8)
F16 = jnp.dtype(jnp.float16)
LARGEST_CODE = {INT8: 127.0, E4M3: 448.0}
SAMPLE_TOKENS = 128
SMALLEST_ABSMAX = 1e-12  # keeps the scale of an all-zero group, and the product of two of them, positive


class Keys(NamedTuple):
    """Quantized keys: codes [B, N, S, H], S padded with zeros to whole blocks, and scales [B, N, S / block, 8].

    The keys of a block that are equal modulo 8 share a scale, and so do each two neighbours: 4 scales a block.
    """

    codes: jax.Array
    scale: jax.Array


class Values(NamedTuple):
    """Quantized values, transposed for 8-bit products, S padded with zeros to whole blocks.

    codes [B, N, H, S]; a scale per channel [B, N, H], and one per block of tokens [B, N, S / block], which multiply.
    """

    codes: jax.Array
    scale: jax.Array
    block_scale: jax.Array


def quantize_queries(q: jax.Array, scale: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Quantizes queries [B, T, N, H] per token; scales [B, T, N] include the softmax scale, in base 2."""
    q = q.astype(jnp.float32)
    absmax = absmax_of(q, -1)
    codes = round_to(q * (LARGEST_CODE[dtype] / absmax)[..., None], dtype)
    return codes, absmax * (scale * LOG2_E / LARGEST_CODE[dtype])


def quantize_keys(k: jax.Array, dtype: jnp.dtype, block: int, lengths: jax.Array | None = None) -> Keys:
    """Smooths keys [B, S, N, H] by their mean, which softmax cannot see, and quantizes them."""
    batch, _, heads, head_dim = k.shape
    smooth = _smooth(k, block, lengths)
    blocks = smooth.reshape(batch, heads, -1, block // 8, 4, 2, head_dim)
    absmax = absmax_of(blocks, (3, 5, 6))
    codes = round_to(blocks * (LARGEST_CODE[dtype] / absmax)[:, :, :, None, :, None, None], dtype)
    return Keys(codes.reshape(smooth.shape), jnp.repeat(absmax * (1 / LARGEST_CODE[dtype]), 2, axis=3))


def smooth_keys(k: jax.Array, block: int, lengths: jax.Array | None = None) -> jax.Array:
    """Keys [B, S, N, H] less their mean in float16, [B, N, S, H], S padded with zeros to whole blocks."""
    return _smooth(k, block, lengths).astype(F16)


def _smooth(k, block: int, lengths):
    mean = keys_mean(k, lengths)[:, None]
    smooth = _valid(k.astype(jnp.float32) - jnp.broadcast_to(mean, k.shape), lengths)
    return _pad_tokens(smooth.swapaxes(1, 2), 2, block)


def keys_mean(k: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The mean over at least `SAMPLE_TOKENS` evenly spaced tokens, of the valid ones, of keys [B, S, N, H]: [B, N, H].

    Any shift common to all keys of a head leaves softmax as it is; a sample's mean removes a channel's bias as well
    as the whole mean does, for a fraction of the reading.
    """
    sample, count = _sample(k, lengths)
    if count is None:
        return jnp.mean(sample.astype(jnp.float32), axis=1)
    count = jnp.maximum(count, 1)
    return jnp.sum(_valid(sample, count), axis=1) / count.astype(jnp.float32)[:, None, None]


def quantize_values(v: jax.Array, dtype: jnp.dtype, block: int, lengths: jax.Array | None = None) -> Values:
    """Quantizes values [B, S, N, H] per channel of each head and per block of tokens."""
    scale = channel_scale(v, dtype, lengths)
    relative = _valid(v, lengths) * (1 / scale)[:, None]
    relative = _pad_tokens(relative.transpose(0, 2, 3, 1), 3, block)
    blocks = relative.reshape(*relative.shape[:3], -1, block)
    absmax = absmax_of(blocks, (2, 4))
    codes = round_to(blocks * (LARGEST_CODE[dtype] / absmax)[:, :, None, :, None], dtype)
    return Values(codes.reshape(relative.shape), scale, absmax * (1 / LARGEST_CODE[dtype]))


def channel_scale(v: jax.Array, dtype: jnp.dtype, lengths: jax.Array | None) -> jax.Array:
    """How large each channel of values [B, S, N, H] is, beside the others of its head: positive [B, N, H].

    The scales of blocks are exact whatever this is. Codes of 8-bit floats have digits to spare for a channel that is
    small beside the largest of its block, so a sample's magnitudes do, but for a channel that the sample has no sign
    of: none counts for less than 1/64 of the largest. Integers need the true largest magnitudes.
    """
    if dtype == INT8:
        return values_absmax(v, lengths)
    absmax = values_absmax(*_sample(v, lengths))
    return jnp.maximum(absmax, jnp.max(absmax, axis=2, keepdims=True) * 2.0**-6)


def _sample(x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """At least `SAMPLE_TOKENS` evenly spaced tokens of x [B, S, N, H] where it has them, and how many are valid."""
    stride = max(1, x.shape[1] // SAMPLE_TOKENS)
    return x[:, ::stride], None if lengths is None else (lengths + stride - 1) // stride


def values_absmax(v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The largest magnitude of each channel [B, N, H] of values [B, S, N, H] over the valid tokens.

    Magnitudes of floats order as their bits do, with infinities and NaN above all others: one maximum finds both.
    """
    word = {2: jnp.int16, 4: jnp.int32}[v.dtype.itemsize]
    bits = lax.bitcast_convert_type(v, word) & jnp.array(jnp.iinfo(word).max, word)
    if lengths is not None:
        token = lax.broadcasted_iota(jnp.int32, v.shape, 1)
        bits = jnp.where(token < lengths.reshape(-1, 1, 1, 1), bits, jnp.array(0, word))
    largest = lax.bitcast_convert_type(jnp.max(bits, axis=1), v.dtype).astype(jnp.float32)
    return jnp.where(jnp.isfinite(largest), jnp.maximum(largest, SMALLEST_ABSMAX), jnp.nan)


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds to the nearest code; callers scale |x| to at most the dtype's largest code."""
    return (jnp.round(x) if dtype == INT8 else x).astype(dtype)


def absmax_of(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The largest magnitude, or NaN for a group with a value that is not finite (XLA's maximum may drop NaN)."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=axis), SMALLEST_ABSMAX)
    return jnp.where(jnp.all(jnp.isfinite(x), axis=axis), largest, jnp.nan)


def _valid(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns x [B, S, N, H] in float32 with tokens past the length zeroed."""
    x = x.astype(jnp.float32)
    if lengths is None:
        return x
    token = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(token < lengths.reshape(-1, 1, 1, 1), x, 0.0)


def _pad_tokens(x: jax.Array, axis: int, block: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)
