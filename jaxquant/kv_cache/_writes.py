"""How tokens enter a cache: rounded one by one, in groups as they leave the ring of recent ones, and in the ring."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant._kernels import kv_layout, quantized_tokens
from jaxquant.kv_cache._formats import GROUPED, quantize_tokens
from jaxquant.kv_cache._groups import fill_ring, quantize_groups, take_groups, unroll_ring
from jaxquant.kv_cache._pages import place

if TYPE_CHECKING:
    from jaxquant.kv_cache._cache import KVCache


def write_tokens(cache: "KVCache", key, value, places) -> "KVCache":
    """Codes of 8 bits, or floats, go to their places (row, column)."""
    row, column = places
    key_codes, key_scale = quantize_tokens(key, cache.key_absmax, cache.format, cache.key.dtype)
    value_codes, value_scale = quantize_tokens(value, cache.value_absmax, cache.format, cache.value.dtype)
    cache = dataclasses.replace(
        cache,
        key=cache.key.at[row, :, column].set(key_codes, mode="drop"),
        value=cache.value.at[row, :, :, column].set(value_codes, mode="drop"),
    )
    if cache.key_scale is None:
        return cache
    return dataclasses.replace(
        cache,
        key_scale=cache.key_scale.at[row, :, column].set(key_scale, mode="drop"),
        value_scale=cache.value_scale.at[row, :, column].set(value_scale, mode="drop"),
    )


def write_groups(cache: "KVCache", key, value, places, lengths) -> "KVCache":
    """Values go to their place at once, keys when the group that they belong to leaves the ring."""
    bits, window, tokens = GROUPED[cache.format], cache.recent_key.shape[2], key.shape[1]
    row, column = places
    codes, *grids = quantize_groups(value.transpose(0, 2, 3, 1), bits)
    parts = {"value": kv_layout.pack_values(codes, bits), "value_scale": grids[0], "value_offset": grids[1]}
    written = {
        name: getattr(cache, name).at[row, :, :, column].set(x.transpose(0, 3, 1, 2), mode="drop")
        for name, x in parts.items()
    }
    recent = jnp.concatenate([unroll_ring(cache.recent_key, cache.lengths), _by_head(key, cache.dtype)], axis=2)
    start = cache.lengths - window
    first, end = (quantized_tokens(n, window) for n in (cache.lengths, lengths))
    count = -(-tokens // kv_layout.GROUP) + 1
    codes, *grids = quantize_groups(take_groups(recent, first - start, count), bits)
    index = lax.broadcasted_iota(jnp.int32, (key.shape[0], count), 1) * kv_layout.GROUP + first[:, None]
    row, column = place(cache, index, index < end[:, None])
    parts = {"key": kv_layout.pack_keys(codes, bits), "key_scale": grids[0], "key_offset": grids[1]}
    for name, x in parts.items():
        store = getattr(cache, name)
        by_group = lambda x, groups: x.reshape(*x.shape[:2], groups, -1, cache.head_dim)  # noqa: E731
        groups = by_group(store, cache.value.shape[-1] // kv_layout.GROUP)
        groups = groups.at[row, :, column // kv_layout.GROUP].set(by_group(x, count).swapaxes(1, 2), mode="drop")
        written[name] = groups.reshape(store.shape)
    return dataclasses.replace(cache, **written)


def write_recent(cache: "KVCache", key, value, lengths) -> "KVCache":
    """Tokens go to the rings; `cache.lengths` are still those before them."""
    window, rings = cache.recent_key.shape[2], (cache.recent_key, cache.recent_value.swapaxes(2, 3))
    key, value = (
        fill_ring(
            jnp.concatenate([unroll_ring(ring, cache.lengths), _by_head(x, cache.dtype)], axis=2),
            cache.lengths - window,
            lengths,
            window,
        )
        for ring, x in zip(rings, (key, value), strict=True)
    )
    return dataclasses.replace(cache, recent_key=key, recent_value=value.swapaxes(2, 3))


def _by_head(x: jax.Array, dtype) -> jax.Array:
    return x.astype(dtype).swapaxes(1, 2)
