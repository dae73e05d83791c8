"""The product of one tile: how codes in registers meet activations, and where scales come in.

Scales of groups: with 16-bit activations each group's product is scaled after it for few tokens, the weights before it
for many; 8-bit ones meet codes as they are, so that scales come after. A channel's scale waits for the result, unless a
zero point comes with it.
Each function returns a warpgroup's sums `[64 outputs, tokens of the tile]` over the steps `first` to `last`.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_matmul.layout import TILE
from pallas_kernels.int4_matmul.operand import MAGIC, ROWS, unpack_int4_bytes, unpack_words


def product_of(plan):
    """The product that a plan's operands and configuration ask for."""
    if plan.x_bytes == 1:
        return _product_of_codes if plan.grouped or plan.acc_dtype == jnp.float32 else _long_product
    if plan.ring_scales and plan.config.scale_after:
        return _product_in_turns if plan.config.k_warpgroups > 1 else _product_scaled_after
    return _long_product


def _row(plan, warpgroup, smem, name: str, slot, group: int):
    """A vector `[64]` float32 of a group of the stage: scales or zero points of this warpgroup's outputs."""
    where = (slot, group, pl.ds(warpgroup * TILE, TILE))
    return plgpu.load(smem[name].at[where], layout=ROWS, optimized=False).astype(jnp.float32)


def _offset(plan, warpgroup, smem, slot, group: int):
    """What unpacking subtracts from the codes of a group `[64]`, or None for formats that have no such number."""
    if plan.x_bytes == 1 or not plan.format.takes_zero_points:
        return None
    hidden = float(MAGIC[jnp.dtype(plan.dtype).name] + plan.format.offset)
    if not plan.has_zero_point:
        return plgpu.layout_cast(jnp.full((TILE,), hidden, jnp.float32), ROWS)
    return _row(plan, warpgroup, smem, "zero", slot, group) + hidden


def _weights(plan, warpgroup, smem, slot, first_k: int, offset, scale):
    """Unpack `wgmma_k` inputs of a stage."""
    first, inside = divmod(first_k, plan.format.tile_k)
    count = max(1, plan.wgmma_k // plan.format.tile_k)
    tiles = [smem["w"].at[slot, warpgroup, tile] for tile in range(first, first + count)]
    if plan.x_bytes == 1:
        return unpack_int4_bytes(tiles, dtype=plan.dtype)
    word = inside * plan.format.bits // 64
    return unpack_words(tiles, offset, scale, first_word=word, depth=plan.wgmma_k, dtype=plan.dtype, qtype=plan.qtype)


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
        offset = _offset(plan, warpgroup, smem, slot, group)

        def multiply(part):
            for first_k in range(group * plan.group_k, (group + 1) * plan.group_k, plan.wgmma_k):
                weights = _weights(plan, warpgroup, smem, slot, first_k, offset, None)
                _multiply(plan, smem, slot, first_k, part, weights)
            return part[...]

        part = pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), jnp.float32))
        scale = _row(plan, warpgroup, smem, "scale", slot, group)
        return part * lax.broadcast_in_dim(scale, part.shape, (0,))

    def stage(step, acc):
        slot = lax.rem(position + (step - first), jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        for group in range(plan.scale_rows):
            acc = acc + group_product(slot, group)
        _release(plan, smem["empty"].at[slot])
        return acc

    return lax.fori_loop(first, last, stage, _zeros(plan))


def _product_in_turns(plan, warpgroup, smem, first, last, position, turn=0):
    """The same, each piece of the products under the unpacking of the next: two sets of registers take turns.

    Of the stages, those whose position leaves `turn` when divided by the warpgroups that share the outputs.
    """
    c = plan.config

    def scaled(slot, group, part, in_flight):
        value = plgpu.wgmma_accumulator_load(part, wait_n=in_flight)
        scale = _row(plan, warpgroup, smem, "scale", slot, group)
        return value * lax.broadcast_in_dim(scale, value.shape, (0,))

    own = position + lax.rem(turn + (c.k_warpgroups - 1) * position, jnp.int32(c.k_warpgroups))

    def stage(step, total):
        slot = lax.rem(own + step * c.k_warpgroups, jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])

        def multiply(*parts):
            acc = total
            for group, part in enumerate(parts):
                offset = _offset(plan, warpgroup, smem, slot, group)
                for first_k in range(group * plan.group_k, (group + 1) * plan.group_k, plan.wgmma_k):
                    weights = _weights(plan, warpgroup, smem, slot, first_k, offset, None)
                    _multiply(plan, smem, slot, first_k, part, weights)
                    if group and first_k == group * plan.group_k:
                        acc = acc + scaled(slot, group - 1, parts[group - 1], 1)
                    else:
                        plgpu.wgmma_wait(1)
            return acc + scaled(slot, len(parts) - 1, parts[-1], 0)

        acc = pl.run_scoped(multiply, *[plgpu.ACC((TILE, c.block_m), jnp.float32)] * plan.scale_rows)
        _release(plan, smem["empty"].at[slot])
        return acc

    stages = lax.div(position + (last - first) - own + (c.k_warpgroups - 1), jnp.int32(c.k_warpgroups))
    return lax.fori_loop(0, stages, stage, _zeros(plan))


def _product_of_codes(plan, warpgroup, smem, first, last, position):
    """Sum of 8-bit products in float32, of a group times its scale.

    Groups go in pairs: while the product of the second runs, that of the first is scaled.
    """
    c = plan.config

    def issue(slot, group, part):
        for first_k in range(group * plan.group_k, (group + 1) * plan.group_k, plan.wgmma_k):
            _multiply(plan, smem, slot, first_k, part, _weights(plan, warpgroup, smem, slot, first_k, None, None))

    def scaled(slot, group, part, in_flight):
        value = plgpu.wgmma_accumulator_load(part, wait_n=in_flight).astype(jnp.float32)
        if plan.ring_scales:
            scale = _row(plan, warpgroup, smem, "scale", slot, group)
            value = value * lax.broadcast_in_dim(scale, value.shape, (0,))
        return value

    def stage(step, total):
        slot = lax.rem(position + (step - first), jnp.int32(c.num_stages))
        plgpu.barrier_wait(smem["full"].at[slot])
        groups = range(c.block_k // plan.group_k)
        for pair in (groups[i : i + 2] for i in groups[::2]):

            def multiply(*parts, pair=pair, total=total):
                for group, part in zip(pair, parts, strict=True):
                    issue(slot, group, part)
                for group, part, after in zip(pair, parts, reversed(range(len(pair))), strict=True):
                    total = total + scaled(slot, group, part, after * (plan.group_k // plan.wgmma_k))
                return total

            total = pl.run_scoped(multiply, *[plgpu.ACC((TILE, c.block_m), plan.acc_dtype)] * len(pair))
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
                group = first_k // plan.group_k
                offset = _offset(plan, warpgroup, smem, slot, group)
                scaled = plan.ring_scales and plan.x_bytes == 2
                scale = _row(plan, warpgroup, smem, "scale", slot, group) if scaled else None
                weights = _weights(plan, warpgroup, smem, slot, first_k, offset, scale)
                _multiply(plan, smem, slot, first_k, acc, weights)
                plgpu.wgmma_wait(1)
                if first_k == 0:
                    pl.when(step > first)(lambda: _release(plan, smem["empty"].at[before]))

        lax.fori_loop(first, last, stage, None)
        result = acc[...]
        pl.when(last > first)(lambda: _release(plan, smem["empty"].at[lax.rem(position + (last - first) - 1, stages)]))
        return result

    return pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), plan.acc_dtype))
