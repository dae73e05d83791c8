"""What decode attention over a quantized cache means, in plain jnp; also what the XLA implementation runs."""

import jax
import jax.numpy as jnp
from jax import lax


def decode_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    page_table: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Softmax attention of one query per head [B, N, H] over the first `lengths` tokens of each sequence's cache."""
    if page_table is not None:
        k, v = _gather(k, page_table, 2), _gather(v, page_table, 3)
        k_scale, v_scale = (x if x is None else _gather(x, page_table, 2) for x in (k_scale, v_scale))
    (batch, heads, head_dim), dtype = q.shape, q.dtype
    kv_heads = k.shape[1]
    q = q.reshape(batch, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k.astype(jnp.float32)) * scale
    if k_scale is not None:
        scores = scores * k_scale[:, :, None]
    seen = lax.broadcasted_iota(jnp.int32, scores.shape, 3) < lengths.reshape(-1, 1, 1, 1)
    scores = jnp.where(seen, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - jnp.where(jnp.isneginf(largest), 0.0, largest))
    total = jnp.sum(p, axis=-1, keepdims=True)
    if v_scale is not None:
        p = p * v_scale[:, :, None]
    # A token past the length weighs nothing, whatever its bytes mean.
    values = jnp.where(seen[:, :, :1], v.astype(jnp.float32), 0.0)
    out = jnp.einsum("bkgs,bkhs->bkgh", jnp.where(seen, p, 0.0), values)
    return (out / jnp.where(total == 0, 1.0, total)).reshape(batch, heads, head_dim).astype(dtype)


def _gather(pages: jax.Array, table: jax.Array, axis: int) -> jax.Array:
    """Sequences [B, K, ...] out of pages [P, K, ...], which join along the token axis."""
    joined = jnp.moveaxis(pages[table], 1, axis)  # [B, K, ..., pages, page, ...]
    shape = joined.shape
    return joined.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
