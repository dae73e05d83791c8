"""The tile map: which rows of which expert a tile holds, from group sizes that only the device knows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.config import ALIGNMENT, Config, tile_bound


class RowTile(NamedTuple):
    """A row tile of the map; in the map itself, int32 `[bound]` of each.

    Attributes:
      expert: whose rows they are; the number of experts for rows past the sum of the group sizes.
      first: the first row, in units of 8 (so that the compiler sees what it is a multiple of).
      low: the expert's first row of all.
      high: the row after its last.
      head: the tile that begins this one's strip.
      width: tiles of the strip.
    """

    expert: jax.Array
    first: jax.Array
    low: jax.Array
    high: jax.Array
    head: jax.Array
    width: jax.Array


def tile_map(group_sizes: jax.Array, rows: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """List the row tiles of a grouped product.

    A tile begins at a multiple of 8 rows, where the copy engine can; of its rows it owns those from `low` to `high`.
    Rows past the sum of the sizes make one expert more, which has no inputs: its tiles are stored as zeros. The map
    does not depend on the outputs: the products of a layer share it.

    Args:
      group_sizes: `[E]` integers.
      rows: rows in all.
      config: gives the rows of a tile and the length of a strip.

    Returns:
      int32 `[6, bound]`, the fields of `RowTile`, and `[E + 1]`, how many tiles there are up to each expert's last.
    """
    ends = _running_sum(group_sizes.astype(jnp.int32))
    low, ends = jnp.pad(ends, (1, 0)), jnp.pad(ends, (0, 1), constant_values=rows)
    first = low // ALIGNMENT
    slots = _running_sum(jnp.where(ends > low, -(-(ends - first * ALIGNMENT) // config.block_m), 0))
    slot = jnp.arange(tile_bound(rows, group_sizes.shape[0], config.block_m), dtype=jnp.int32)
    expert = jnp.sum(slot[:, None] >= slots[None, :], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, group_sizes.shape[0])
    before = jnp.where(expert > 0, slots[expert - 1], 0)
    inside = slot - before
    strip = inside // config.strip * config.strip
    tiles = RowTile(
        expert=expert,
        first=first[expert] + inside * (config.block_m // ALIGNMENT),
        low=low[expert],
        high=ends[expert],
        head=slot - inside + strip,
        width=jnp.minimum(slots[expert] - before - strip, config.strip),
    )
    return jnp.stack(tiles), slots


def find_tile(tiles, index: jax.Array, n_tiles: int) -> tuple[RowTile, jax.Array]:
    """Row tile and column of outputs of a linear index: under a column, all tiles of a strip come before the next.

    Args:
      tiles: the map, in global memory.
      index: below the number of row tiles times `n_tiles`.
      n_tiles: tiles along the outputs.
    """
    at = RowTile(*(tiles.at[field] for field in range(tiles.shape[0])))
    slot = lax.div(index, jnp.int32(n_tiles))
    head, width = at.head[slot], at.width[slot]
    inside = index - head * n_tiles
    column = lax.div(inside, width)
    slot = head + inside - column * width
    return RowTile(*(field[slot] for field in at)), column


def _running_sum(values: jax.Array) -> jax.Array:
    """Inclusive sums of a short vector: one small reduction, where a scan is several launches."""
    index = jnp.arange(values.shape[0])
    return jnp.sum(jnp.where(index[:, None] >= index[None, :], values[None, :], 0), axis=1, dtype=jnp.int32)
