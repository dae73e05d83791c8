"""Groups of a cache in 4 or 2 bits: keys per channel over runs of tokens, values per token over runs of channels.

Keys have channels that are always large, values do not (KIVI): a key's scale belongs to a channel, so a run of tokens
must be complete before it can be quantized. The latest tokens therefore wait in float, in a ring.

References:
    Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024), arXiv:2402.02750.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant._kernels import kv_layout

SCALE_DTYPE = jnp.float16


def quantize_groups(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes x [..., R, C] in groups of 32 rows: codes of x's shape, scales and offsets [..., R / 32, C].

    An element is `offset + scale * (1 + code / 2**bits)`: the first code means a group's minimum, the last its maximum.
    """
    groups = x.astype(jnp.float32).reshape(*x.shape[:-2], -1, kv_layout.GROUP, x.shape[-1])
    least, most = (reduce(groups, axis=-2, keepdims=True) for reduce in (jnp.min, jnp.max))
    least = jnp.where(jnp.all(jnp.isfinite(groups), axis=-2, keepdims=True), least, jnp.nan)
    levels = 2**bits
    scale = ((most - least) * (levels / (levels - 1))).astype(SCALE_DTYPE)
    span = scale.astype(jnp.float32)
    offset = (least - span).astype(SCALE_DTYPE)
    first = offset.astype(jnp.float32) + span
    codes = (groups - jnp.broadcast_to(first, groups.shape)) * (levels / jnp.where(span > 0, span, 1.0))
    codes = jnp.where(jnp.isfinite(codes), jnp.clip(jnp.round(codes), 0, levels - 1), 0.0)
    return codes.astype(jnp.uint8).reshape(x.shape), scale.squeeze(-2), offset.squeeze(-2)


def unroll_ring(ring: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last `window` tokens of each sequence in order, from a ring [B, K, window, H]; before the first, anything.

    Where a ring has each token is the kernel's order, `pallas_kernels.decode_attention.layout`.
    """
    window = ring.shape[2]
    positions = lengths[:, None] - window + lax.broadcasted_iota(jnp.int32, (ring.shape[0], window), 1)
    return _take_tokens(ring, kv_layout.ring_slot(positions, window))


def fill_ring(recent: jax.Array, start: jax.Array, lengths: jax.Array, window: int) -> jax.Array:
    """The ring [B, K, window, H] of sequences of `lengths` whose tokens from `start` on are `recent` [B, K, T, H]."""
    slots = kv_layout.in_row_order(lax.broadcasted_iota(jnp.int32, (window, 1), 0)).T
    latest = lengths[:, None] - 1
    return _take_tokens(recent, latest - (latest - slots) % window - start[:, None])


def take_groups(recent: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """`count` groups of tokens of recent [B, K, T, H] from index `first` [B] on; past the end, the last."""
    index = lax.broadcasted_iota(jnp.int32, (recent.shape[0], count * kv_layout.GROUP), 1) + first[:, None]
    return _take_tokens(recent, index)


def _take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    index = jnp.clip(index, 0, x.shape[2] - 1)[:, None, :, None]
    return jnp.take_along_axis(x, jnp.broadcast_to(index, (*x.shape[:2], index.shape[2], 1)), axis=2)
