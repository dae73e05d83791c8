"""Quantized flash attention for Hopper: one TMA warp feeds three or four warpgroups that multiply.

Each block computes 64 queries per consumer warpgroup. A warpgroup quantizes its own queries, then for every tile of
keys: scores = Q K^T (int8 or e4m3, wgmma), online softmax in base 2, P rounded in registers, P V (wgmma).

Three things keep the arithmetic around the products small, since it and the 512 cycles of exponentials per 64 x 128
tile, not the products, are what limit the kernel:
- adding the bit pattern of 1.5 * 2^23 to an int32 product makes it the float32 1.5 * 2^23 + product; that constant
  leaves through the additive term of the exponent's FMA;
- a scale per query and per keys that one lane holds makes dequantization, the softmax scale and the subtraction of the
  maximum that one FMA;
- 8-bit P V goes to a fresh accumulator per tile, and the sum's rescaling by exp2(old maximum - new maximum) is the same
  FMA that adds it: two-level accumulation (the tensor cores keep about 14 bits for fp8) costs nothing. Nor does a scale
  of the values per tile: the sum is kept in units of the latest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels.attention.config import ROWS, Config
from pallas_kernels.attention.plan import Block, Operands, Plan, Shared
from pallas_kernels.attention.quantize import LOG2_E, Keys, Values
from pallas_kernels.attention.reference import Window, formats
from pallas_kernels.attention.registers import (
    PER_COLUMN,
    PER_ROW,
    TILE,
    along_columns,
    along_rows,
    sum_of_parts,
)
from pallas_kernels.attention.steps import (
    add_values,
    hide,
    quantize_rows,
    scale_rows,
    scores,
    softmax,
    softmax_of_halves,
)

# Of scores in float32 and float16; finite, so that a row of masked scores gives weights of 0 and not NaN.
LOWEST_MAXIMUM = {False: -1e30, True: -65000.0}
# Of a thread that computes or copies, by computing warpgroups.
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32), 4: (112, 32)}


def quantized_attention(
    q: jax.Array,
    keys: Keys | jax.Array,
    values: Values | jax.Array,
    lengths: tuple[jax.Array, jax.Array] | None,
    *,
    mode: str,
    kv_tokens: int,
    window: Window,
    scale: float,
    config: Config,
) -> jax.Array:
    """Runs the kernel.

    Args:
        q: [B, T, N, H] bfloat16 or float16, H of 64 or 128.
        keys: quantized keys in blocks of config.block_kv, smooth ones [B, K, S, H] for scores in float16, or K itself
            [B, S, K, H] for a mode with float scores.
        values: quantized values, tokens interleaved, or V itself [B, S, K, H] for a mode with float values.
        lengths: query and key lengths [B] int32, or None.
        mode: a key of MODES.
        kv_tokens: S, without padding.
        window: visible keys left and right of a query.
        scale: the softmax scale.
        config: tile shapes.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    batch, tokens, heads, head_dim = q.shape
    k, k_scale = keys if isinstance(keys, Keys) else (keys, None)
    v, v_scale, v_block_scale = values if isinstance(values, Values) else (values, None, None)
    given = formats(mode, head_dim)
    kv_heads = k.shape[2 if given.scores is None else 1]
    plan = Plan(
        mode=given,
        batch=batch,
        tokens=tokens,
        kv_tokens=kv_tokens,
        heads=heads,
        heads_per_kv_head=heads // kv_heads,
        kv_head_bytes=(k.nbytes + v.nbytes) // (batch * kv_heads),
        window=window,
        scale=scale,
        config=config,
    )
    ones = np.ones((plan.sum_channels, config.block_kv), v.dtype) if plan.sum_channels else None
    call = plgpu.kernel(
        lambda operands, out, *scratch: _kernel(plan, operands, out, Shared(*scratch)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch(plan, q, k, v),
        grid=tuple(plan.grid.values()),
        grid_names=tuple(plan.grid),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return call(Operands(q, k, k_scale, v, v_scale, v_block_scale, lengths or (), ones))


def _scratch(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> Shared:
    """The types of the shared memory of one block."""
    config, head_dim = plan.config, q.shape[3]
    groups, block, stages = config.warpgroups, config.block_kv, config.stages
    barriers = functools.partial(plgpu.Barrier, num_barriers=stages)
    channels = head_dim + plan.sum_channels
    return Shared(
        q=tiled((groups, ROWS, head_dim), q.dtype),
        codes=None if plan.float_scores else tiled((groups, ROWS, head_dim), k.dtype),
        k=tiled((stages, block, head_dim), k.dtype),
        v=tiled((stages, *((block, head_dim) if plan.float_values else (channels, block))), v.dtype),
        q_ready=plgpu.Barrier(num_barriers=groups),
        k_ready=barriers(),
        v_ready=barriers(),
        k_free=barriers(num_arrivals=groups),
        v_free=barriers(num_arrivals=groups),
        ones_ready=plgpu.Barrier(num_arrivals=stages) if plan.sum_channels else None,
    )


def _kernel(plan: Plan, refs: Operands, out_ref, smem: Shared):
    """One block: warpgroups that compute, and a last one whose first warp copies for them."""
    block = Block(plan, refs)
    group, groups = lax.axis_index("warpgroup"), plan.config.warpgroups
    computing, copying = REGISTERS[groups]

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(computing, action="increase")
        _attend(plan, refs, out_ref, smem, block, group)

    @pl.when(group == groups)
    def _copy():
        plgpu.set_max_registers(copying, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: _copy_tiles(plan, refs, smem, block))


def _attend(plan: Plan, refs: Operands, out_ref, smem: Shared, block: Block, group):
    """Attention of one warpgroup's 64 queries: for every tile of keys QK, online softmax, PV."""
    tiles = block.tiles
    rows = smem.q.at[group]
    first_query = block.first_query + group * ROWS
    queries = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), PER_ROW) + first_query
    ours = block.batch, pl.ds(first_query, ROWS), block.head
    plgpu.copy_gmem_to_smem(refs.q.at[ours], rows, smem.q_ready.at[group])
    plgpu.barrier_wait(smem.q_ready.at[group])
    codes, q_scale = rows, None
    if not plan.float_scores:
        codes = smem.codes.at[group]
    if plan.half_scores:
        scale_rows(rows, codes, plan.scale * LOG2_E)
    elif plan.mode.scores is not None:
        q_scale = quantize_rows(rows, codes, plan.mode.scores) * (plan.scale * LOG2_E)

    def block_scale(tile, reciprocal: int):
        return refs.v_block_scale[block.batch, block.kv_head, tile, reciprocal]

    def step(tile, state):
        acc, maximum, total = state
        k_scale, rescale = None, None  # arrive while the scores are computed
        if plan.scaled_scores:
            k_scale = _per_column(refs.k_scale.at[block.batch, block.kv_head, tile])
        if not plan.float_values:
            rescale = block_scale(jnp.maximum(tile - 1, 0), 0) * block_scale(tile, 1)
        x = scores(plan, smem, codes, block.slot(tile))
        if tiles.masked:
            hidden = functools.partial(hide, plan, block, queries, tile)
            x = lax.cond(tiles.partly_seen(tile), hidden, lambda x: x, x)
        if plan.half_scores:
            p, decay, maximum = softmax_of_halves(plan, x, maximum)
        else:
            p, decay, maximum = softmax(plan, x, q_scale, k_scale, maximum)
        acc, total = add_values(plan, smem, block.slot(tile), p, decay, rescale, acc, total)
        return acc, maximum, total

    if plan.sum_channels:
        plgpu.barrier_wait(smem.ones_ready)
    acc = plgpu.layout_cast(jnp.zeros(rows.shape, jnp.float32), TILE)
    nothing = acc, _per_row(LOWEST_MAXIMUM[plan.half_scores]), _per_row(0.0)
    acc, _, total = lax.fori_loop(tiles.begin, tiles.end, step, nothing)
    total = total if plan.sum_channels else sum_of_parts(total)
    total = jnp.where((queries < block.q_length) & (total != 0.0), total, jnp.inf)  # nothing seen: zeros
    out = acc * along_rows(1.0 / total, acc)
    if refs.lengths:  # a query past the length may be NaN
        out = jnp.where(along_rows(queries < block.q_length, out), out, 0.0)
    if not plan.float_values:
        out = out * block_scale(jnp.maximum(tiles.end - 1, 0), 0)
        out = out * along_columns(_per_column(refs.v_scale.at[block.batch, block.kv_head]), out)
    rows[...] = out.astype(out_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows, out_ref.at[ours])
    plgpu.wait_smem_to_gmem(0)


def _copy_tiles(plan: Plan, refs: Operands, smem: Shared, block: Block):
    """The producer: keys and values of every tile, each as soon as its stage is free."""
    config, tiles = plan.config, block.tiles
    if plan.sum_channels:
        for stage in range(config.stages):
            ones = smem.v.at[stage, pl.ds(refs.v.shape[2], plan.sum_channels)]
            plgpu.copy_gmem_to_smem(refs.ones, ones, smem.ones_ready)

    @pl.loop(tiles.begin, tiles.end)
    def _(tile):
        slot = block.slot(tile)
        keys = pl.ds(tile * config.block_kv, config.block_kv)
        refill = tile - tiles.begin >= config.stages
        head = block.batch, block.kv_head
        pl.when(refill)(lambda: plgpu.barrier_wait(smem.k_free.at[slot]))
        index = (block.batch, keys, block.kv_head) if plan.float_scores else (*head, keys)
        plgpu.copy_gmem_to_smem(refs.k.at[index], smem.k.at[slot], smem.k_ready.at[slot])
        pl.when(refill)(lambda: plgpu.barrier_wait(smem.v_free.at[slot]))
        index = (block.batch, keys, block.kv_head) if plan.float_values else (*head, slice(None), keys)
        values = smem.v.at[slot, pl.ds(0, refs.v.shape[2])] if plan.sum_channels else smem.v.at[slot]
        plgpu.copy_gmem_to_smem(refs.v.at[index], values, smem.v_ready.at[slot])


def _per_column(ref):
    return plgpu.load(ref, layout=PER_COLUMN, optimized=False)


def _per_row(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)
