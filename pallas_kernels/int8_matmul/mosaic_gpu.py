"""The Hopper 8-bit kernel: both operands stream through shared memory into wgmma, scales wait for the sums.

One kernel serves both regimes; a `Config` says how it is cut, and which side of wgmma the tokens take. With many tokens
they fill the 64 rows of a wgmma and the outputs its flexible side; with few (`weights_first`) the outputs fill the
rows, so that a tile of 8 tokens wastes nothing, and the product comes out transposed.

- A persistent block walks over tiles. One warp drives the copy engine through a ring of stages that runs on across
  tiles; the compute warpgroups share nothing but the ring, so that one stores its part of a tile while another
  multiplies the next.
- int8 sums stay in the int32 accumulator over all of K. The fp8 tensor core keeps about 14 bits of a sum, so the
  product of at most 256 inputs is added to a float32 total in registers; block scales multiply it on the way.
- Blocks of a cluster either share the larger operand of their tiles (`multicast`: each fetches a part of it for all of
  them), or the inputs of one tile (`split_k`: partial sums meet in distributed shared memory and are added in a fixed
  order).

Ragged tiles cost nothing: the copy engine fills reads out of bounds with zeros and drops such writes.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._cluster_sum import add_over_cluster
from pallas_kernels._shared_memory import tiled
from pallas_kernels._tiles import WeightTiles, for_each_tile
from pallas_kernels._warpgroups import copy_and_compute
from pallas_kernels.int8_matmul.config import COPY_ALIGNMENT, Config, num_clusters, shares_x
from pallas_kernels.int8_matmul.layout import BLOCK
from pallas_kernels.int8_matmul.products import PER_COLUMN, PER_ROW, TILE, exact_product, promoted_product

_OF_A_WEIGHT = ("weight", "w_scale", "weight_sum", "bias")


def int8_matmul_mosaic_gpu(x, x_scale, x_zero_point, weights, *, out_dtype, config: Config) -> tuple[jax.Array, ...]:
    """Launch the kernel.

    Args:
        x: codes [M, K], K a multiple of 128.
        x_scale: float32 [M], [1], or [K / 128, M].
        x_zero_point: int32 [M], or None.
        weights: (codes [N, K], scale, sum | None, bias | None) of each, alike: N a multiple of 128, a scale of [N], [1]
            or, of one weight with such an x_scale, [K / 128, N / 128]; int32 sums [N] with x_zero_point.
        out_dtype: of the results.
        config: how to cut the problem.

    Returns:
        [M, N] for each weight.
    """
    tokens = x.shape[0]
    if tokens > 8:  # The copy engine addresses x in tiles of 8 rows.
        x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))
    if x_scale.ndim == 2:  # Its rows must be 16 bytes apart.
        x_scale = jnp.pad(x_scale, ((0, 0), (0, -tokens % 4)))
    (weight, w_scale, weight_sum, bias), *others = weights
    first = {
        "x": x,
        "weight": weight,
        "x_scale": x_scale,
        "w_scale": w_scale,
        "x_zero_point": x_zero_point,
        "weight_sum": weight_sum,
        "bias": bias,
    }
    first = {name: operand for name, operand in first.items() if operand is not None}
    own = [name for name in _OF_A_WEIGHT if name in first]
    rest = [operand for other in others for operand in other if operand is not None]
    plan = _Plan(first, [w[0].shape[0] for w in weights], jnp.dtype(out_dtype), config)

    def body(*refs):
        refs, outs = refs[: -len(weights)], refs[-len(weights) :]
        part, more = dict(zip(first, refs, strict=False)), iter(refs[len(first) :])
        _body(plan, [part, *(part | {name: next(more) for name in own} for _ in others)], outs)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((plan.m, w[0].shape[0]), plan.out_dtype) for w in weights],
        grid=(plan.num_clusters,),
        grid_names=("tile",),
        cluster=(config.cluster,),
        cluster_names=("peer",),
        num_threads=config.num_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    outs = kernel(*first.values(), *rest)
    return tuple(out[:tokens] for out in outs)


class _Plan:
    """The static geometry of one launch. Rows and columns are those of wgmma's accumulator."""

    def __init__(self, operands, outputs, out_dtype, config):
        x = operands["x"]
        self.config, self.dtype, self.out_dtype = config, x.dtype, out_dtype
        self.m, self.k = x.shape
        self.blocked = operands["x_scale"].ndim == 2
        self.promoted = x.dtype != jnp.int8 or self.blocked
        self.acc_dtype = jnp.float32 if x.dtype != jnp.int8 else jnp.int32
        # Vectors that a tile needs a stretch of, by the dimension they lie along; scalars are read where they are used.
        self.tile_vectors = {
            name: (config.block_m if name.startswith("x_") else config.block_n, value.dtype)
            for name, value in operands.items()
            if name == "bias" or (value.ndim == 1 and value.shape != (1,))
        }
        self.row_tiles = config.rows // config.num_warpgroups // TILE
        self.weights = WeightTiles([pl.cdiv(n, config.block_n) for n in outputs])
        self.m_tiles, self.n_tiles = pl.cdiv(self.m, config.block_m), self.weights.count
        self.k_steps = pl.cdiv(self.k, config.block_k)
        self.groups = config.block_k // BLOCK
        self.piece = config.piece(out_dtype)
        self.piece_shape = (self.piece, TILE) if config.weights_first else (TILE, self.piece)
        # The tiles of a multicast cluster lie side by side, so as to share the larger operand.
        self.shares_x = shares_x(config, self.m)
        if self.shares_x:
            self.shape = self.m_tiles, pl.cdiv(self.n_tiles, config.multicast)
        else:
            self.shape = pl.cdiv(self.m_tiles, config.multicast), self.n_tiles
        self.num_clusters = min(num_clusters(config.cluster), self.shape[0] * self.shape[1])

    def tile(self, index, rank):
        """Token and output tile of a block of a cluster, from the linear index of the cluster's tiles."""
        if self.shape[0] == 1:
            m_tile, n_tile = jnp.int32(0), index
        else:
            m_tile, n_tile = plgpu.planar_snake(index, self.shape, 1, self.config.snake_width)
        if self.config.multicast == 1:
            return m_tile, n_tile
        if self.shares_x:
            return m_tile, n_tile * self.config.multicast + rank
        return m_tile * self.config.multicast + rank, n_tile

    def steps(self, rank):
        """The first and the last step along the inputs that a block of the cluster takes."""
        split = self.config.split_k
        if split == 1:
            return jnp.int32(0), jnp.int32(self.k_steps)
        return lax.div(rank * self.k_steps, split), lax.div((rank + 1) * self.k_steps, split)

    def scratch(self):
        """Shared memory and barriers, by name."""
        c, stages = self.config, self.config.num_stages
        vectors = self.tile_vectors.items()
        scratch = {
            "x": tiled((stages, c.block_m, c.block_k), self.dtype),
            "weight": tiled((stages, c.block_n, c.block_k), self.dtype),
            "out": tiled((c.num_warpgroups, c.stagings(self.out_dtype), *self.piece_shape), self.out_dtype),
            "full": plgpu.Barrier(num_arrivals=2 + self.blocked, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=c.num_warpgroups, num_barriers=stages),
            "vectors": {name: plgpu.SMEM((2, _aligned(size, dtype)), dtype) for name, (size, dtype) in vectors},
        }
        if c.multicast > 1:
            scratch["empty"] = plgpu.ClusterBarrier(
                collective_axes=("peer",), num_arrivals=c.num_warpgroups, num_barriers=stages
            )
        if self.blocked:
            scratch["group_scale"] = plgpu.SMEM((stages, self.groups, c.block_m), jnp.float32)
        if vectors:
            scratch["vectors_full"] = plgpu.Barrier(num_arrivals=len(vectors), num_barriers=2)
            scratch["vectors_empty"] = plgpu.Barrier(num_arrivals=c.num_warpgroups, num_barriers=2)
        if c.split_k > 1:
            scratch |= {
                "partial": tiled((c.num_warpgroups, c.split_k - 1, TILE, c.chunk), jnp.float32),
                "arrived": plgpu.Barrier(num_arrivals=c.split_k - 1, num_barriers=c.num_warpgroups),
                "free": plgpu.ClusterBarrier(collective_axes=("peer",), num_barriers=c.num_warpgroups),
            }
        return scratch


def _aligned(size: int, dtype) -> int:
    """Elements from one slot of vectors to the next: the copy engine writes to multiples of 128 bytes."""
    per_line = COPY_ALIGNMENT // jnp.dtype(dtype).itemsize
    return -(-size // per_line) * per_line


def _body(plan: _Plan, parts, outs):
    """One block: its last warpgroup copies, the others compute. `parts` are the operands by name, for each weight."""
    copy_and_compute(
        plan.config.num_warpgroups,
        plan.scratch(),
        copy=lambda shared: _copy_tiles(plan, parts, shared),
        compute=lambda warpgroup, shared: _compute_tiles(plan, warpgroup, parts, outs, shared),
    )


def _copy_tiles(plan: _Plan, parts, smem):
    """Stream every stage of this block's tiles through the ring."""
    c = plan.config
    shared = ("peer",) if c.multicast > 1 else None
    x_peers, weight_peers = (shared, None) if plan.shares_x else (None, shared)

    def copy_stage(part, tokens, outputs, step, position):
        slot = lax.rem(position, jnp.int32(c.num_stages))
        pl.when(position >= c.num_stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
        inputs, full = pl.ds(step * c.block_k, c.block_k), smem["full"].at[slot]
        weight, x = part["weight"].at[outputs, inputs], part["x"].at[tokens, inputs]
        plgpu.copy_gmem_to_smem(weight, smem["weight"].at[slot], full, collective_axes=weight_peers)
        plgpu.copy_gmem_to_smem(x, smem["x"].at[slot], full, collective_axes=x_peers)
        if plan.blocked:
            groups = pl.ds(step * plan.groups, plan.groups)
            plgpu.copy_gmem_to_smem(part["x_scale"].at[groups, tokens], smem["group_scale"].at[slot], full)

    def copy_vectors(part, count, tokens, outputs):
        place = lax.rem(count, jnp.int32(2))
        pl.when(count >= 2)(lambda: plgpu.barrier_wait(smem["vectors_empty"].at[place]))
        for name, ref in smem["vectors"].items():
            along = tokens if name.startswith("x_") else outputs
            slot = ref.at[place, pl.ds(0, along.size)]
            plgpu.copy_gmem_to_smem(part[name].at[along], slot, smem["vectors_full"].at[place])

    def visit(count, m_tile, n_tile, first, last, position):
        def stream(weight, first_tile):
            tokens, tile = m_tile * c.block_m, n_tile - first_tile
            where = pl.ds(tokens, c.block_m), pl.ds(tile * c.block_n, c.block_n)
            if plan.tile_vectors:
                copy_vectors(parts[weight], count, *where)

            def stage(step, at):
                copy_stage(parts[weight], *where, step, at)
                return at + 1

            return lax.fori_loop(first, last, stage, position)

        reached = plan.weights.within(n_tile, stream)
        return position + (last - first) if reached is None else reached

    tiles, position = for_each_tile(plan, "peer", visit)
    _await_last(smem["empty"], position, c.num_stages)
    if plan.tile_vectors:
        _await_last(smem["vectors_empty"], tiles, 2)


def _await_last(barriers, count, slots: int):
    """Wait for the last arrivals at every slot: a block must outlive those of its peers."""

    @pl.loop(0, slots)
    def _(i):
        at = count - slots + i
        pl.when(at >= 0)(lambda: plgpu.barrier_wait(barriers.at[lax.rem(at, jnp.int32(slots))]))


def _compute_tiles(plan: _Plan, warpgroup, parts, outs, smem):
    """Multiply this warpgroup's rows of every tile, reduce over the cluster, scale, store."""
    c = plan.config
    product = promoted_product if plan.promoted else exact_product

    def visit(count, m_tile, n_tile, first, last, position):
        first_m, first_n = m_tile * c.block_m, n_tile * c.block_n
        totals = product(plan, warpgroup, parts[0], smem, first, last, position, first_n)  # blocks: of one weight only
        if plan.tile_vectors:
            plgpu.barrier_wait(smem["vectors_full"].at[lax.rem(count, jnp.int32(2))])
        for i, total in enumerate(totals):
            row = (warpgroup * plan.row_tiles + i) * TILE

            def store(value, column, row=row):
                def write(weight, first_tile):
                    where = row, first_m, first_n - first_tile * c.block_n
                    _store(plan, warpgroup, parts[weight], outs[weight], smem, count, *where, value, column)

                plan.weights.within(n_tile, write)

            if c.split_k == 1:
                store(total, 0)
            else:
                shared = {name: smem[name].at[warpgroup] for name in ("partial", "arrived", "free")}
                add_over_cluster(total, count, store, axis="peer", split=c.split_k, chunks=c.chunks, **shared)
        if plan.tile_vectors:
            plgpu.barrier_arrive(smem["vectors_empty"].at[lax.rem(count, jnp.int32(2))])
        return position + (last - first)

    for_each_tile(plan, "peer", visit)
    if c.split_k > 1:  # A block must outlive the arrivals of its peers.
        plgpu.barrier_wait(smem["free"].at[warpgroup])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(plan: _Plan, warpgroup, part, out, smem, count, row, first_m, first_n, total, column: int):
    """Scale 64 rows of sums from a column on, and write them out a piece at a time."""
    place, stagings = lax.rem(count, jnp.int32(2)), plan.config.stagings(plan.out_dtype)
    for i, start in enumerate(range(0, total.shape[1], plan.piece)):
        piece = _finish(plan, part, smem, place, row, column + start, total[:, start : start + plan.piece])
        staging = smem["out"].at[warpgroup, i % stagings]
        plgpu.wait_smem_to_gmem(stagings - 1, wait_read_only=True)
        if plan.config.weights_first:
            staging.T[...] = piece
            where = pl.ds(first_m + column + start, plan.piece), pl.ds(first_n + row, TILE)
        else:
            staging[...] = piece
            where = pl.ds(first_m + row, TILE), pl.ds(first_n + column + start, plan.piece)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out.at[*where])


def _finish(plan: _Plan, part, smem, place, row, column, total):
    """`(sum - zero point * weight sum) * x_scale * w_scale + bias`, in the result's dtype."""

    def along(name):
        if part[name].shape == (1,):
            return jnp.full(total.shape, part[name][0])
        on_rows = name.startswith("x_") != plan.config.weights_first
        where, layout = (pl.ds(row, TILE), PER_ROW) if on_rows else (pl.ds(column, plan.piece), PER_COLUMN)
        vector = plgpu.load(smem["vectors"][name].at[place, where], layout=layout, optimized=False)
        vector = vector if vector.dtype == jnp.int32 else vector.astype(jnp.float32)
        return lax.broadcast_in_dim(vector, total.shape, (0,) if on_rows else (1,))

    if "x_zero_point" in part:
        total = total - along("x_zero_point") * along("weight_sum")
    total = total.astype(jnp.float32)
    if not plan.blocked:
        total = total * along("x_scale") * along("w_scale")
    if "bias" in part:
        total = total + along("bias")
    return total.astype(plan.out_dtype)
