"""Which keys a block of queries sees, and which of their tiles it sees whole: the schedule of the kernel's loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.reference import Window

UNBOUNDED = 1 << 29  # further than any key, and far from the end of int32


class KeyTiles(NamedTuple):
    """Tiles [begin, end) that some query of a block sees, of which [full_begin, full_end) need no mask.

    A side that never needs one has the very same object for both of its bounds.
    """

    begin: jax.Array
    full_begin: jax.Array
    full_end: jax.Array
    end: jax.Array

    @property
    def masked(self) -> bool:
        """Whether some tile may need a mask."""
        return self.full_begin is not self.begin or self.full_end is not self.end

    def partly_seen(self, tile) -> jax.Array:
        """Whether a tile needs a mask."""
        return (tile < self.full_begin) | (tile >= self.full_end)


def key_tiles(first_query, rows: int, q_length, kv_length, window: Window, block: int, *, aligned: bool) -> KeyTiles:
    """The tiles of `block` keys for the `rows` queries from `first_query` on.

    Args:
        first_query: int32.
        rows: queries of the block; those past q_length need nothing.
        q_length: valid queries, int32.
        kv_length: valid keys, int32.
        window: visible keys left and right of a query.
        block: keys of a tile.
        aligned: whether kv_length is known to end with a tile.

    Returns:
        The tiles; none for queries past q_length.
    """
    left, right = window
    last_query = first_query + rows - 1

    def tiles(keys):
        return lax.div(keys, jnp.int32(block))

    end_key = kv_length if right is None else jnp.minimum(kv_length, last_query + right + 1)
    end_key = jnp.where(first_query < q_length, jnp.maximum(end_key, 0), 0)
    end = tiles(end_key + block - 1)
    begin = jnp.int32(0) if left is None else jnp.minimum(tiles(jnp.maximum(first_query - left, 0)), end)
    full_begin = begin
    if left is not None:
        full_begin = jnp.minimum(tiles(jnp.maximum(last_query - left, 0) + block - 1), end)
    full_end = end
    if right is not None or not aligned:
        full_keys = end_key if right is None else jnp.minimum(end_key, jnp.maximum(first_query + right + 1, 0))
        full_end = jnp.maximum(tiles(full_keys), full_begin)
    return KeyTiles(begin, full_begin, full_end, end)


def visible_columns(queries, tile, kv_length, window: Window, block: int) -> tuple[jax.Array | None, jax.Array]:
    """The first (None for no bound) and the last column of a tile that each of `queries` [rows] int32 sees."""
    left, right = window
    query, last_key = queries - tile * block, kv_length - 1 - tile * block
    last = jnp.minimum(query + (UNBOUNDED if right is None else right), last_key)
    return None if left is None else query - left, last
