"""The tile map: which rows of which expert a tile holds, from group sizes that only the device knows."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.config import ALIGNMENT, Config, tile_bound

# Rows of the map.
EXPERT, COLUMN, FIRST, LOW, HIGH = range(5)


def tile_map(group_sizes: jax.Array, rows: int, n_tiles: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """List the tiles of a grouped product, in the order in which blocks take them.

    A tile begins at a multiple of 8 rows, where the copy engine can; of its rows it owns those from LOW to HIGH. Rows
    past the sum of the sizes make one expert more, which has no inputs: its tiles are stored as zeros. Under a column
    of outputs, a strip of the expert's row tiles is visited before the next column.

    Args:
      group_sizes: `[E]` integers.
      rows: rows in all.
      n_tiles: tiles along the outputs.
      config: gives the rows of a tile and the length of a strip.

    Returns:
      int32 `[5, bound]`: EXPERT, COLUMN (of tiles), FIRST row in units of 8 (so that the compiler sees what it is a
      multiple of), LOW and HIGH row; and `[1]`, how many columns of it are tiles.
    """
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.concatenate([sizes, (rows - jnp.sum(sizes, dtype=jnp.int32))[None]])
    ends = _running_sum(sizes)
    low = ends - sizes
    first = low // ALIGNMENT
    m_tiles = jnp.where(sizes > 0, -(-(ends - first * ALIGNMENT) // config.block_m), 0)
    tile_ends = _running_sum(m_tiles * n_tiles)
    bound = tile_bound(rows, group_sizes.shape[0], config.block_m) * n_tiles
    index = jnp.arange(bound, dtype=jnp.int32)
    expert = jnp.sum(index[:, None] >= tile_ends[None, :], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, sizes.shape[0] - 1)
    inside = index - (tile_ends - m_tiles * n_tiles)[expert]
    strip = inside // (config.strip * n_tiles)
    inside = inside - strip * (config.strip * n_tiles)
    width = jnp.clip(m_tiles[expert] - strip * config.strip, 1, config.strip)
    m_tile = strip * config.strip + inside % width
    tiles = jnp.stack(
        [expert, inside // width, first[expert] + m_tile * (config.block_m // ALIGNMENT), low[expert], ends[expert]]
    )
    return tiles, tile_ends[-1:]


def _running_sum(values: jax.Array) -> jax.Array:
    """Inclusive sums of a short vector: one small reduction, where a scan is several launches."""
    index = jnp.arange(values.shape[0])
    return jnp.sum(jnp.where(index[:, None] >= index[None, :], values[None, :], 0), axis=1, dtype=jnp.int32)
