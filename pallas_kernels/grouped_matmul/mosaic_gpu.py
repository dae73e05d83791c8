"""The Hopper grouped kernel: the dense kernels' ring and products, walked over tiles that each block works out.

The product is computed transposed, `out^T = W^T x^T`: the outputs fill the 64 rows of a wgmma and an expert's rows its
flexible side, so that an expert of three rows wastes little. Persistent blocks take tiles in turn: one
warp drives the copy engine through a ring of stages that runs on across tiles, whatever experts they belong to; each
compute warpgroup owns 64 of a tile's outputs.

Tiles begin at multiples of 8 rows, as the copy engine must, and may hold rows of the experts before and after. Those
columns of the product are computed and dropped: the store goes through shared memory, row by row, and leaves out what
is not the expert's. So any group sizes do, nothing is padded, and no two tiles write the same row.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels._warpgroups import copy_and_compute
from pallas_kernels.grouped_matmul.config import ALIGNMENT, BLOCK, HOPPER_SMS, TILE, Config, tile_bound, widths
from pallas_kernels.grouped_matmul.epilogue import PER_COLUMN, PER_ROW, STAGING, silu_mul, store_rows
from pallas_kernels.grouped_matmul.product import product_of
from pallas_kernels.grouped_matmul.tiles import count_tiles, find_tile, rows_of, write_table
from pallas_kernels.int4_matmul.plan import ProductPlan


def grouped_matmul_mosaic_gpu(
    x, qweight, scale, zero_point, group_sizes, x_scale, row_scale, *, activation, out_dtype, config: Config
) -> jax.Array:
    """Launch the kernel on the operands of `grouped_matmul_reference`."""
    rows, k = x.shape
    depth = TILE if scale.shape[1] == 1 else min(TILE, k // scale.shape[1])
    if rows > ALIGNMENT or k % depth:  # The copy engine addresses x in tiles of 8 rows by 64 (or 32) inputs.
        x = jnp.pad(x, ((0, -rows % ALIGNMENT if rows > ALIGNMENT else 0), (0, -k % depth)))
    refs = {"x": x, "w": qweight, "scale": scale}
    if zero_point is not None:
        refs["zero"] = zero_point
    for name, vector in (("x_scale", x_scale), ("row_scale", row_scale)):
        if vector is not None:  # a tile at the end reads on
            refs[name] = jnp.pad(vector.astype(jnp.float32).reshape(-1), (0, config.block_m))
    plan = _Plan(rows, x, qweight, scale, zero_point is not None, activation, out_dtype, config)
    refs["sizes"] = group_sizes.astype(jnp.int32)
    names = tuple(refs)
    kernel = plgpu.kernel(
        lambda *args: _body(plan, dict(zip(names, args[:-1], strict=True)), args[-1]),
        out_type=jax.ShapeDtypeStruct((rows, plan.columns), plan.out_dtype),
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=config.num_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return kernel(*refs.values())


class _Plan(ProductPlan):
    """The static geometry of one launch."""

    def __init__(self, rows, x, qweight, scale, has_zero_point, activation, out_dtype, config):
        super().__init__(x, scale, has_zero_point, out_dtype, config)
        self.gated, self.int4 = activation == "silu_mul", qweight.dtype == jnp.int32
        self.num_experts, _, self.n = scale.shape
        self.n_tiles = pl.cdiv(self.n, config.block_n)
        self.columns = self.n // 2 if self.gated else self.n
        if not self.int4:
            self.wgmma_k, self.code_factor = BLOCK, 1.0
        # A channel's scale of 8-bit products waits for the result.
        self.ring_scales = self.x_bytes == 2 or self.grouped
        self.rows = rows
        # A thread that gates holds columns of both halves of a tile, each by eights; int8 products go by sixteens.
        self.widths = widths(config.block_m, (1 + (self.gated or x.dtype == jnp.int8)) * ALIGNMENT)
        self.num_blocks = min(HOPPER_SMS, tile_bound(rows, self.num_experts, config.block_m) * self.n_tiles)

    def cut(self, width: int) -> "_Plan":
        """The plan for tiles of fewer rows."""
        narrow = copy.copy(self)
        narrow.config = dataclasses.replace(self.config, block_m=width)
        return narrow

    def for_width(self, table, tile, visit):
        """Call `visit(width)` with the least width that holds a tile's rows."""
        held = rows_of(table, tile.expert)[1] - tile.first * ALIGNMENT
        *narrow, wide = self.widths
        for below, width in zip((0, *narrow), narrow, strict=False):
            pl.when((held > below) & (held <= width))(lambda width=width: visit(width))
        if not narrow:
            return visit(wide)
        pl.when(held > narrow[-1])(lambda: visit(wide))

    def scratch(self):
        """Shared memory and barriers, by name."""
        c, stages = self.config, self.config.num_stages
        scratch = {
            "x": tiled((stages, c.block_m, c.block_k), self.dtype, self.wgmma_k),
            "out": plgpu.SMEM((c.num_warpgroups, min(c.block_m, TILE), TILE), self.out_dtype, transforms=STAGING),
            "table": plgpu.SMEM((2, self.num_experts + 2), jnp.int32),
            "full": plgpu.Barrier(num_arrivals=2 + self.ring_scales + self.has_zero_point, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=c.num_warpgroups, num_barriers=stages),
        }
        if self.int4:
            scratch["w"] = plgpu.SMEM((stages, c.num_warpgroups, c.block_k // TILE, 2, 256), jnp.int32)
        else:
            scratch["w"] = tiled((stages, c.block_n, c.block_k), self.dtype, BLOCK)
        for name in ("scale",) * self.ring_scales + ("zero",) * self.has_zero_point:
            scratch[name] = plgpu.SMEM((stages, self.scale_rows, c.block_n), self.scale_dtype)
        return scratch

    def steps(self, tile):
        """Steps along the inputs of a tile."""
        return jnp.where(tile.expert < self.num_experts, self.k_steps, 0)


def _body(plan: _Plan, refs, out):
    """One block: its last warpgroup copies, the others compute."""
    copy_and_compute(
        plan.config.num_warpgroups,
        plan.scratch(),
        prepare=lambda shared: write_table(refs["sizes"], shared["table"], rows=plan.rows, block_m=plan.config.block_m),
        copy=lambda shared: _copy_tiles(plan, refs, shared),
        compute=lambda warpgroup, shared: _compute_tiles(plan, warpgroup, refs, out, shared),
    )


def _for_each_tile(plan: _Plan, table, visit):
    """Call `visit(tile, column, steps, position)` for the tiles of this block.

    The position counts the stages of the ring that have gone by. Returns the last one.
    """
    block, blocks = lax.axis_index("block"), jnp.int32(plan.num_blocks)
    count = lax.div(count_tiles(table) * plan.n_tiles - block + blocks - 1, blocks)

    def step(i, position):
        tile, column = find_tile(table, block + i * blocks, plan.n_tiles, plan.config)
        steps = plan.steps(tile)
        visit(tile, column, steps, position)
        return position + steps

    return lax.fori_loop(0, count, step, jnp.int32(0))


def _copy_tiles(plan: _Plan, refs, smem):
    """Stream every stage of this block's tiles through the ring."""
    c = plan.config

    def visit(tile, column, steps, position):
        columns = pl.ds(column * c.block_n, c.block_n)

        def copy_stage(step, at):
            slot = lax.rem(at, jnp.int32(c.num_stages))
            pl.when(at >= c.num_stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
            inputs = pl.ds(step * c.block_k, c.block_k)
            full, sources = smem["full"].at[slot], {}

            def copy_rows(width):
                rows = pl.ds(tile.first * ALIGNMENT, width)
                plgpu.copy_gmem_to_smem(refs["x"].at[rows, inputs], smem["x"].at[slot, pl.ds(0, width)], full)

            plan.for_width(smem["table"], tile, copy_rows)
            if plan.int4:
                k_tiles = c.block_k // TILE
                outputs = pl.ds(column * c.num_warpgroups, c.num_warpgroups)
                sources["w"] = refs["w"].at[tile.expert, outputs, pl.ds(step * k_tiles, k_tiles)]
            else:
                sources["w"] = refs["w"].at[tile.expert, columns, inputs]
            groups = pl.ds(lax.div(step * c.block_k, plan.group_size), plan.scale_rows)
            for name in ("scale",) * plan.ring_scales + ("zero",) * plan.has_zero_point:
                sources[name] = refs[name].at[tile.expert, groups, columns]
            for name, source in sources.items():
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full)
            return at + 1

        lax.fori_loop(0, steps, copy_stage, position)

    position = _for_each_tile(plan, smem["table"], visit)
    for slot in range(c.num_stages):  # Every phase of a barrier is waited for once.
        pl.when(position > slot)(lambda slot=slot: plgpu.barrier_wait(smem["empty"].at[slot]))


def _compute_tiles(plan: _Plan, warpgroup, refs, out, smem):
    """Multiply this warpgroup's outputs of every tile, finish, store."""
    c = plan.config

    def visit(tile, column, steps, position):
        def multiply(width):
            narrow = plan.cut(width)
            rows = smem | {"x": smem["x"].at[:, pl.ds(0, width)]}
            totals = product_of(narrow)(narrow, warpgroup, rows, jnp.int32(0), steps, position)
            for i, sums in enumerate(totals):
                first_column = column * c.block_n + (warpgroup * c.row_tiles + i) * TILE
                _finish(narrow, warpgroup, refs, out, smem, sums, tile, first_column)

        plan.for_width(smem["table"], tile, multiply)

    _for_each_tile(plan, smem["table"], visit)


def _finish(plan: _Plan, warpgroup, refs, out, smem, sums, tile, first_column):
    """Scale the sums of a tile's rows, apply the activation, store."""
    first_row = tile.first * ALIGNMENT
    own = pl.ds(first_row, sums.shape[1])
    of_row = {
        name: plgpu.load(refs[name].at[own], layout=PER_COLUMN, optimized=False)
        for name in ("x_scale", "row_scale")
        if name in refs
    }
    sums = sums.astype(jnp.float32)
    if not plan.ring_scales:
        # The expert that owns nothing, and outputs past the last, read some other scale.
        where = (
            jnp.minimum(tile.expert, plan.num_experts - 1),
            0,
            pl.ds(jnp.minimum(first_column, plan.n - TILE), TILE),
        )
        scale = plgpu.load(refs["scale"].at[where], layout=PER_ROW, optimized=False).astype(jnp.float32)
        sums = sums * lax.broadcast_in_dim(scale, sums.shape, (0,))
    if "x_scale" in of_row:
        sums = sums * lax.broadcast_in_dim(of_row["x_scale"] * (1 / plan.code_factor), sums.shape, (1,))
    row_scale = of_row.get("row_scale")
    if plan.gated:
        sums, first_column = silu_mul(sums, row_scale), lax.div(first_column, jnp.int32(2))
    elif row_scale is not None:
        sums = sums * lax.broadcast_in_dim(row_scale, sums.shape, (1,))
    _store(plan, warpgroup, out, smem, sums, tile, first_row, first_column)


def _store(plan: _Plan, warpgroup, out, smem, values, tile, first_row, first_column):
    """Write `[64 outputs, rows]` to the rows of `out` that are the expert's, a piece of rows at a time."""
    low, high = rows_of(smem["table"], tile.expert)  # Read again: no register holds them during the product.
    for start in range(0, values.shape[1], TILE):
        piece = values[:, start : start + TILE].astype(plan.out_dtype)
        staging = smem["out"].at[warpgroup, pl.ds(0, piece.shape[1])]
        staging.T[...] = piece
        store_rows(
            staging,
            out,
            first_row + start,
            low,
            high,
            first_column,
            columns=plan.columns,
            second_half=values.shape[1] if plan.gated else None,
        )
