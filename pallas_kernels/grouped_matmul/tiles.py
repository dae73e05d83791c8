"""The tiles of a launch, worked out by each block from group sizes that only the device knows.

One warp sums the sizes into a table in shared memory, before anything else; from then on a linear index becomes rows of
an expert and a column of outputs by a search in it. So a product is one launch, and no map is read from memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, nvvm

from pallas_kernels.grouped_matmul.config import ALIGNMENT, Config

LANES = 32


class RowTile(NamedTuple):
    """Rows of an expert that are multiplied together.

    Attributes:
      expert: whose rows they are; the number of experts for rows past the sum of the group sizes.
      first: the first row, in units of 8 (so that the compiler sees what it is a multiple of).
    """

    expert: jax.Array
    first: jax.Array


def write_table(group_sizes, table, *, rows: int, block_m: int) -> None:
    """Sum up the sizes of the experts, and the tiles that they take; every thread of the block calls it and waits.

    A tile begins at a multiple of 8 rows, where the copy engine can, and may hold rows of the expert before. Rows past
    the sum of the sizes are one expert more.

    Args:
      group_sizes: int32 `[E]` in global memory.
      table: int32 `[2, E + 2]` in shared memory: the rows before each expert, and the tiles before it; both end with
        their totals.
      rows: rows in all.
      block_m: rows of a tile.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(_, group_sizes, table):
        thread = mgpu.utils.thread_idx()
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, _constant(LANES))):
            _write_table(thread, group_sizes, table, rows, block_m)
        gpu.barrier()

    emit(group_sizes, table)  # pyright: ignore[reportCallIssue] - the context is passed by the decorator


def _write_table(lane, group_sizes, table, rows: int, block_m: int):
    """What one warp does: 32 experts at a time, a lane each."""
    experts = ir.MemRefType(group_sizes.type).shape[0]
    zero, index = _constant(0), ir.IndexType.get()
    at = lambda value: arith.index_cast(index, value)  # noqa: E731
    chosen = [arith.addi(lane, _constant(first)) for first in range(0, experts, LANES)]
    inside = [arith.cmpi(arith.CmpIPredicate.ult, expert, _constant(experts)) for expert in chosen]
    sizes = [
        arith.select(known, memref.load(group_sizes, [at(arith.minui(expert, _constant(experts - 1)))]), zero)
        for expert, known in zip(chosen, inside, strict=True)
    ]

    def store(kind: int, place, value):
        memref.store(value, table, [at(_constant(kind)), at(place)])

    row_total = tile_total = zero
    for expert, known, size in zip(chosen, inside, sizes, strict=True):
        high = arith.addi(_sum_to_lane(lane, size), row_total)
        tiles = _tiles(arith.subi(high, size), size, block_m)
        tile_end = arith.addi(_sum_to_lane(lane, tiles), tile_total)
        with mgpu.utils.when(known):
            store(0, arith.addi(expert, _constant(1)), high)
            store(1, arith.addi(expert, _constant(1)), tile_end)
        row_total, tile_total = _of_last_lane(high), _of_last_lane(tile_end)
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, zero)):
        rest = _tiles(row_total, arith.subi(_constant(rows), row_total), block_m)
        for kind, total in enumerate((_constant(rows), arith.addi(tile_total, rest))):
            store(kind, zero, zero)
            store(kind, _constant(experts + 1), total)


def _constant(value: int):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _tiles(low, size, block_m: int):
    """Tiles of `size` rows from `low` on."""
    held = arith.addi(arith.andi(low, _constant(ALIGNMENT - 1)), size)
    tiles = arith.divui(arith.addi(held, _constant(block_m - 1)), _constant(block_m))
    return arith.select(arith.cmpi(arith.CmpIPredicate.sgt, size, _constant(0)), tiles, _constant(0))


def _sum_to_lane(lane, value):
    """The sum of the lanes up to each."""
    everyone, distance = _constant(-1), 1
    while distance < LANES:
        other = nvvm.shfl_sync(everyone, value, _constant(distance), _constant(0), nvvm.ShflKind.up)
        reached = arith.cmpi(arith.CmpIPredicate.uge, lane, _constant(distance))
        value = arith.addi(value, arith.select(reached, other, _constant(0)))
        distance *= 2
    return value


def _of_last_lane(value):
    return nvvm.shfl_sync(_constant(-1), value, _constant(LANES - 1), _constant(LANES - 1), nvvm.ShflKind.idx)


def read_table(table, kind: int, place) -> jax.Array:
    """A number of the table, in a warpgroup or in a warp by itself, for which Pallas reads no shared memory."""
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), scalar), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
    )
    def emit(_, table, place) -> Any:
        index = ir.IndexType.get()
        value = memref.load(table, [arith.index_cast(index, v) for v in (_constant(kind), place.registers.item())])
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return emit(table, place)  # pyright: ignore[reportCallIssue]


def count_tiles(table) -> jax.Array:
    """Row tiles in all."""
    return read_table(table, 1, jnp.int32(table.shape[1] - 1))


def find_tile(table, index: jax.Array, n_tiles: int, config: Config) -> tuple[RowTile, jax.Array]:
    """Row tile and column of outputs of a linear index: under a column, all tiles of a strip come before the next.

    Args:
      table: of the experts, from `write_table`.
      index: below the number of row tiles times `n_tiles`.
      n_tiles: tiles along the outputs.
      config: gives the rows of a tile and the tiles of a strip.
    """
    rows_before, tiles_before = (functools.partial(read_table, table, kind) for kind in (0, 1))
    experts, slot = table.shape[1] - 2, lax.div(index, jnp.int32(n_tiles))
    expert = jnp.int32(0)
    for bit in reversed(range(experts.bit_length())):  # The last whose tiles begin no later: it has the tile.
        ahead = jnp.minimum(expert + (1 << bit), experts + 1)
        expert = jnp.where(tiles_before(ahead) <= slot, ahead, expert)
    before = tiles_before(expert)
    strip = lax.div(slot - before, jnp.int32(config.strip)) * config.strip
    width = jnp.minimum(tiles_before(expert + 1) - before - strip, config.strip)
    inside = index - (before + strip) * n_tiles
    column = lax.div(inside, width)
    place = strip + inside - column * width
    first = lax.div(rows_before(expert), jnp.int32(ALIGNMENT)) + place * (config.block_m // ALIGNMENT)
    return RowTile(expert, first), column


def rows_of(table, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An expert's first row and the row after its last."""
    return read_table(table, 0, expert), read_table(table, 0, expert + 1)
