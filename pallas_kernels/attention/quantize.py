"""Smoothing and quantization of queries, keys and values: what SageAttention does before its two products.

A scale may only vary along an axis that survives its product, so that it can be divided out of the accumulator: queries
and keys carry one per token or per block of tokens, values one per channel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)
INT8 = jnp.dtype(jnp.int8)
LARGEST_CODE = {INT8: 127.0, E4M3: 448.0}
SMALLEST_ABSMAX = 1e-20  # keeps the scale of an all-zero group positive


class Keys(NamedTuple):
    """Quantized keys: codes [B, N, S, H] and scales [B, N, S / block], S padded with zeros to whole blocks."""

    codes: jax.Array
    scale: jax.Array


class Values(NamedTuple):
    """Quantized values, transposed for 8-bit products: codes [B, N, H, S] and scales [B, N, H]."""

    codes: jax.Array
    scale: jax.Array


def quantize_queries(q: jax.Array, scale: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Quantizes queries [B, T, N, H] per token; scales [B, T, N] include the softmax scale, in base 2."""
    q = q.astype(jnp.float32)
    absmax = _absmax(q, -1)
    codes = round_to(q * (LARGEST_CODE[dtype] / absmax)[..., None], dtype)
    return codes, absmax * (scale * LOG2_E / LARGEST_CODE[dtype])


def quantize_keys(k: jax.Array, dtype: jnp.dtype, block: int, lengths: jax.Array | None = None) -> Keys:
    """Smooths keys [B, S, N, H] by their mean over the valid tokens, which softmax cannot see, and quantizes them.

    Each block of tokens of each head shares one scale.
    """
    batch, _, heads, head_dim = k.shape
    k, count = _valid(k, lengths)
    mean = jnp.sum(k, axis=1, keepdims=True) / count
    smooth, _ = _valid(k - jnp.broadcast_to(mean, k.shape), lengths)
    smooth = _pad_tokens(smooth.swapaxes(1, 2), 2, block)
    blocks = smooth.reshape(batch, heads, -1, block, head_dim)
    absmax = _absmax(blocks, (3, 4))
    codes = round_to(blocks * (LARGEST_CODE[dtype] / absmax)[..., None, None], dtype)
    return Keys(codes.reshape(smooth.shape), absmax * (1 / LARGEST_CODE[dtype]))


def quantize_values(v: jax.Array, dtype: jnp.dtype, block: int, lengths: jax.Array | None = None) -> Values:
    """Quantizes values [B, S, N, H] per channel of each head, over the valid tokens."""
    v, _ = _valid(v, lengths)
    absmax = _absmax(v, 1)
    codes = round_to(v * (LARGEST_CODE[dtype] / absmax)[:, None], dtype)
    return Values(_pad_tokens(codes.transpose(0, 2, 3, 1), 3, block), absmax * (1 / LARGEST_CODE[dtype]))


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds to the nearest code; callers scale |x| to at most the dtype's largest code."""
    return (jnp.round(x) if dtype == INT8 else x).astype(dtype)


def interleave_tokens(codes: jax.Array) -> jax.Array:
    """Reorders keys [B, N, S, H] so that the scores' registers are the next product's operand registers.

    In each 16 columns of a wgmma accumulator a thread holds columns 2c, 2c+1, 2c+8, 2c+9; an 8-bit operand wants
    4c .. 4c+3 in that thread. Position 8h + 2c + e therefore takes token 4c + 2h + e.
    """
    batch, heads, tokens, head_dim = codes.shape
    quads = codes.reshape(batch, heads, tokens // 16, 4, 2, 2, head_dim)
    return quads.swapaxes(3, 4).reshape(codes.shape)


def _absmax(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The largest magnitude, or NaN for a group with a value that is not finite (XLA's maximum may drop NaN)."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=axis), SMALLEST_ABSMAX)
    return jnp.where(jnp.all(jnp.isfinite(x), axis=axis), largest, jnp.nan)


def _valid(x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns x [B, S, N, H] in float32 with tokens past the length zeroed, and the token counts [B or 1, 1, 1, 1]."""
    x = x.astype(jnp.float32)
    if lengths is None:
        return x, jnp.full((1, 1, 1, 1), x.shape[1], jnp.float32)
    token = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    count = jnp.maximum(lengths, 1).astype(jnp.float32).reshape(-1, 1, 1, 1)
    return jnp.where(token < lengths.reshape(-1, 1, 1, 1), x, 0.0), count


def _pad_tokens(x: jax.Array, axis: int, block: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)
