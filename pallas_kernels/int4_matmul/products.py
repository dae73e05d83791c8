"""The product of one tile: how codes in registers meet activations, and where scales come in.

16-bit activations: for few tokens each group's product is scaled after it, for many the weights before it. 8-bit ones
meet codes as they are, so that a scale can only come after: a group's, on its product; a channel's, on the result.
Each function returns a warpgroup's sums `[64 outputs, tokens of the tile]` over the steps `first` to `last`.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_matmul.layout import CODE_OFFSET, TILE
from pallas_kernels.int4_matmul.operand import MAGIC, ROWS, unpack_int4, unpack_int4_bytes


def product_of(plan):
    """The product that a plan's operands and configuration ask for."""
    if plan.x_bytes == 1:
        return _product_of_codes if plan.grouped or plan.acc_dtype == jnp.float32 else _long_product
    return _product_scaled_after if plan.config.scale_after else _long_product


def _operands(plan, warpgroup, smem, slot, group: int):
    """Row vectors `[64]` float32 of a group of the stage: the offset of its codes and its scale."""
    where = (slot, group, pl.ds(warpgroup * TILE, TILE))
    scale = plgpu.load(smem["scale"].at[where], layout=ROWS, optimized=False).astype(jnp.float32)
    hidden = float(MAGIC[jnp.dtype(plan.dtype).name] + CODE_OFFSET)
    if not plan.has_zero_point:
        return plgpu.layout_cast(jnp.full((TILE,), hidden, jnp.float32), ROWS), scale
    return plgpu.load(smem["zero"].at[where], layout=ROWS, optimized=False).astype(jnp.float32) + hidden, scale


def _weights(plan, warpgroup, smem, slot, first_k: int, offset, scale):
    """Unpack `wgmma_k` inputs of a stage."""
    tile, inside = divmod(first_k, TILE)
    packed = smem["w"].at[slot, warpgroup]
    if plan.x_bytes == 1:
        return unpack_int4_bytes([packed.at[tile + i] for i in range(plan.wgmma_k // TILE)], dtype=plan.dtype)
    return unpack_int4(packed.at[tile], offset, scale, first_step=inside // 16, depth=plan.wgmma_k, dtype=plan.dtype)


def _multiply(plan, smem, slot, first_k: int, acc, weights):
    """Issue `acc += W^T x^T` over `wgmma_k` inputs of a stage."""
    plgpu.wgmma(acc, weights, smem["x"].at[slot, :, pl.ds(first_k, plan.wgmma_k)].T)


def _release(plan, empty):
    """Give a stage back to whoever copies into it."""
    if plan.config.multicast > 1:  # One warp tells the peers, for all: they must have read.
        _synchronize_warpgroup()
    plgpu.barrier_arrive(empty)


@plgpu.inline_mgpu()
def _synchronize_warpgroup(_=None):
    mgpu.utils.warpgroup_barrier()


def _zeros(plan):
    return plgpu.layout_cast(jnp.zeros((TILE, plan.config.block_m), jnp.float32), plgpu.Layout.WGMMA)


def _product_scaled_after(plan, warpgroup, smem, first, last, position):
    """Sum over groups of `scale * (integer product)`: one short product a group, scaled in float32."""
    c = plan.config

    def group_product(slot, group):
        offset, scale = _operands(plan, warpgroup, smem, slot, group)

        def multiply(part):
            for first_k in range(group * plan.group_k, (group + 1) * plan.group_k, plan.wgmma_k):
                weights = _weights(plan, warpgroup, smem, slot, first_k, offset, None)
                _multiply(plan, smem, slot, first_k, part, weights)
            return part[...]

        part = pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), jnp.float32))
        return part * lax.broadcast_in_dim(scale, part.shape, (0,))

    def stage(step, acc):
        slot = lax.rem(position + (step - first), jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        for group in range(plan.scale_rows):
            acc = acc + group_product(slot, group)
        _release(plan, smem["empty"].at[slot])
        return acc

    return lax.fori_loop(first, last, stage, _zeros(plan))


def _product_of_codes(plan, warpgroup, smem, first, last, position):
    """Sum of 8-bit products in float32, of a group times its scale; the next weights are unpacked under a product."""
    c = plan.config
    depths = range(0, c.block_k, plan.group_k)

    def stage(step, total):
        slot = lax.rem(position + (step - first), jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        unpacked = lambda first_k: [  # noqa: E731
            _weights(plan, warpgroup, smem, slot, k, None, None)
            for k in range(first_k, first_k + plan.group_k, plan.wgmma_k)
        ]
        ahead = unpacked(0)
        for group, first_k in enumerate(depths):

            def multiply(part, first_k=first_k, weights=ahead):
                for i, value in enumerate(weights):
                    _multiply(plan, smem, slot, first_k + i * plan.wgmma_k, part, value)
                following = unpacked(first_k + plan.group_k) if first_k != depths[-1] else []
                return part[...], following

            part, ahead = pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), plan.acc_dtype))
            part = part.astype(jnp.float32)
            if plan.grouped:
                where = (slot, group, pl.ds(warpgroup * TILE, TILE))
                scale = plgpu.load(smem["scale"].at[where], layout=ROWS, optimized=False).astype(jnp.float32)
                part = part * lax.broadcast_in_dim(scale, part.shape, (0,))
            total = total + part
        _release(plan, smem["empty"].at[slot])
        return total

    return lax.fori_loop(first, last, stage, _zeros(plan))


def _long_product(plan, warpgroup, smem, first, last, position):
    """One long product; a stage is given back when the next one's first product is under way.

    wgmma reads its weights from registers while the next ones are unpacked, so that two sets of registers alternate:
    a stage must hold an even number of products, or else the loop writes the very set that is being read.
    """
    c = plan.config
    stages = jnp.int32(c.num_stages)

    def multiply(acc):
        def stage(step, _):
            at = position + (step - first)
            slot, before = lax.rem(at, stages), lax.rem(at - 1 + stages, stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            for first_k in range(0, c.block_k, plan.wgmma_k):
                factors = (None, None)
                if plan.x_bytes == 2:
                    factors = _operands(plan, warpgroup, smem, slot, first_k // plan.group_k)
                weights = _weights(plan, warpgroup, smem, slot, first_k, *factors)
                _multiply(plan, smem, slot, first_k, acc, weights)
                plgpu.wgmma_wait(1)
                if first_k == 0:
                    pl.when(step > first)(lambda: _release(plan, smem["empty"].at[before]))

        lax.fori_loop(first, last, stage, None)
        result = acc[...]
        pl.when(last > first)(lambda: _release(plan, smem["empty"].at[lax.rem(position + (last - first) - 1, stages)]))
        return result

    return pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), plan.acc_dtype))
