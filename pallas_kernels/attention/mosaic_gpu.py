"""Quantized flash attention for Hopper: one TMA warp feeds warpgroups that multiply in turn.

Each block computes 64 queries per consumer warpgroup. A warpgroup quantizes its own queries, then for every tile of
keys: scores = Q K^T (int8 or e4m3, wgmma), online softmax in base 2, P rounded in registers, P V (wgmma).

Three things keep the arithmetic around the products small, since it and the 512 cycles of exponentials per 64 x 128
tile, not the products, are what limit the kernel:
- adding the bit pattern of 1.5 * 2^23 to an int32 product makes it the float32 1.5 * 2^23 + product; that constant
  leaves through the additive term of the exponent's FMA;
- a scale per query and per keys that one lane holds makes dequantization, the softmax scale and the subtraction of the
  maximum that one FMA;
- 8-bit P V goes to a fresh accumulator per tile, and the sum's rescaling by exp2(old maximum - new maximum) is the same
  FMA that adds it: two-level accumulation (the tensor cores keep about 14 bits for fp8) costs nothing.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels.attention.config import ROWS, SUM_CHANNELS, Config
from pallas_kernels.attention.quantize import (
    INT8,
    LARGEST_CODE,
    LOG2_E,
    SMALLEST_ABSMAX,
    Keys,
    Values,
)
from pallas_kernels.attention.quantize_mosaic_gpu import round_in_place
from pallas_kernels.attention.reference import MODES, Mode, Window
from pallas_kernels.attention.registers import (
    MAGIC,
    MAGIC_BITS,
    PER_COLUMN,
    PER_ROW,
    TILE,
    along_columns,
    along_rows,
    keep_columns,
    largest_of_columns,
    powers_of_two,
    repeat_columns,
    round_to_operand,
    split_columns,
    sum_of_own_columns,
    sum_of_parts,
)
from pallas_kernels.attention.tiles import key_tiles, visible_columns

LOWEST_MAXIMUM = -1e30  # finite, so that a row of masked scores gives weights of 0 and not NaN
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}  # of a thread that computes or copies, by computing warpgroups


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
        keys: quantized keys in blocks of config.block_kv, or K itself [B, S, K, H] for a mode with float scores.
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
    batch, tokens, heads, _ = q.shape
    k, k_scale = keys if isinstance(keys, Keys) else (keys, None)
    v, v_scale = values if isinstance(values, Values) else (values, None)
    kv_heads = k.shape[2 if k_scale is None else 1]
    plan = _Plan(MODES[mode], tokens, kv_tokens, heads // kv_heads, window, scale, config)
    ones = jnp.ones((SUM_CHANNELS, config.block_kv), v.dtype) if config.sum_by_product else None
    call = plgpu.kernel(
        lambda operands, out, *scratch: _kernel(plan, operands, out, _Shared(*scratch)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch(plan, q, k, v),
        grid=(heads, batch, pl.cdiv(tokens, plan.rows)),
        grid_names=("head", "batch", "query_tile"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return call(_Operands(q, k, k_scale, v, v_scale, lengths or (), ones))


def _scratch(plan: "_Plan", q: jax.Array, k: jax.Array, v: jax.Array) -> "_Shared":
    """The types of the shared memory of one block."""
    config, head_dim = plan.config, q.shape[3]
    groups, block, stages = config.warpgroups, config.block_kv, config.stages
    barriers = functools.partial(plgpu.Barrier, num_barriers=stages)
    channels = head_dim + (SUM_CHANNELS if config.sum_by_product else 0)
    return _Shared(
        q=tiled((groups, ROWS, head_dim), q.dtype),
        codes=None if plan.float_scores else tiled((groups, ROWS, head_dim), k.dtype),
        k=tiled((stages, block, head_dim), k.dtype),
        v=tiled((stages, *((block, head_dim) if plan.float_values else (channels, block))), v.dtype),
        q_ready=plgpu.Barrier(num_barriers=groups),
        k_ready=barriers(),
        v_ready=barriers(),
        k_free=barriers(num_arrivals=groups),
        v_free=barriers(num_arrivals=groups),
        turn=plgpu.Barrier(num_arrivals=groups),
        ones_ready=plgpu.Barrier(num_arrivals=stages) if config.sum_by_product else None,
    )


class _Shared(NamedTuple):
    """Shared memory and barriers of one block, in the order in which they are allocated."""

    q: Any  # queries as they come, outputs as they go
    codes: Any  # of queries, None for float scores
    k: Any
    v: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any
    ones_ready: Any  # None where weights are not summed by a product


class _Operands(NamedTuple):
    """Arrays in global memory: no scale of what stays float, no lengths where there are none."""

    q: Any
    k: Any
    k_scale: Any
    v: Any
    v_scale: Any
    lengths: tuple
    ones: Any  # [8, block_kv], None where weights are not summed by a product


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a launch."""

    mode: Mode
    tokens: int
    kv_tokens: int
    heads_per_kv_head: int
    window: Window
    scale: float
    config: Config

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.config.warpgroups * ROWS

    @property
    def float_scores(self) -> bool:
        """Whether Q K is computed in their own format."""
        return self.mode.scores is None

    @property
    def float_values(self) -> bool:
        """Whether P V is computed in V's own format."""
        return self.mode.values is None

    @property
    def offset(self) -> float:
        """How much larger than the products of codes the scores are."""
        return MAGIC if self.mode.scores == INT8 else 0.0


class _Block:
    """What one block computes: 64 queries of one head for each consumer warpgroup."""

    def __init__(self, plan: _Plan, refs: _Operands):
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("head")
        self.kv_head = lax.div(self.head, jnp.int32(plan.heads_per_kv_head))
        # The last queries of a causal head see the most keys: longest first fills the machine best.
        query_tile = lax.axis_size("query_tile") - 1 - lax.axis_index("query_tile")
        self.first_query = query_tile * plan.rows
        every = jnp.int32(plan.tokens), jnp.int32(plan.kv_tokens)
        self.q_length, self.kv_length = (ref[self.batch] for ref in refs.lengths) if refs.lengths else every
        block = plan.config.block_kv
        aligned = not refs.lengths and plan.kv_tokens % block == 0
        self.tiles = key_tiles(
            self.first_query, plan.rows, self.q_length, self.kv_length, plan.window, block, aligned=aligned
        )
        self.stages = plan.config.stages

    def slot(self, tile):
        """The stage that a tile is copied to."""
        return lax.rem(tile - self.tiles.begin, jnp.int32(self.stages))


def _kernel(plan: _Plan, refs: _Operands, out_ref, smem: _Shared):
    """One block: warpgroups that compute, and a last one whose first warp copies for them."""
    block = _Block(plan, refs)
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


def _attend(plan: _Plan, refs: _Operands, out_ref, smem: _Shared, block: _Block, group):
    """Attention of one warpgroup's 64 queries: for every tile of keys QK, online softmax, PV."""
    config, tiles = plan.config, block.tiles
    rows = smem.q.at[group]
    first_query = block.first_query + group * ROWS
    queries = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), PER_ROW) + first_query
    ours = block.batch, pl.ds(first_query, ROWS), block.head
    plgpu.copy_gmem_to_smem(refs.q.at[ours], rows, smem.q_ready.at[group])
    plgpu.barrier_wait(smem.q_ready.at[group])
    codes, q_scale = rows, None
    if plan.mode.scores is not None:
        codes = smem.codes.at[group]
        q_scale = _quantize_rows(rows, codes, plan.mode.scores) * (plan.scale * LOG2_E)
    if config.ping_pong:
        pl.when(group == 1)(lambda: _pass_turn(smem.turn))

    def step(tile, state):
        acc, maximum, total = state
        k_scale = None
        if not plan.float_scores:  # arrives while the scores are computed
            k_scale = _per_column(refs.k_scale.at[block.batch, block.kv_head, tile])
        x = _scores(plan, smem, codes, block.slot(tile))
        if tiles.masked:
            hide = functools.partial(_hide, plan, block, queries, tile)
            x = lax.cond(tiles.partly_seen(tile), hide, lambda x: x, x)
        p, decay, maximum = _softmax(plan, x, q_scale, k_scale, maximum)
        if not config.sum_by_product:
            total = total * decay + sum_of_own_columns(p)
        acc, total = _add_values(plan, smem, block.slot(tile), p, decay, acc, total)
        return acc, maximum, total

    head_dim = rows.shape[1]
    channels = head_dim
    if config.sum_by_product:
        channels += SUM_CHANNELS
        plgpu.barrier_wait(smem.ones_ready)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, channels), jnp.float32), TILE)
    acc, _, total = lax.fori_loop(tiles.begin, tiles.end, step, (acc, _per_row(LOWEST_MAXIMUM), _per_row(0.0)))
    acc, total = split_columns(acc, head_dim) if config.sum_by_product else (acc, sum_of_parts(total))
    if config.ping_pong:
        pl.when(group == 0)(lambda: _pass_turn(smem.turn))

    total = jnp.where((queries < block.q_length) & (total != 0.0), total, jnp.inf)  # nothing seen: zeros
    out = acc * along_rows(1.0 / total, acc)
    if refs.lengths:  # a query past the length may be NaN
        out = jnp.where(along_rows(queries < block.q_length, out), out, 0.0)
    if refs.v_scale is not None:
        out = out * along_columns(_per_column(refs.v_scale.at[block.batch, block.kv_head]), out)
    rows[...] = out.astype(out_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows, out_ref.at[ours])
    plgpu.wait_smem_to_gmem(0)


def _copy_tiles(plan: _Plan, refs: _Operands, smem: _Shared, block: _Block):
    """The producer: keys and values of every tile, each as soon as its stage is free."""
    config, tiles = plan.config, block.tiles
    if config.sum_by_product:
        for stage in range(config.stages):
            ones = smem.v.at[stage, pl.ds(refs.v.shape[2], SUM_CHANNELS)]
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
        values = smem.v.at[slot, pl.ds(0, refs.v.shape[2])] if config.sum_by_product else smem.v.at[slot]
        plgpu.copy_gmem_to_smem(refs.v.at[index], values, smem.v_ready.at[slot])


def _scores(plan: _Plan, smem: _Shared, codes, slot):
    """Products of queries or their codes and a tile of keys or theirs [ROWS, block_kv], `plan.offset` too large."""
    plgpu.barrier_wait(smem.k_ready.at[slot])

    def multiply(scores_ref):
        plgpu.wgmma(scores_ref, codes, smem.k.at[slot].T)
        if plan.config.ping_pong:
            _pass_turn(smem.turn)

    x = fresh_product(multiply, (ROWS, plan.config.block_kv), plan.mode.scores)
    plgpu.barrier_arrive(smem.k_free.at[slot])
    return x


def _hide(plan: _Plan, block: _Block, queries, tile, x):
    """Scores of keys that a query does not see become -inf."""
    bounds = visible_columns(queries, tile, block.kv_length, plan.window, plan.config.block_kv)
    return keep_columns(x, *bounds)


def _softmax(plan: _Plan, x, q_scale, k_scale, maximum):
    """Weights of one tile's scores against the running maximum, what to decay earlier sums by, and the new maximum.

    Dequantization, softmax scale, offset, maximum and the fixed scale of 8-bit weights are one FMA per score.
    """
    log_scale = 0.0 if plan.mode.values is None else math.log2(LARGEST_CODE[plan.mode.values])
    largest = largest_of_columns(x, as_integers=plan.config.maxima_of_three)
    if plan.float_scores:
        step_size = plan.scale * LOG2_E
        new_maximum = jnp.maximum(maximum, jnp.max(largest, axis=1) * step_size)
        y = x * step_size + along_rows(log_scale - new_maximum, x)
    else:
        step_size = along_rows(q_scale, largest) * along_columns(k_scale, largest)
        new_maximum = jnp.maximum(maximum, jnp.max((largest - plan.offset) * step_size, axis=1))
        shift = log_scale - plan.offset * step_size
        shift = shift - along_rows(new_maximum, shift)
        columns = x.shape[1]
        y = x * repeat_columns(step_size, columns) + repeat_columns(shift, columns)
    p = powers_of_two(y, plan.config.exponentials_by_polynomial)
    decay = jnp.exp2(maximum - new_maximum)
    return p, decay, new_maximum


def _add_values(plan: _Plan, smem: _Shared, slot, p, decay, acc, total):
    """The decayed sum plus P V of one tile; `total` passes through, to be computed before the product."""
    dtype = plan.mode.values
    if dtype is None:
        weights, acc = p.astype(smem.v.dtype), acc * along_rows(decay, acc)
        weights, acc, total = lax.optimization_barrier((weights, acc, total))
    else:
        weights = round_to_operand(p, dtype)
    if plan.config.ping_pong:
        plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.v_ready.at[slot])
    if plan.config.ping_pong:
        plgpu.barrier_wait(smem.turn)
    if dtype is None:
        acc = added_product(lambda ref: plgpu.wgmma(ref, weights, smem.v.at[slot]), acc)
    else:
        part = fresh_product(lambda ref: plgpu.wgmma(ref, weights, smem.v.at[slot].T), acc.shape, dtype)
        acc = acc * along_rows(decay, acc) + (part - MAGIC if dtype == INT8 else part)
    plgpu.barrier_arrive(smem.v_free.at[slot])
    return acc, total


def _pass_turn(turn):
    """Lets the other warpgroup use the tensor cores, and waits until it has."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def fresh_product(multiply, shape: tuple[int, int], dtype: jnp.dtype | None):
    """A product in a fresh accumulator, as float32; one of int8 operands is MAGIC too large.

    It starts from a constant, written before its operands are there: ptxas drops zeros that are a constant, while those
    of a scoped accumulator cost 64 moves right before each product, and 64 additions right after an int8 one.
    """
    constant = jnp.full(shape, MAGIC_BITS, jnp.int32) if dtype == INT8 else jnp.zeros(shape, jnp.float32)
    product = pl.run_state(multiply)(plgpu.ACC.init(plgpu.layout_cast(constant, TILE)))
    return lax.bitcast_convert_type(product, jnp.float32)  # pyright: ignore[reportArgumentType] - an array by now


def added_product(multiply, acc):
    """A product added to acc."""
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def _quantize_rows(q_ref, codes_ref, dtype: jnp.dtype):
    """Quantizes queries per token within shared memory; returns their scales."""
    q = plgpu.load(q_ref, layout=TILE).astype(jnp.float32)
    absmax = jnp.maximum(jnp.max(jnp.abs(q), axis=1), SMALLEST_ABSMAX)
    q = q * along_rows(LARGEST_CODE[dtype] / absmax, q)
    codes_ref[...] = round_in_place(q, dtype)
    plgpu.commit_smem()
    return absmax * (1 / LARGEST_CODE[dtype])


def _per_column(ref):
    return plgpu.load(ref, layout=PER_COLUMN, optimized=False)


def _per_row(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)
