"""Where the tokens of a cache lie: at their position, or in pages that sequences take and give back as they grow."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxquant.kv_cache._cache import KVCache


def place(cache: "KVCache", positions: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of each token [B, T] in the stores; tokens that are not valid lie past the end."""
    tokens = cache.value.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, positions.shape, 0)
    if cache.page_table is not None:
        page = jnp.clip(positions // tokens, 0, cache.page_table.shape[1] - 1)
        row = jnp.take_along_axis(cache.page_table, page, axis=1)
    return row, jnp.where(valid, positions % tokens if cache.page_table is not None else positions, tokens)


def take_pages(cache: "KVCache", lengths: jax.Array) -> tuple["KVCache", jax.Array]:
    """Gives sequences that grow to `lengths` pages off the free stack, the first ones first."""
    page_size, columns = cache.value.shape[-1], cache.page_table.shape[1]
    held, wanted = -(-cache.lengths // page_size), -(-lengths // page_size)

    # In turn, for a sequence that gets none must not keep the later ones from theirs.
    def grant(left, more):
        granted = more <= left
        return left - jnp.where(granted, more, 0), granted

    num_free, granted = lax.scan(grant, cache.num_free, wanted - held)
    lengths = jnp.where(granted, lengths, cache.lengths)
    more = jnp.where(granted, wanted - held, 0)
    before = jnp.cumsum(more) - more
    column = lax.broadcasted_iota(jnp.int32, (held.shape[0], columns), 1)
    new = (column >= held[:, None]) & (column < (held + more)[:, None])
    index = cache.num_free - 1 - before[:, None] - (column - held[:, None])
    pages = cache.free_pages[jnp.clip(index, 0, cache.free_pages.size - 1)]
    table = jnp.where(new, pages, cache.page_table)
    return dataclasses.replace(cache, page_table=table, num_free=num_free), lengths


def give_pages_back(cache: "KVCache", lengths: jax.Array, done: jax.Array) -> "KVCache":
    """Puts the pages of the sequences marked in `done`, which were of `lengths`, on the free stack."""
    held = -(-lengths // cache.value.shape[-1])
    column = lax.broadcasted_iota(jnp.int32, cache.page_table.shape, 1)
    freed = (column < held[:, None]) & done[:, None]
    slot = cache.num_free + jnp.cumsum(freed.reshape(-1)).reshape(freed.shape) - 1
    slot = jnp.where(freed, slot, cache.free_pages.size).astype(jnp.int32)
    free = cache.free_pages.at[slot].set(cache.page_table, mode="drop")
    return dataclasses.replace(cache, free_pages=free, num_free=cache.num_free + jnp.sum(freed, dtype=jnp.int32))
