"""A warpgroup's product of 8-bit weights, as they lie in shared memory; int4 weights take `int4_matmul`'s.

Each function returns the sums `[64, block_m]` of the warpgroup's row tiles over the steps `first` to `last`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.epilogue import PER_ROW, TILE
from pallas_kernels.int4_matmul.config import DEEPEST_FP8
from pallas_kernels.int4_matmul.products import product_of as int4_product_of


def product_of(plan):
    """The product that a plan's operands and configuration ask for."""
    if not plan.int4:
        return _exact if plan.dtype == jnp.int8 and not plan.grouped else _promoted
    product = int4_product_of(plan)
    return lambda *where: (product(*where),)


def _exact(plan, warpgroup, smem, first, last, position) -> tuple[jax.Array, ...]:
    """int8: one long product in the accumulator; a stage is given back when the next one's product is under way."""
    c = plan.config

    def multiply(*accs):
        def stage(step, _):
            at = position + (step - first)
            slot = lax.rem(at, jnp.int32(c.num_stages))
            plgpu.barrier_wait(smem["full"].at[slot])
            for i, acc in enumerate(accs):
                _multiply_8_bit(plan, warpgroup, smem, slot, acc, i, slice(None))
            plgpu.wgmma_wait(len(accs))
            pl.when(step > first)(lambda: _release_before(plan, smem, at))

        lax.fori_loop(first, last, stage, None)
        plgpu.wgmma_wait(0)
        pl.when(last > first)(lambda: _release_before(plan, smem, position + (last - first)))
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(multiply, *[plgpu.ACC((TILE, c.block_m), jnp.int32)] * c.row_tiles)


def _promoted(plan, warpgroup, smem, first, last, position) -> tuple[jax.Array, ...]:
    """A product every 256 inputs at most, or of a group times its scale, added to float32 totals.

    The fp8 tensor core keeps about 14 bits of a sum.
    """
    c = plan.config
    depth = min(DEEPEST_FP8, plan.group_k)

    def part(slot, i, first_k):
        def multiply(acc):
            _multiply_8_bit(plan, warpgroup, smem, slot, acc, i, pl.ds(first_k, depth))
            return acc[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), plan.acc_dtype)).astype(jnp.float32)
        if not plan.grouped:
            return sums
        where = (slot, first_k // plan.group_k, _own(plan, warpgroup, i))
        scale = plgpu.load(smem["scale"].at[where], layout=PER_ROW, optimized=False).astype(jnp.float32)
        return sums * lax.broadcast_in_dim(scale, sums.shape, (0,))

    def stage(step, totals):
        slot = lax.rem(position + (step - first), jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        for first_k in range(0, c.block_k, depth):
            totals = tuple(total + part(slot, i, first_k) for i, total in enumerate(totals))
        plgpu.barrier_arrive(smem["empty"].at[slot])
        return totals

    zeros = plgpu.layout_cast(jnp.zeros((TILE, c.block_m), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(first, last, stage, (zeros,) * c.row_tiles)


def _own(plan, warpgroup, i: int):
    """The outputs of a tile that a warpgroup's `i`-th accumulator sums."""
    return pl.ds((warpgroup * plan.config.row_tiles + i) * TILE, TILE)


def _multiply_8_bit(plan, warpgroup, smem, slot, acc, i: int, inputs):
    """Issue `acc += W^T x^T` over the inputs of a stage, for the warpgroup's `i`-th 64 outputs."""
    rows = smem["w"].at[slot, _own(plan, warpgroup, i), inputs]
    plgpu.wgmma(acc, rows, smem["x"].at[slot, :, inputs].T)


def _release_before(plan, smem, at):
    """Give back the stage before position `at`."""
    stages = plan.config.num_stages
    plgpu.barrier_arrive(smem["empty"].at[lax.rem(at - 1 + stages, jnp.int32(stages))])
