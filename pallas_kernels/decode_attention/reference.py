"""What decode attention over a quantized cache means, in plain jnp; also what the XLA implementation runs."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.cache import Cache
from pallas_kernels.decode_attention.layout import GROUP, ring_slot, unpack_keys, unpack_values


def decode_attention_reference(q: jax.Array, lengths: jax.Array, cache: Cache, *, scale: float) -> jax.Array:
    """Softmax attention of one query per head [B, N, H] over the first `lengths` tokens of each sequence's cache."""
    k, v = dequantize(cache, lengths)
    (batch, heads, head_dim), dtype = q.shape, q.dtype
    kv_heads = k.shape[1]
    q = q.reshape(batch, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k) * scale
    seen = lax.broadcasted_iota(jnp.int32, scores.shape, 3) < lengths.reshape(-1, 1, 1, 1)
    scores = jnp.where(seen, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - jnp.where(jnp.isneginf(largest), 0.0, largest))
    total = jnp.sum(p, axis=-1, keepdims=True)
    # A token past the length weighs nothing, whatever its bytes mean.
    values = jnp.where(seen[:, :, :1], v, 0.0)
    out = jnp.einsum("bkgs,bkhs->bkgh", jnp.where(seen, p, 0.0), values)
    return (out / jnp.where(total == 0, 1.0, total)).reshape(batch, heads, head_dim).astype(dtype)


def dequantize(cache: Cache, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, S, H] and values [B, K, H, S] in float32 of sequences of `lengths`; anything past a length."""
    if cache.page_table is not None:
        axes = {"k": 2, "v": 3, "k_scale": 2, "v_scale": 3 if cache.grouped else 2, "k_offset": 2, "v_offset": 3}
        joined = {
            name: _gather(x, cache.page_table, axis)
            for name, axis in axes.items()
            if (x := getattr(cache, name)) is not None
        }
        cache = cache._replace(**joined, page_table=None)
    k, v, k_scale, v_scale, k_offset, v_offset, recent_k, recent_v, _ = cache
    if k_scale is None or v_scale is None:
        return k.astype(jnp.float32), v.astype(jnp.float32)
    if k_offset is None or v_offset is None:
        k, v = k.astype(jnp.float32) * k_scale[..., None], v.astype(jnp.float32) * v_scale[:, :, None]
    else:
        k = dequantize_codes(unpack_keys(k, cache.bits), k_scale, k_offset, cache.bits)
        v = dequantize_codes(unpack_values(v, cache.bits), v_scale, v_offset, cache.bits)
    if recent_k is None or recent_v is None:
        return k, v
    token, window = jnp.arange(cache.capacity, dtype=jnp.int32), recent_k.shape[2]
    in_ring = (token[None] >= quantized_tokens(lengths, window)[:, None])[:, None]
    slot = ring_slot(token, window)
    k = jnp.where(in_ring[..., None], recent_k[:, :, slot].astype(jnp.float32), k)
    return k, jnp.where(in_ring[:, :, None], recent_v[..., slot].astype(jnp.float32), v)


def dequantize_codes(codes: jax.Array, scale: jax.Array, offset: jax.Array, bits: int) -> jax.Array:
    """`offset + scale * (1 + code / 2**bits)` in float32, for codes [..., rows, C], scale and offset [..., groups, C].

    The 1 costs a kernel nothing: it sets a code as mantissa bits of a number from 1 to 2.
    """
    size = codes.shape[-2] // scale.shape[-2]
    groups = codes.reshape(*scale.shape[:-1], size, scale.shape[-1]).astype(jnp.float32)
    scale, offset = (
        jnp.broadcast_to(jnp.expand_dims(x.astype(jnp.float32), -2), groups.shape) for x in (scale, offset)
    )
    return (offset + scale * (1 + groups * 2.0**-bits)).reshape(codes.shape)


def quantized_tokens(lengths: jax.Array, window: int, group_size: int = GROUP) -> jax.Array:
    """How many tokens of each sequence have left a ring of recent ones: whole groups, no more than needed."""
    return (jnp.maximum(lengths - window, 0) + group_size - 1) // group_size * group_size


def _gather(pages: jax.Array, table: jax.Array, axis: int) -> jax.Array:
    """Sequences [B, K, ...] out of pages [P, K, ...], which join along the token axis."""
    joined = jnp.moveaxis(pages[table], 1, axis)  # [B, K, ..., pages, page, ...]
    shape = joined.shape
    return joined.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
