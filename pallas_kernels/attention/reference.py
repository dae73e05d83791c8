"""What quantized attention means, in plain jnp; also what the XLA implementation runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.quantize import (
    E4M3,
    F16,
    INT8,
    LARGEST_CODE,
    LOG2_E,
    quantize_keys,
    quantize_queries,
    quantize_values,
    round_to,
    smooth_keys,
)

Window = tuple[int | None, int | None]
HALF_HEAD_DIM = 64
LONG = 4096  # keys that a query sees


class Mode(NamedTuple):
    """The formats of the two products.

    None keeps the operands' own float format: Q and K as they are in the first, V in the second, and P takes it too.
    """

    scores: jnp.dtype | None
    values: jnp.dtype | None


MODES = {
    "int8_fp8": Mode(INT8, E4M3),
    "int8_f16": Mode(INT8, None),
    "fp8": Mode(E4M3, E4M3),
    "int8_int8": Mode(INT8, INT8),
    "f16_fp8": Mode(None, E4M3),
}


def formats(mode: str, head_dim: int) -> Mode:
    """The formats of a mode, by how many channels a head has.

    A few channels' products may be summed in float16: the softmax on such scores takes two in an instruction, and it is
    what costs time there. Keys are smoothed for it, and queries scaled, so that scores are as exact as they are small.
    """
    if mode == "f16_fp8" and head_dim <= HALF_HEAD_DIM:
        return Mode(F16, E4M3)
    return MODES[mode]


def auto_mode(head_dim: int, kv_tokens: int, window: Window) -> str:
    """The mode that is fastest on an H200 for bfloat16: codes of K take 35 us to make for 2^25 elements.

    That pays where many queries multiply each of them, and where products, not exponentials, take the time.
    """
    left, right = window
    seen = kv_tokens if right is None else kv_tokens // 2  # of a causal query, on the average
    if left is not None:
        seen = min(seen, left + (right or 0) + 1)
    return "int8_fp8" if head_dim > HALF_HEAD_DIM and seen >= LONG else "f16_fp8"


class Masking(NamedTuple):
    """Arrays that change or limit what a query sees: bias and mask [B or 1, N or 1, T or 1, S or 1], lengths [B]."""

    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_lengths: jax.Array | None = None
    kv_lengths: jax.Array | None = None


def attention_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, masking: Masking, *, window: Window, scale: float, mode: str, block: int
) -> jax.Array:
    """Attention of [B, T, N, H] queries with both products on quantized operands, softmax in float32, base 2."""
    scores_dtype, values_dtype = formats(mode, q.shape[3])
    scores = _scores(q, k, masking.kv_lengths, scale, scores_dtype, block)
    if masking.bias is not None:
        scores = scores + jnp.broadcast_to(masking.bias, scores.shape).astype(jnp.float32) * LOG2_E
    scores = jnp.where(visible(masking, window, scores.shape), scores, -jnp.inf)

    maximum = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp2(scores - jnp.where(jnp.isneginf(maximum), 0.0, maximum))
    total = jnp.sum(p, axis=-1)  # of the unrounded weights
    if values_dtype is None:
        values, p = v.transpose(0, 2, 3, 1), p.astype(v.dtype)
    else:
        codes, v_scale, block_scale = quantize_values(v, values_dtype, block, masking.kv_lengths)
        step = v_scale[..., None] * jnp.repeat(block_scale, block, axis=2)[:, :, None]
        values = (codes.astype(jnp.float32) * step)[..., : v.shape[1]]
        largest = LARGEST_CODE[values_dtype]
        p = round_to(p * largest, values_dtype).astype(jnp.float32) * (1 / largest)
    out = _grouped_outputs(p, values)
    total = total.transpose(0, 2, 1)[..., None]
    return (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)  # a query that sees no key yields zeros


def _scores(q, k, kv_lengths: jax.Array | None, scale: float, dtype: jnp.dtype | None, block: int) -> jax.Array:
    """Scores [B, N, T, S] in base 2."""
    shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    if dtype is None:
        return _grouped_scores(q, k.swapaxes(1, 2), k.shape[2]).reshape(shape) * (scale * LOG2_E)
    if dtype == F16:
        q = (q.astype(jnp.float32) * (scale * LOG2_E)).astype(F16)
        return _grouped_scores(q, smooth_keys(k, block, kv_lengths)[:, :, : k.shape[1]], k.shape[2]).reshape(shape)
    codes, q_scale = quantize_queries(q, scale, dtype)
    keys = quantize_keys(k, dtype, block, kv_lengths)
    scores = _grouped_scores(codes, keys.codes, k.shape[2])[..., : k.shape[1]]
    key_scale = jnp.repeat(keys.scale[:, :, :, None], block // 8, axis=3).reshape(*keys.codes.shape[:3])
    key_scale = key_scale[..., : k.shape[1]]
    scores = scores * q_scale.transpose(0, 2, 1).reshape(*scores.shape[:-1], 1) * key_scale[:, :, None, None]
    return scores.reshape(shape)


def visible(masking: Masking, window: Window, shape: tuple[int, ...]) -> jax.Array:
    """Boolean [B, N, T, S]: which scores count."""
    query, key = lax.broadcasted_iota(jnp.int32, shape, 2), lax.broadcasted_iota(jnp.int32, shape, 3)
    left, right = window
    seen = jnp.ones(shape, bool) if masking.mask is None else jnp.broadcast_to(masking.mask, shape)
    if left is not None:
        seen &= key >= query - left
    if right is not None:
        seen &= key <= query + right
    for token, lengths in ((query, masking.query_lengths), (key, masking.kv_lengths)):
        if lengths is not None:
            seen &= token < lengths.reshape(-1, 1, 1, 1)
    return seen


def _grouped_scores(q: jax.Array, k: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, G, T, S] products of q [B, T, K*G, H] and k [B, K, S, H] in one format, summed exactly for int8."""
    batch, tokens, heads, head_dim = q.shape
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    accumulator = jnp.int32 if q.dtype == jnp.int8 else jnp.float32
    return jnp.einsum("btkgh,bksh->bkgts", q, k, preferred_element_type=accumulator).astype(jnp.float32)


def _grouped_outputs(p: jax.Array, v: jax.Array) -> jax.Array:
    """[B, T, N, H] products of weights p [B, N, T, S] and values v [B, K, H, S], in float32."""
    batch, heads, tokens, keys = p.shape
    p = p.reshape(batch, v.shape[1], heads // v.shape[1], tokens, keys)
    out = jnp.einsum("bkgts,bkhs->btkgh", p, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, tokens, heads, v.shape[2])
