"""The product of one tile of 8-bit operands: exact in int32, or promoted to float32 on the way.

Each function returns a warpgroup's sums over the steps `first` to `last`, one array for each of its 64 rows.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int8_matmul.config import TILE
from pallas_kernels.int8_matmul.layout import BLOCK

DEEPEST = 256  # inputs that the fp8 tensor core sums by itself: it keeps about 14 bits
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def _multiply(plan, warpgroup, smem, slot, acc, i: int, inputs):
    """Issue `acc += rows columns^T` over the inputs of a stage, for the warpgroup's `i`-th 64 rows."""
    rows, columns = ("weight", "x") if plan.config.weights_first else ("x", "weight")
    own = pl.ds((warpgroup * plan.row_tiles + i) * TILE, TILE)
    plgpu.wgmma(acc, smem[rows].at[slot, own, inputs], smem[columns].at[slot, :, inputs].T)


def exact_product(plan, warpgroup, vectors, smem, first, last, position, first_n):
    """One long product in the accumulator; a stage is given back when the next one's product is under way."""
    del vectors, first_n
    c = plan.config
    stages = jnp.int32(c.num_stages)

    def multiply(*accs):
        def stage(step, _):
            at = position + (step - first)
            plgpu.barrier_wait(smem["full"].at[lax.rem(at, stages)])
            for i, acc in enumerate(accs):
                _multiply(plan, warpgroup, smem, lax.rem(at, stages), acc, i, slice(None))
            plgpu.wgmma_wait(len(accs))
            pl.when(step > first)(lambda: plgpu.barrier_arrive(smem["empty"].at[lax.rem(at - 1 + stages, stages)]))

        lax.fori_loop(first, last, stage, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem["empty"].at[lax.rem(position + (last - first) - 1, stages)])
        return tuple(acc[...] for acc in accs)

    accs = [plgpu.ACC((TILE, c.columns), plan.acc_dtype)] * plan.row_tiles
    return pl.run_scoped(multiply, *accs)


def promoted_product(plan, warpgroup, vectors, smem, first, last, position, first_n):
    """A product every 256 inputs at most (every 128, if scales are blocked), added to float32 totals in registers."""
    c = plan.config
    depth = BLOCK if plan.blocked or c.block_k % DEEPEST else DEEPEST

    def part(slot, i, group):
        def multiply(acc):
            _multiply(plan, warpgroup, smem, slot, acc, i, pl.ds(group * depth, depth))
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((TILE, c.columns), plan.acc_dtype)).astype(jnp.float32)

    def stage(step, totals):
        slot = lax.rem(position + (step - first), jnp.int32(c.num_stages))
        w_scales = [
            _block_scale(plan, warpgroup, vectors, step * plan.groups + g, first_n)
            for g in range(plan.groups * plan.blocked)
        ]
        plgpu.barrier_wait(smem["full"].at[slot])
        for group in range(c.block_k // depth):
            parts = []
            for i, total in enumerate(totals):
                value = part(slot, i, group)
                if plan.blocked:
                    value = value * _group_scale(plan, warpgroup, smem, slot, i, group, w_scales[group])
                parts.append(total + value)
            totals = tuple(parts)
        if (
            plan.blocked and c.multicast > 1
        ):  # One lane arrives at the peers' barriers: all must have read their scales.
            plgpu.commit_smem()
        plgpu.barrier_arrive(smem["empty"].at[slot])
        return totals

    zeros = plgpu.layout_cast(jnp.zeros((TILE, c.columns), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(first, last, stage, (zeros,) * plan.row_tiles)


def _block_scale(plan, warpgroup, vectors, group, first_n):
    """The scale of the one 128 x 128 block of the weight that this warpgroup's part of a group lies in."""
    first_row = warpgroup * plan.row_tiles * TILE if plan.config.weights_first else 0
    block = lax.div(first_n + first_row, jnp.int32(BLOCK))
    last_group, last_block = (size - 1 for size in vectors["w_scale"].shape)
    return vectors["w_scale"][jnp.minimum(group, last_group), jnp.minimum(block, last_block)].astype(jnp.float32)


def _group_scale(plan, warpgroup, smem, slot, i: int, group: int, w_scale):
    """Both scales of a group's product, in the shape of the accumulator."""
    shape = (TILE, plan.config.columns)
    if plan.config.weights_first:
        scale = plgpu.load(smem["group_scale"].at[slot, group], layout=PER_COLUMN, optimized=False)
        return lax.broadcast_in_dim(scale * w_scale, shape, (1,))
    own = pl.ds((warpgroup * plan.row_tiles + i) * TILE, TILE)
    scale = plgpu.load(smem["group_scale"].at[slot, group, own], layout=PER_ROW, optimized=False)
    return lax.broadcast_in_dim(scale * w_scale, shape, (0,))
