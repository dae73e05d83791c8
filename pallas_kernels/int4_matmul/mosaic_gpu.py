"""The Hopper int4 kernel: weights unpacked into registers feed wgmma while the copy engine streams what comes next.

The product is computed transposed, `out^T = W^T x^T`, so that the outputs N fill the 64 rows that wgmma insists on
and the tokens its flexible side (8 to 256). One kernel serves both regimes; a `Config` says how it is cut:

- A persistent block walks over tiles of `block_m` tokens by `block_n` outputs. One warp drives the copy engine
  through a ring of stages that runs on across tiles, so that memory never idles at a tile's end; each compute
  warpgroup owns 64 of the outputs.
- Few tokens (memory-bound): codes enter the product as integers and each group's product is scaled after it. The
  blocks of a cluster split K; their partial sums meet in distributed shared memory and are added in a fixed order.
- Many tokens (compute-bound): weights are scaled before the product, and the unpacking of one tile runs under the
  product of the one before. Blocks of a cluster that lie side by side share x: each fetches a part of it for all.

- Several weights that take the same x (q, k and v) are one launch: their output tiles are counted on from one weight
  to the next, so that a block finds more to do before it ends.

Ragged tiles cost nothing: the copy engine fills reads out of bounds with zeros and drops such writes. Only a token
count over 8 that is no multiple of 8 is padded to one outside the kernel, and the inputs of a per-channel weight to a
multiple of 64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_matmul.config import Config, num_clusters, products_k
from pallas_kernels.int4_matmul.layout import CODE_OFFSET, TILE
from pallas_kernels.int4_matmul.operand import MAGIC, ROWS, unpack_int4

# Registers a thread keeps, per number of compute warpgroups: what the copying warpgroup gives back of its share at
# launch (168, 128, 96) pays for what the others take, in steps of 8.
_COMPUTE_REGISTERS = {2: 232, 3: 152, 4: 112}
_COPY_REGISTERS = {2: 40, 3: 40, 4: 24}


def int4_matmul_mosaic_gpu(x, weights, *, config: Config) -> tuple[jax.Array, ...]:
    """Launch the kernel once: `x` `[M, K]` times each weight `(qweight, scale, zero_point | None, bias | None)`.

    The weights have the same groups and the same dtype of scales, and all or none of them zero points.

    Returns:
      `[M, N padded to 64]` for each weight.
    """
    tokens, k = x.shape
    num_groups = weights[0][1].shape[0]
    if tokens > 8 or k % TILE:  # The copy engine addresses x in tiles of 8 rows by 64 (groups of 32: by 32) inputs.
        depth = TILE if num_groups == 1 else min(TILE, k // num_groups)
        x = jnp.pad(x, ((0, -tokens % 8 if tokens > 8 else 0), (0, -k % depth)))
    plan = _Plan(x, weights, config)
    kernel = plgpu.kernel(
        functools.partial(_body, plan, jax.tree.structure(weights)),
        out_type=[jax.ShapeDtypeStruct((x.shape[0], qweight.shape[0] * TILE), x.dtype) for qweight, *_ in weights],
        grid=(plan.num_clusters,),
        grid_names=("tile",),
        cluster=(config.split_k, config.multicast),
        cluster_names=("split", "peer"),
        num_threads=config.num_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    outs = kernel(x, *jax.tree.leaves(weights))
    return tuple(out if x.shape[0] == tokens else out[:tokens] for out in outs)


class _Plan:
    """The static geometry of one launch."""

    def __init__(self, x, weights, config):
        m, k = x.shape
        _, scale, zero_point, _ = weights[0]
        num_groups = scale.shape[0]
        self.config, self.dtype, self.scale_dtype = config, x.dtype, scale.dtype
        self.has_zero_point = zero_point is not None
        # The output tiles of all weights are numbered through; a tile belongs to one.
        counts = [pl.cdiv(qweight.shape[0], config.num_warpgroups) for qweight, *_ in weights]
        self.first_tiles = list(itertools.accumulate(counts[:-1], initial=0))
        self.m_tiles, self.n_tiles = pl.cdiv(m, config.block_m), sum(counts)
        self.k_steps = pl.cdiv(k, config.block_k)
        self.group_size = k // num_groups if num_groups > 1 else pl.cdiv(k, config.block_k) * config.block_k
        self.scale_rows = max(1, config.block_k // self.group_size)
        # Inputs that share a scale inside a stage, and inputs of one call of wgmma.
        self.group_k = min(self.group_size, config.block_k)
        self.wgmma_k = products_k(config.block_k, self.group_size)
        self.chunks = config.chunks
        self.chunk_m = config.block_m // config.chunks
        self.piece_m = min(self.chunk_m, 64)
        self.stagings = min(2, self.chunk_m // self.piece_m)
        # Peers take output tiles that lie side by side.
        self.shape = self.m_tiles, pl.cdiv(self.n_tiles, config.multicast)
        self.num_clusters = min(
            num_clusters(config.split_k * config.multicast, config.blocks_per_sm), self.shape[0] * self.shape[1]
        )

    def tile(self, index):
        """Token and output tile of a block, from the linear index of its cluster's tiles."""
        if self.m_tiles == 1:
            m_tile, n_tile = jnp.int32(0), index
        else:
            m_tile, n_tile = plgpu.planar_snake(index, self.shape, 1, self.config.snake_width)
        return m_tile, n_tile * self.config.multicast + lax.axis_index("peer")

    def in_weight(self, n_tile, visit):
        """Call `visit(weight, tile of that weight)` for the weight that an output tile belongs to."""
        ends = [*self.first_tiles[1:], None]
        for weight, (first, end) in enumerate(zip(self.first_tiles, ends, strict=True)):
            here = functools.partial(visit, weight, n_tile - first)
            if first == 0 and end is None:
                here()
            elif end is None:
                pl.when(n_tile >= first)(here)
            else:
                pl.when((n_tile >= first) & (n_tile < end))(here)

    def scratch(self):
        """Shared memory and barriers, by name."""
        c, stages = self.config, self.config.num_stages
        rows = (stages, self.scale_rows, c.block_n)
        scratch = {
            "x": _tiled((stages, c.block_m, c.block_k), self.dtype, self.wgmma_k),
            "w": plgpu.SMEM((stages, c.num_warpgroups, c.block_k // TILE, 2, 256), jnp.int32),
            "scale": plgpu.SMEM(rows, self.scale_dtype),
            "zero": plgpu.SMEM(rows, self.scale_dtype) if self.has_zero_point else None,
            "out": _tiled((c.num_warpgroups, self.stagings, self.piece_m, TILE), self.dtype, TILE),
            "full": plgpu.Barrier(num_arrivals=3 + self.has_zero_point, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=c.num_warpgroups, num_barriers=stages),
        }
        if c.multicast > 1:  # A stage is empty when it is so in every block that the copy goes to.
            scratch["empty"] = plgpu.ClusterBarrier(
                collective_axes=("peer",), num_arrivals=c.num_warpgroups, num_barriers=stages
            )
        if c.split_k > 1:
            scratch |= {
                "partial": _tiled(
                    (c.num_warpgroups, c.split_k - 1, TILE, self.chunk_m), jnp.float32, min(self.chunk_m, 32)
                ),
                "arrived": plgpu.Barrier(num_arrivals=c.split_k - 1, num_barriers=c.num_warpgroups),
                "free": plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=c.num_warpgroups),
            }
        return scratch


def _tiled(shape, dtype, columns: int):
    """Shared memory in the swizzled tiles that wgmma and the copy engine read without bank conflicts."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _body(plan: _Plan, weights_tree, x, *refs):
    """One block: its last warpgroup copies, the others compute."""
    count = weights_tree.num_leaves
    weights, outs = jax.tree.unflatten(weights_tree, refs[:count]), refs[count:]
    compute = plan.config.num_warpgroups

    def scoped(smem):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == compute)
        def _copy():
            if compute in _COPY_REGISTERS:
                plgpu.set_max_registers(_COPY_REGISTERS[compute], action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(lambda: _copy_tiles(plan, x, weights, smem))

        @pl.when(warpgroup < compute)
        def _compute():
            if compute in _COMPUTE_REGISTERS:
                plgpu.set_max_registers(_COMPUTE_REGISTERS[compute], action="increase")
            _compute_tiles(plan, warpgroup, [bias for *_, bias in weights], outs, smem)

    pl.run_scoped(scoped, plan.scratch(), collective_axes="warpgroup")


def _for_each_tile(plan: _Plan, visit):
    """Call `visit(count, m_tile, n_tile, first_step, last_step, position)`, which returns the ring's next position.

    Returns:
      The position after the last tile.
    """
    cluster, rank = lax.axis_index("tile"), lax.axis_index("split")
    split = plan.config.split_k
    first, last = lax.div(rank * plan.k_steps, split), lax.div((rank + 1) * plan.k_steps, split)
    tiles = plan.shape[0] * plan.shape[1]
    count = lax.div(tiles - cluster + plan.num_clusters - 1, plan.num_clusters)

    def step(i, position):
        m_tile, n_tile = plan.tile(cluster + i * plan.num_clusters)
        return visit(i, m_tile, n_tile, first, last, position)

    return lax.fori_loop(0, count, step, jnp.int32(0))


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
        k_tiles = c.block_k // TILE
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
        plgpu.copy_gmem_to_smem(scale.at[rows, columns], smem["scale"].at[slot], full)
        if zero is not None:
            plgpu.copy_gmem_to_smem(zero.at[rows, columns], smem["zero"].at[slot], full)

    def visit(_, m_tile, n_tile, first, last, position):
        def stream(weight, tile):
            def stage(step, _):
                copy_stage(weight, m_tile, tile, step, position + (step - first))

            lax.fori_loop(first, last, stage, None)

        plan.in_weight(n_tile, stream)
        return position + (last - first)

    position = _for_each_tile(plan, visit)
    for slot in range(c.num_stages):  # Every phase of a barrier is waited for once.
        pl.when(position > slot)(lambda slot=slot: plgpu.barrier_wait(smem["empty"].at[slot]))


def _compute_tiles(plan: _Plan, warpgroup, biases, outs, smem):
    """Multiply this warpgroup's 64 outputs of every tile, reduce over the cluster, store."""
    c = plan.config
    product = _product_scaled_after if c.scale_after else _product_scaled_before

    def visit(count, m_tile, n_tile, first, last, position):
        acc = product(plan, warpgroup, smem, first, last, position)
        first_m = m_tile * c.block_m

        def store(value, first_m):
            def write(weight, tile):
                first_n, out = tile * c.block_n + warpgroup * TILE, outs[weight]
                put = functools.partial(_store, plan, warpgroup, biases[weight], out, smem, first_n, value, first_m)
                pl.when(first_n < out.shape[1])(put) if out.shape[1] % c.block_n else put()

            plan.in_weight(n_tile, write)

        if c.split_k == 1:
            store(acc, first_m)
        else:
            _reduce(plan, warpgroup, smem, count, acc, lambda chunk, q: store(chunk, first_m + q * plan.chunk_m))
        return position + (last - first)

    _for_each_tile(plan, visit)
    if c.split_k > 1:  # A block must outlive the arrivals of its peers.
        plgpu.barrier_wait(smem["free"].at[warpgroup])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _operands(plan: _Plan, warpgroup, smem, slot, group: int):
    """Row vectors `[64]` float32 of a group of the stage: the offset of its codes and its scale."""
    where = (slot, group, pl.ds(warpgroup * TILE, TILE))
    scale = plgpu.load(smem["scale"].at[where], layout=ROWS, optimized=False).astype(jnp.float32)
    hidden = float(MAGIC[jnp.dtype(plan.dtype).name] + CODE_OFFSET)
    if not plan.has_zero_point:
        return plgpu.layout_cast(jnp.full((TILE,), hidden, jnp.float32), ROWS), scale
    return plgpu.load(smem["zero"].at[where], layout=ROWS, optimized=False).astype(jnp.float32) + hidden, scale


def _multiply(plan: _Plan, warpgroup, smem, slot, first_k: int, acc, offset, scale):
    """Issue `acc += W^T x^T` over `wgmma_k` inputs of a stage."""
    tile, inside = divmod(first_k, TILE)
    weights = unpack_int4(
        smem["w"].at[slot, warpgroup, tile],
        offset,
        scale,
        first_step=inside // 16,
        depth=plan.wgmma_k,
        dtype=plan.dtype,
    )
    plgpu.wgmma(acc, weights, smem["x"].at[slot, :, pl.ds(first_k, plan.wgmma_k)].T)


def _release(plan: _Plan, empty):
    """Give a stage back to whoever copies into it."""
    if plan.config.multicast > 1:  # One warp tells the peers, for all: they must have read.
        _synchronize_warpgroup()
    plgpu.barrier_arrive(empty)


@plgpu.inline_mgpu()
def _synchronize_warpgroup(_=None):
    mgpu.utils.warpgroup_barrier()


def _product_scaled_after(plan: _Plan, warpgroup, smem, first, last, position):
    """Sum over groups of `scale * (integer product)`: one short product a group, scaled in float32."""
    c = plan.config

    def group_product(slot, group):
        offset, scale = _operands(plan, warpgroup, smem, slot, group)

        def multiply(part):
            for first_k in range(group * plan.group_k, (group + 1) * plan.group_k, plan.wgmma_k):
                _multiply(plan, warpgroup, smem, slot, first_k, part, offset, None)
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

    zeros = plgpu.layout_cast(jnp.zeros((TILE, c.block_m), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(first, last, stage, zeros)


def _product_scaled_before(plan: _Plan, warpgroup, smem, first, last, position):
    """One long product of scaled weights; a stage is given back when the next one's first product is under way.

    wgmma reads its weights from registers while the next ones are unpacked, so that two sets of registers alternate:
    a stage must hold an even number of products, or else the loop writes the very set that is being read.
    """
    c = plan.config

    def multiply(acc):
        def stage(step, _):
            at = position + (step - first)
            slot, before = lax.rem(at, jnp.int32(c.num_stages)), lax.rem(at - 1 + c.num_stages, jnp.int32(c.num_stages))
            plgpu.barrier_wait(smem["full"].at[slot])
            for first_k in range(0, c.block_k, plan.wgmma_k):
                offset, scale = _operands(plan, warpgroup, smem, slot, first_k // plan.group_k)
                _multiply(plan, warpgroup, smem, slot, first_k, acc, offset, scale)
                plgpu.wgmma_wait(1)
                if first_k == 0:
                    pl.when(step > first)(lambda: _release(plan, smem["empty"].at[before]))

        lax.fori_loop(first, last, stage, None)
        result = acc[...]
        pl.when(last > first)(
            lambda: _release(plan, smem["empty"].at[lax.rem(position + (last - first) - 1, jnp.int32(c.num_stages))])
        )
        return result

    return pl.run_scoped(multiply, plgpu.ACC((TILE, c.block_m), jnp.float32))


def _reduce(plan: _Plan, warpgroup, smem, count, acc, store):
    """Add the cluster's partial sums of a tile in a fixed order; the blocks take turns to own its chunks of tokens."""
    split = plan.config.split_k
    rank = lax.axis_index("split")
    pl.when(count > 0)(lambda: plgpu.barrier_wait(smem["free"].at[warpgroup]))
    owners = [lax.rem(count * plan.chunks + q, jnp.int32(split)) for q in range(plan.chunks)]
    pieces = [acc[:, q * plan.chunk_m : (q + 1) * plan.chunk_m] for q in range(plan.chunks)]
    for owner, piece in zip(owners, pieces, strict=True):

        @pl.when(rank != owner)
        def _send(owner=owner, piece=piece):
            place = lax.rem(rank - owner - 1 + split, jnp.int32(split))
            plgpu.async_store_smem(
                piece,
                smem["partial"].at[warpgroup, place],
                smem["arrived"].at[warpgroup],
                cluster_idx=owner,
                cluster_dim="split",
            )

    for q, (owner, piece) in enumerate(zip(owners, pieces, strict=True)):

        @pl.when(rank == owner)
        def _add(piece=piece, q=q):
            plgpu.barrier_wait(smem["arrived"].at[warpgroup])
            total = piece
            for place in range(split - 1):
                total = total + plgpu.load(smem["partial"].at[warpgroup, place], layout=plgpu.Layout.WGMMA)
            store(total, q)

    plgpu.commit_smem()  # All lanes have read before one of them says so.
    plgpu.barrier_arrive(smem["free"].at[warpgroup])


def _store(plan: _Plan, warpgroup, bias, out, smem, first_n, value, first_m):
    """Write `[64 outputs, tokens]` to `out[tokens, outputs]`, a piece of tokens at a time."""
    if bias is not None:
        row = plgpu.load(bias.at[pl.ds(first_n, TILE)], layout=ROWS, optimized=False).astype(jnp.float32)
        value = value + lax.broadcast_in_dim(row, value.shape, (0,))
    for i, start in enumerate(range(0, value.shape[1], plan.piece_m)):
        staging = smem["out"].at[warpgroup, i % plan.stagings]
        plgpu.wait_smem_to_gmem(plan.stagings - 1, wait_read_only=True)
        staging.T[...] = value[:, start : start + plan.piece_m].astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(first_m + start, plan.piece_m), pl.ds(first_n, TILE)])
