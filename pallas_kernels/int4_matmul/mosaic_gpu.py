"""The Hopper int4 kernel: weights unpacked into registers feed wgmma while the copy engine streams what comes next.

The product is computed transposed, `out^T = W^T x^T`, so that the outputs N fill the 64 rows that wgmma insists on
and the tokens its flexible side (8 to 256). One kernel serves both regimes; a `Config` says how it is cut:

- A persistent block walks over tiles of `block_m` tokens by `block_n` outputs. One warp drives the copy engine
  through a ring of stages that runs on across tiles, so that memory never idles at a tile's end; each compute
  warpgroup owns 64 of the outputs.
- What the product is, and where scales come in, is the matter of `products`: other formats of weights and 8-bit
  activations differ there and in the unpacking only.
- Few tokens (memory-bound): the blocks of a cluster split K; their partial sums meet in distributed shared memory and
  are added in a fixed order.
- Many tokens (compute-bound): the unpacking of one tile runs under the product of the one before. Blocks of a cluster
  that lie side by side share x: each fetches a part of it for all.
- Several weights that take the same x (q, k and v) are one launch: their output tiles are counted on from one weight
  to the next, so that a block finds more to do before it ends.

Ragged tiles cost nothing: the copy engine fills reads out of bounds with zeros and drops such writes. Only a token
count over 8 that is no multiple of 8 is padded to one outside the kernel, and the inputs of a per-channel weight to a
multiple of 64.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._cluster_sum import add_over_cluster
from pallas_kernels._shared_memory import tiled
from pallas_kernels._tiles import WeightTiles, for_each_tile
from pallas_kernels._warpgroups import REGISTERS, copy_and_compute
from pallas_kernels.int4_matmul.config import Config, num_clusters
from pallas_kernels.int4_matmul.layout import TILE
from pallas_kernels.int4_matmul.operand import COLUMNS, ROWS
from pallas_kernels.int4_matmul.plan import ProductPlan
from pallas_kernels.int4_matmul.products import product_of

# Two compute warpgroups hold long sums in pairs: they take all that the copying one can give.
_REGISTERS = REGISTERS | {2: (240, 24)}


def int4_matmul_mosaic_gpu(
    x, weights, x_scale=None, *, out_dtype=None, qtype: str = "int4", config: Config
) -> tuple[jax.Array, ...]:
    """Launch the kernel once: `x` `[M, K]` times each weight `(qweight, scale, zero_point | None, bias | None)`.

    The weights have the same groups and the same dtype of scales, and all or none of them zero points. 8-bit codes x
    come with `x_scale` `[M]` float32. `qtype` is the format of the weights' codes.

    Returns:
      `[M, N padded to 64]` in `out_dtype` (by default x's) for each weight.
    """
    tokens, k = x.shape
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    num_groups = weights[0][1].shape[0]
    # The copy engine addresses x in tiles of 8 rows by 128 bytes (groups of 32: by 64), and 32-bit results, whose rows
    # the tokens lie along, in tiles of up to 32 columns.
    depth = 128 // x.dtype.itemsize if num_groups == 1 else min(TILE, k // num_groups)
    rows = -tokens % 8 if tokens > 8 else 0
    if out_dtype.itemsize == 4:
        rows = -tokens % (32 if tokens > 32 else 8)
    if rows or k % depth:
        x = jnp.pad(x, ((0, rows), (0, -k % depth)))
    plan = _Plan(x, weights, out_dtype, qtype, config)
    kernel = plgpu.kernel(
        functools.partial(_body, plan, jax.tree.structure(weights)),
        out_type=[plan.out_type(x.shape[0], qweight.shape[0] * TILE) for qweight, *_ in weights],
        grid=(plan.num_clusters,),
        grid_names=("tile",),
        cluster=(config.split_k, config.multicast),
        cluster_names=("split", "peer"),
        num_threads=config.num_warpgroups * config.k_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    outs = kernel(x, *jax.tree.leaves(weights), *([] if x_scale is None else [x_scale]))
    outs = [out.T if plan.transposed_out else out for out in outs]
    return tuple(out if x.shape[0] == tokens else out[:tokens] for out in outs)


class _Plan(ProductPlan):
    """The static geometry of one launch."""

    def __init__(self, x, weights, out_dtype, qtype, config):
        _, scale, zero_point, _ = weights[0]
        super().__init__(x, scale, zero_point is not None, out_dtype, config, qtype)
        # 32-bit registers do not transpose into shared memory without bank conflicts.
        self.transposed_out = out_dtype.itemsize == 4
        self.weights = WeightTiles([pl.cdiv(qweight.shape[0], config.num_warpgroups) for qweight, *_ in weights])
        self.m_tiles, self.n_tiles = pl.cdiv(x.shape[0], config.block_m), self.weights.count
        self.chunks = config.chunks
        self.chunk_m = config.block_m // config.chunks
        self.piece_m = min(self.chunk_m, 64)
        self.stagings = 1 if self.transposed_out else min(2, self.chunk_m // self.piece_m)
        # Peers take output tiles that lie side by side.
        self.shape = self.m_tiles, pl.cdiv(self.n_tiles, config.multicast)
        self.num_clusters = min(
            num_clusters(config.split_k * config.multicast, config.blocks_per_sm), self.shape[0] * self.shape[1]
        )

    def out_type(self, m: int, n: int) -> jax.ShapeDtypeStruct:
        """What the kernel writes for one weight."""
        return jax.ShapeDtypeStruct((n, m) if self.transposed_out else (m, n), self.out_dtype)

    def tile(self, index, _):
        """Token and output tile of a block, from the linear index of its cluster's tiles."""
        if self.m_tiles == 1:
            m_tile, n_tile = jnp.int32(0), index
        else:
            m_tile, n_tile = plgpu.planar_snake(index, self.shape, 1, self.config.snake_width)
        return m_tile, n_tile * self.config.multicast + lax.axis_index("peer")

    def steps(self, rank):
        """The first and the last step along the inputs that a block of the cluster takes."""
        split = self.config.split_k
        return lax.div(rank * self.k_steps, split), lax.div((rank + 1) * self.k_steps, split)

    def scratch(self):
        """Shared memory and barriers, by name."""
        c, stages = self.config, self.config.num_stages
        rows = (stages, self.scale_rows, c.block_n)
        piece = (TILE, self.piece_m) if self.transposed_out else (self.piece_m, TILE)
        scratch = {
            "x": tiled((stages, c.block_m, c.block_k), self.dtype, self.wgmma_k),
            "w": plgpu.SMEM((stages, c.num_warpgroups, c.block_k // self.format.tile_k, 2, 256), jnp.int32),
            "scale": plgpu.SMEM(rows, self.scale_dtype) if self.ring_scales else None,
            "zero": plgpu.SMEM(rows, self.scale_dtype) if self.has_zero_point else None,
            "out": tiled((c.num_warpgroups, self.stagings, *piece), self.out_dtype, piece[1]),
            "full": plgpu.Barrier(num_arrivals=2 + self.ring_scales + self.has_zero_point, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=c.num_warpgroups, num_barriers=stages),
        }
        if self.x_bytes == 1:  # The copy engine writes to multiples of 128 bytes.
            scratch |= {
                "x_scale": plgpu.SMEM((c.num_warpgroups, pl.cdiv(c.block_m, 32) * 32), jnp.float32),
                "x_scale_full": plgpu.Barrier(num_barriers=c.num_warpgroups),
            }
        if c.k_warpgroups > 1:
            scratch |= {
                "parts": tiled(
                    (c.num_warpgroups, c.k_warpgroups - 1, TILE, c.block_m), jnp.float32, min(c.block_m, 32)
                ),
                "written": plgpu.Barrier(num_arrivals=c.k_warpgroups - 1, num_barriers=c.num_warpgroups),
                "read": plgpu.Barrier(num_barriers=c.num_warpgroups),
            }
        if c.multicast > 1:  # A stage is empty when it is so in every block that the copy goes to.
            scratch["empty"] = plgpu.ClusterBarrier(
                collective_axes=("peer",), num_arrivals=c.num_warpgroups, num_barriers=stages
            )
        if c.split_k > 1:
            scratch |= {
                "partial": tiled(
                    (c.num_warpgroups, c.split_k - 1, TILE, self.chunk_m), jnp.float32, min(self.chunk_m, 32)
                ),
                "arrived": plgpu.Barrier(num_arrivals=c.split_k - 1, num_barriers=c.num_warpgroups),
                "free": plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=c.num_warpgroups),
            }
        return scratch


def _body(plan: _Plan, weights_tree, x, *refs):
    """One block: its last warpgroup copies, the others compute."""
    count, given = weights_tree.num_leaves, int(plan.x_bytes == 1)
    weights, outs = jax.tree.unflatten(weights_tree, refs[:count]), refs[count + given :]
    x_scale = refs[count] if given else None
    copy_and_compute(
        plan.config.num_warpgroups * plan.config.k_warpgroups,
        plan.scratch(),
        copy=lambda shared: _copy_tiles(plan, x, weights, shared),
        compute=lambda warpgroup, shared: _compute_tiles(plan, warpgroup, weights, x_scale, outs, shared),
        registers=_REGISTERS,
    )


def _copy_tiles(plan: _Plan, x, weights, smem):
    """Stream every stage of this block's tiles through the ring."""
    c = plan.config
    shared_by = ("peer",) if c.multicast > 1 else None

    def copy_stage(weight, m_tile, n_tile, step, position):
        w, scale, zero, _ = weights[weight]
        slot = lax.rem(position, jnp.int32(c.num_stages))
        pl.when(position >= c.num_stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
        full = smem["full"].at[slot]
        rows = pl.ds(lax.div(step * c.block_k, plan.group_size), plan.scale_rows)
        columns = pl.ds(n_tile * c.block_n, c.block_n)
        k_tiles = c.block_k // plan.format.tile_k
        plgpu.copy_gmem_to_smem(
            w.at[pl.ds(n_tile * c.num_warpgroups, c.num_warpgroups), pl.ds(step * k_tiles, k_tiles)],
            smem["w"].at[slot],
            full,
        )
        plgpu.copy_gmem_to_smem(
            x.at[pl.ds(m_tile * c.block_m, c.block_m), pl.ds(step * c.block_k, c.block_k)],
            smem["x"].at[slot],
            full,
            collective_axes=shared_by,
        )
        if plan.ring_scales:
            plgpu.copy_gmem_to_smem(scale.at[rows, columns], smem["scale"].at[slot], full)
        if zero is not None:
            plgpu.copy_gmem_to_smem(zero.at[rows, columns], smem["zero"].at[slot], full)

    def visit(_, m_tile, n_tile, first, last, position):
        def stream(weight, first_tile):
            def stage(step, _):
                copy_stage(weight, m_tile, n_tile - first_tile, step, position + (step - first))

            lax.fori_loop(first, last, stage, None)

        plan.weights.within(n_tile, stream)
        return position + (last - first)

    _, position = for_each_tile(plan, "split", visit)
    for slot in range(c.num_stages):  # Every phase of a barrier is waited for once.
        pl.when(position > slot)(lambda slot=slot: plgpu.barrier_wait(smem["empty"].at[slot]))


def _compute_tiles(plan: _Plan, warpgroup, weights, x_scale, outs, smem):
    """Multiply this warpgroup's 64 outputs of every tile, reduce over the cluster, store."""
    c, product, turn = plan.config, product_of(plan), 0
    if c.k_warpgroups > 1:
        warpgroup, turn = lax.rem(warpgroup, c.num_warpgroups), lax.div(warpgroup, c.num_warpgroups)
        product = functools.partial(product, turn=turn)

    def visit(count, m_tile, n_tile, first, last, position):
        first_m = m_tile * c.block_m
        if x_scale is not None:  # Read in full before this tile: each piece stored waited for all lanes.
            own = smem["x_scale"].at[warpgroup, pl.ds(0, c.block_m)]
            plgpu.copy_gmem_to_smem(x_scale.at[pl.ds(first_m, c.block_m)], own, smem["x_scale_full"].at[warpgroup])
        total = product(plan, warpgroup, smem, first, last, position)
        if x_scale is not None:
            plgpu.barrier_wait(smem["x_scale_full"].at[warpgroup])

        def store(value, column):
            def write(weight, first_tile):
                first_n, out = (n_tile - first_tile) * c.block_n + warpgroup * TILE, outs[weight]
                put = functools.partial(
                    _store, plan, warpgroup, weights[weight], out, smem, first_n, first_m, value, column
                )
                ragged = weights[weight][0].shape[0] % c.num_warpgroups
                pl.when(first_n < weights[weight][0].shape[0] * TILE)(put) if ragged else put()

            plan.weights.within(n_tile, write)

        def finish(total):
            if c.split_k == 1:
                store(total, 0)
            else:
                shared = {name: smem[name].at[warpgroup] for name in ("partial", "arrived", "free")}
                add_over_cluster(total, count, store, axis="split", split=c.split_k, chunks=plan.chunks, **shared)

        if c.k_warpgroups == 1:
            finish(total)
        else:
            shared = {name: smem[name].at[warpgroup] for name in ("parts", "written", "read")}
            _add_over_warpgroups(total, count, turn, finish, others=c.k_warpgroups - 1, **shared)
        return position + (last - first)

    for_each_tile(plan, "split", visit)

    def end():
        if c.split_k > 1:  # A block must outlive the arrivals of its peers.
            plgpu.barrier_wait(smem["free"].at[warpgroup])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if c.k_warpgroups == 1:
        end()
    else:
        pl.when(turn == 0)(end)
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(smem["read"].at[warpgroup]))


def _add_over_warpgroups(total, count, turn, finish, *, others: int, parts, written, read):
    """Add what the warpgroups of the same outputs hold, in a fixed order; the first of them calls `finish(sum)`."""

    @pl.when(turn > 0)
    def _write():
        pl.when(count > 0)(lambda: plgpu.barrier_wait(read))
        parts.at[turn - 1][...] = total
        plgpu.barrier_arrive(written)

    @pl.when(turn == 0)
    def _add():
        plgpu.barrier_wait(written)
        value = total
        for other in range(others):
            value = value + plgpu.load(parts.at[other], layout=plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(read)
        finish(value)


def _store(plan: _Plan, warpgroup, weight, out, smem, first_n, first_m, value, column: int):
    """Write `[64 outputs, tokens]`, the tile's tokens from a column on, to `out`, a piece of tokens at a time."""
    _, scale, _, bias = weight

    def per_output(vector):
        row = plgpu.load(vector, layout=ROWS, optimized=False).astype(jnp.float32)
        return lax.broadcast_in_dim(row, (TILE, plan.piece_m), (0,))

    for i, start in enumerate(range(0, value.shape[1], plan.piece_m)):
        piece = value[:, start : start + plan.piece_m].astype(jnp.float32)
        if plan.x_bytes == 1:
            tokens = smem["x_scale"].at[warpgroup, pl.ds(column + start, plan.piece_m)]
            tokens = plgpu.load(tokens, layout=COLUMNS, optimized=False) * (1.0 / plan.code_factor)
            piece = piece * lax.broadcast_in_dim(tokens, piece.shape, (1,))
        if not plan.ring_scales:
            piece = piece * per_output(scale.at[0, pl.ds(first_n, TILE)])
        if bias is not None:
            piece = piece + per_output(bias.at[pl.ds(first_n, TILE)])
        staging = smem["out"].at[warpgroup, i % plan.stagings]
        plgpu.wait_smem_to_gmem(plan.stagings - 1, wait_read_only=True)
        where = pl.ds(first_m + column + start, plan.piece_m), pl.ds(first_n, TILE)
        if plan.transposed_out:
            staging[...] = piece.astype(plan.out_dtype)
            where = where[::-1]
        else:
            staging.T[...] = piece.astype(plan.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out.at[*where])
