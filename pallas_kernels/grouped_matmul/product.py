"""A warpgroup's product over the stages of the ring: int4 weights by way of registers, 8-bit ones as they lie.

Each function returns the sums `[64, block_m]` of the warpgroup's row tiles, and gives every stage back.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.epilogue import PER_ROW, TILE
from pallas_kernels.int4_matmul.layout import CODE_OFFSET
from pallas_kernels.int4_matmul.operand import MAGIC, unpack_int4
from pallas_kernels.int8_matmul.mosaic_gpu import DEEPEST


def scaled_after(plan, warpgroup, smem, steps, position) -> tuple[jax.Array, ...]:
    """Sum over groups of `scale * (integer product)`: one short product a group, scaled in float32."""
    c = plan.config

    def group_product(slot, group):
        offset, scale = _offset_and_scale(plan, warpgroup, smem, slot, group)

        def multiply(part):
            for first_k in range(group * plan.group_k, (group + 1) * plan.group_k, plan.wgmma_k):
                _multiply(plan, warpgroup, smem, slot, first_k, part, offset, None)
            return part[...]

        part = pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), jnp.float32))
        return part * lax.broadcast_in_dim(scale, part.shape, (0,))

    def stage(step, acc):
        slot = lax.rem(position + step, jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        for group in range(plan.scale_rows):
            acc = acc + group_product(slot, group)
        plgpu.barrier_arrive(smem["empty"].at[slot])
        return acc

    return (lax.fori_loop(0, steps, stage, _zeros(plan)),)


def scaled_before(plan, warpgroup, smem, steps, position) -> tuple[jax.Array, ...]:
    """One long product of scaled weights; a stage is given back when the next one's first product is under way.

    wgmma reads its weights from registers while the next ones are unpacked, so that two sets of registers alternate:
    a stage must hold an even number of products, or else the loop writes the very set that is being read.
    """
    c = plan.config

    def multiply(acc):
        def stage(step, _):
            at = position + step
            slot = lax.rem(at, jnp.int32(c.num_stages))
            plgpu.barrier_wait(smem["full"].at[slot])
            for first_k in range(0, c.block_k, plan.wgmma_k):
                offset, scale = _offset_and_scale(plan, warpgroup, smem, slot, first_k // plan.group_k)
                _multiply(plan, warpgroup, smem, slot, first_k, acc, offset, scale)
                plgpu.wgmma_wait(1)
                if first_k == 0:
                    pl.when(step > 0)(lambda: _release_before(plan, smem, at))

        lax.fori_loop(0, steps, stage, None)
        result = acc[...]
        pl.when(steps > 0)(lambda: _release_before(plan, smem, position + steps))
        return result

    return (pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), jnp.float32)),)


def _zeros(plan) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((TILE, plan.config.block_m), jnp.float32), plgpu.Layout.WGMMA)


def _offset_and_scale(plan, warpgroup, smem, slot, group: int):
    """Row vectors `[64]` float32 of a group of the stage: the offset of its codes and its scale."""
    where = (slot, group, pl.ds(warpgroup * TILE, TILE))
    scale = plgpu.load(smem["scale"].at[where], layout=PER_ROW, optimized=False).astype(jnp.float32)
    hidden = float(MAGIC[jnp.dtype(plan.x_dtype).name] + CODE_OFFSET)
    if "zero" not in smem:
        return plgpu.layout_cast(jnp.full((TILE,), hidden, jnp.float32), PER_ROW), scale
    return plgpu.load(smem["zero"].at[where], layout=PER_ROW, optimized=False).astype(jnp.float32) + hidden, scale


def _multiply(plan, warpgroup, smem, slot, first_k: int, acc, offset, scale):
    """Issue `acc += W^T x^T` over `wgmma_k` inputs of a stage."""
    tile, inside = divmod(first_k, TILE)
    weights = unpack_int4(
        smem["weight"].at[slot, warpgroup, tile],
        offset,
        scale,
        first_step=inside // 16,
        depth=plan.wgmma_k,
        dtype=plan.x_dtype,
    )
    plgpu.wgmma(acc, weights, smem["x"].at[slot, :, pl.ds(first_k, plan.wgmma_k)].T)


def exact(plan, warpgroup, smem, steps, position) -> tuple[jax.Array, ...]:
    """int8: one long product in the accumulator; a stage is given back when the next one's product is under way."""
    c = plan.config

    def multiply(*accs):
        def stage(step, _):
            at = position + step
            slot = lax.rem(at, jnp.int32(c.num_stages))
            plgpu.barrier_wait(smem["full"].at[slot])
            for i, acc in enumerate(accs):
                _multiply_8_bit(plan, warpgroup, smem, slot, acc, i, slice(None))
            plgpu.wgmma_wait(len(accs))
            pl.when(step > 0)(lambda: _release_before(plan, smem, at))

        lax.fori_loop(0, steps, stage, None)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: _release_before(plan, smem, position + steps))
        return tuple(acc[...] for acc in accs)

    sums = pl.run_scoped(multiply, *[plgpu.ACC((TILE, c.block_m), jnp.int32)] * c.row_tiles)
    return tuple(total.astype(jnp.float32) for total in sums)


def promoted(plan, warpgroup, smem, steps, position) -> tuple[jax.Array, ...]:
    """fp8: a product every 256 inputs at most, added to float32 totals: the tensor core keeps about 14 bits."""
    c = plan.config
    depth = min(DEEPEST, c.block_k)

    def part(slot, i, first_k):
        def multiply(acc):
            _multiply_8_bit(plan, warpgroup, smem, slot, acc, i, pl.ds(first_k, depth))
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), jnp.float32))

    def stage(step, totals):
        slot = lax.rem(position + step, jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        for first_k in range(0, c.block_k, depth):
            totals = tuple(total + part(slot, i, first_k) for i, total in enumerate(totals))
        plgpu.barrier_arrive(smem["empty"].at[slot])
        return totals

    return lax.fori_loop(0, steps, stage, (_zeros(plan),) * c.row_tiles)


def _multiply_8_bit(plan, warpgroup, smem, slot, acc, i: int, inputs):
    """Issue `acc += W^T x^T` over the inputs of a stage, for the warpgroup's `i`-th 64 outputs."""
    own = pl.ds((warpgroup * plan.config.row_tiles + i) * TILE, TILE)
    plgpu.wgmma(acc, smem["weight"].at[slot, own, inputs], smem["x"].at[slot, :, inputs].T)


def _release_before(plan, smem, at):
    """Give back the stage before position `at`."""
    stages = plan.config.num_stages
    plgpu.barrier_arrive(smem["empty"].at[lax.rem(at - 1 + stages, jnp.int32(stages))])
