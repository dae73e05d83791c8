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

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels.attention.config import ROWS, Config
from pallas_kernels.attention.quantize import (
    INT8,
    LARGEST_CODE,
    LOG2_E,
    SMALLEST_ABSMAX,
    Keys,
    Values,
)
from pallas_kernels.attention.quantize_mosaic_gpu import round_in_place
from pallas_kernels.attention.reference import MODES, Window
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
    repeat_columns,
    round_to_operand,
    sum_of_own_columns,
    sum_of_parts,
)

LOWEST_MAXIMUM = -1e30  # finite, so that a row of masked scores gives weights of 0 and not NaN
UNBOUNDED = 1 << 29


def quantized_attention(
    q: jax.Array,
    keys: Keys,
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
        keys: quantized keys in blocks of config.block_kv.
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
    body = functools.partial(
        _kernel, mode=mode, tokens=tokens, kv_tokens=kv_tokens, window=window, scale=scale, config=config
    )
    operands = [q, keys.codes, keys.scale, *(values if isinstance(values, Values) else (values,)), *(lengths or ())]
    groups, rows = config.warpgroups, config.warpgroups * ROWS
    value_dtype = operands[3].dtype
    value_tile = (config.block_kv, head_dim) if MODES[mode].values is None else (head_dim, config.block_kv)
    barriers = functools.partial(plgpu.Barrier, num_barriers=config.stages)
    call = plgpu.kernel(
        lambda *refs: body(refs[: len(operands)], *refs[len(operands) :]),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            tiled((groups, ROWS, head_dim), q.dtype),
            tiled((groups, ROWS, head_dim), keys.codes.dtype),
            tiled((config.stages, config.block_kv, head_dim), keys.codes.dtype),
            tiled((config.stages, *value_tile), value_dtype),
            plgpu.Barrier(num_barriers=groups),
            barriers(),
            barriers(),
            barriers(num_arrivals=groups),
            barriers(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=groups),
        ],
        grid=(heads, batch, pl.cdiv(tokens, rows)),
        grid_names=("head", "batch", "query_tile"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return call(*operands)


def _kernel(
    operands,
    out_ref,
    q_smem,
    codes_smem,
    k_smem,
    v_smem,
    q_ready,
    k_ready,
    v_ready,
    k_free,
    v_free,
    turn,
    *,
    mode: str,
    tokens: int,
    kv_tokens: int,
    window: Window,
    scale: float,
    config: Config,
):
    """One block: 64 * warpgroups queries of one head."""
    q_ref, k_ref, k_scale_ref, v_ref, *rest = operands
    scores_dtype, values_dtype = MODES[mode]
    v_scale_ref = None if values_dtype is None else rest.pop(0)
    block, stages, groups = config.block_kv, config.stages, config.warpgroups
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[1]))
    # The last queries of a causal head see the most keys: longest first fills the machine best.
    query_tile = lax.axis_size("query_tile") - 1 - lax.axis_index("query_tile")
    first_query = query_tile * (groups * ROWS)
    q_length, kv_length = (ref[batch] for ref in rest) if rest else (jnp.int32(tokens), jnp.int32(kv_tokens))
    begin, full_begin, full_end, end = _key_tiles(
        first_query, groups * ROWS, q_length, kv_length, window, block, aligned=not rest and kv_tokens % block == 0
    )
    group = lax.axis_index("warpgroup")
    offset = MAGIC if scores_dtype == INT8 else 0.0

    @pl.when(group < groups)
    def _consumer():
        plgpu.set_max_registers(240 if groups < 3 else 160, action="increase")
        rows = q_smem.at[group], codes_smem.at[group]
        row_begin = first_query + group * ROWS
        queries = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), PER_ROW) + row_begin
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(row_begin, ROWS), head], rows[0], q_ready.at[group])
        plgpu.barrier_wait(q_ready.at[group])
        q_scale = _quantize_rows(*rows, scores_dtype) * (scale * LOG2_E)
        if config.ping_pong:
            pl.when(group == 1)(lambda: _pass_turn(turn))

        def key_scales(tile):
            return plgpu.load(k_scale_ref.at[batch, kv_head, tile], layout=PER_COLUMN, optimized=False)

        def slot_of(tile):
            return lax.rem(tile - begin, jnp.int32(stages))

        def hide(tile, x):
            """Scores of keys that a query does not see become -inf."""
            left, right = window
            query, last_key = queries - tile * block, kv_length - 1 - tile * block
            last = jnp.minimum(query + (UNBOUNDED if right is None else right), last_key)
            return keep_columns(x, None if left is None else query - left, last)

        def weigh(tile, x, maximum, total, k_scale):
            """The softmax of one tile of scores, against the running maximum."""
            if full_begin is not begin or full_end is not end:
                partly_seen = (tile < full_begin) | (tile >= full_end)
                x = lax.cond(partly_seen, functools.partial(hide, tile), lambda x: x, x)
            largest = largest_of_columns(x)
            step_size = along_rows(q_scale, largest) * along_columns(k_scale, largest)
            new_maximum = jnp.maximum(maximum, jnp.max((largest - offset) * step_size, axis=1))
            shift = (0.0 if values_dtype is None else math.log2(LARGEST_CODE[values_dtype])) - offset * step_size
            shift = shift - along_rows(new_maximum, shift)
            p = jnp.exp2(x * repeat_columns(step_size, block) + repeat_columns(shift, block))
            decay = jnp.exp2(maximum - new_maximum)
            return p, decay, new_maximum, total * decay + sum_of_own_columns(p)

        def multiply_values(tile, p, decay, acc, total):
            """Adds P V of one tile to the decayed sum."""
            slot = slot_of(tile)
            if values_dtype is None:
                weights, acc = p.astype(v_ref.dtype), acc * along_rows(decay, acc)
                weights, acc, total = lax.optimization_barrier((weights, acc, total))
            else:
                weights = round_to_operand(p, values_dtype)
            if config.ping_pong:
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            if config.ping_pong:
                plgpu.barrier_wait(turn)
            if values_dtype is None:
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[slot]))(plgpu.ACC.init(acc))
            else:
                part = _product(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[slot].T), acc.shape, values_dtype)
                acc = acc * along_rows(decay, acc) + (part - MAGIC if values_dtype == INT8 else part)
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, total

        def step(tile, carry):
            acc, maximum, total = carry
            k_scale = key_scales(tile)  # arrives while the scores are computed
            slot = slot_of(tile)
            plgpu.barrier_wait(k_ready.at[slot])

            def multiply_keys(scores_ref):
                plgpu.wgmma(scores_ref, rows[1], k_smem.at[slot].T)
                if config.ping_pong:
                    _pass_turn(turn)

            x = _product(multiply_keys, (ROWS, block), scores_dtype)
            plgpu.barrier_arrive(k_free.at[slot])
            p, decay, maximum, total = weigh(tile, x, maximum, total, k_scale)
            acc, total = multiply_values(tile, p, decay, acc, total)
            return acc, maximum, total

        def per_row(value):
            return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)

        acc = plgpu.layout_cast(jnp.zeros((ROWS, q_ref.shape[3]), jnp.float32), TILE)
        carry = acc, per_row(LOWEST_MAXIMUM), per_row(0.0)
        carry = lax.fori_loop(begin, end, step, carry)
        acc, _, total = carry
        total = sum_of_parts(total)
        if config.ping_pong:
            pl.when(group == 0)(lambda: _pass_turn(turn))

        total = jnp.where((queries < q_length) & (total != 0.0), total, jnp.inf)  # nothing seen: zeros
        out = acc * along_rows(1.0 / total, acc)
        if v_scale_ref is not None:
            v_scale = plgpu.load(v_scale_ref.at[batch, kv_head], layout=PER_COLUMN, optimized=False)
            out = out * along_columns(v_scale, out)
        rows[0][...] = out.astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows[0], out_ref.at[batch, pl.ds(row_begin, ROWS), head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == groups)
    def _producer():
        plgpu.set_max_registers(24 if groups < 3 else 32, action="decrease")

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                @pl.loop(begin, end)
                def _(tile):
                    slot = lax.rem(tile - begin, jnp.int32(stages))
                    keys = pl.ds(tile * block, block)
                    refill = tile - begin >= stages
                    pl.when(refill)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_ref.at[batch, kv_head, keys], k_smem.at[slot], k_ready.at[slot])
                    pl.when(refill)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    index = (batch, keys, kv_head) if values_dtype is None else (batch, kv_head, slice(None), keys)
                    plgpu.copy_gmem_to_smem(v_ref.at[index], v_smem.at[slot], v_ready.at[slot])


def _key_tiles(first_query, rows: int, q_length, kv_length, window: Window, block: int, *, aligned: bool):
    """Tiles [begin, end) that some of the queries see, of which [full_begin, full_end) need no mask.

    Bounds that need no masked tiles on their side are the same object, so that the loop over them is not emitted.
    """
    left, right = window
    last_query = first_query + rows - 1

    def tiles(keys):
        return lax.div(keys, jnp.int32(block))

    end_key = kv_length if right is None else jnp.minimum(kv_length, last_query + right + 1)
    end_key = jnp.where(first_query < q_length, jnp.maximum(end_key, 0), 0)
    end = tiles(end_key + block - 1)
    begin = jnp.int32(0) if left is None else jnp.minimum(tiles(jnp.maximum(first_query - left, 0)), end)
    full_begin = begin
    if left is not None:
        full_begin = jnp.minimum(tiles(jnp.maximum(last_query - left, 0) + block - 1), end)
    full_end = end
    if right is not None or not aligned:
        full_keys = end_key if right is None else jnp.minimum(end_key, jnp.maximum(first_query + right + 1, 0))
        full_end = jnp.maximum(tiles(full_keys), full_begin)
    return begin, full_begin, full_end, end


def _pass_turn(turn):
    """Lets the other warpgroup use the tensor cores, and waits until it has."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _product(multiply, shape: tuple[int, int], dtype: jnp.dtype):
    """A product in a fresh accumulator, as float32; an int8 one is MAGIC too large.

    It starts from a constant, written before its operands are there: ptxas drops zeros that are a constant, while those
    of a scoped accumulator cost 64 moves right before each product, and 64 additions right after an int8 one.
    """
    constant = jnp.full(shape, MAGIC_BITS, jnp.int32) if dtype == INT8 else jnp.zeros(shape, jnp.float32)
    product = pl.run_state(multiply)(plgpu.ACC.init(plgpu.layout_cast(constant, TILE)))
    return lax.bitcast_convert_type(product, jnp.float32)  # pyright: ignore[reportArgumentType] - an array by now


def _quantize_rows(q_ref, codes_ref, dtype: jnp.dtype):
    """Quantizes queries per token within shared memory; returns their scales."""
    q = plgpu.load(q_ref, layout=TILE).astype(jnp.float32)
    absmax = jnp.maximum(jnp.max(jnp.abs(q), axis=1), SMALLEST_ABSMAX)
    q = q * along_rows(LARGEST_CODE[dtype] / absmax, q)
    codes_ref[...] = round_in_place(q, dtype)
    plgpu.commit_smem()
    return absmax * (1 / LARGEST_CODE[dtype])
