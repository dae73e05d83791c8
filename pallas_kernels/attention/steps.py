"""The steps of the attention kernel on one tile: scores, mask, online softmax, weighted sum."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.config import ROWS
from pallas_kernels.attention.plan import Block, Plan, Shared
from pallas_kernels.attention.quantize import F16, INT8, LARGEST_CODE, LOG2_E, SMALLEST_ABSMAX
from pallas_kernels.attention.quantize_mosaic_gpu import round_in_place
from pallas_kernels.attention.registers import (
    MAGIC,
    MAGIC_BITS,
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
    weights_of_halves,
)
from pallas_kernels.attention.tiles import visible_columns


def scores(plan: Plan, smem: Shared, codes, slot):
    """Products of queries or their codes and a tile of keys or theirs [ROWS, block_kv], `plan.offset` too large."""
    plgpu.barrier_wait(smem.k_ready.at[slot])

    def multiply(scores_ref):
        plgpu.wgmma(scores_ref, codes, smem.k.at[slot].T)

    x = fresh_product(multiply, (ROWS, plan.config.block_kv), plan.mode.scores)
    plgpu.barrier_arrive(smem.k_free.at[slot])
    return x


def hide(plan: Plan, block: Block, queries, tile, x):
    """Scores of keys that a query does not see become -inf."""
    bounds = visible_columns(queries, tile, block.kv_length, plan.window, plan.config.block_kv)
    return keep_columns(x, *bounds)


def softmax(plan: Plan, x, q_scale, k_scale, maximum):
    """Weights of one tile's scores against the running maximum, what to decay earlier sums by, and the new maximum.

    Dequantization, softmax scale, offset, maximum and the fixed scale of 8-bit weights are one FMA per score.
    """
    log_scale = 0.0 if plan.mode.values is None else math.log2(LARGEST_CODE[plan.mode.values])
    largest = largest_of_columns(x, positive=plan.offset > 0)
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


def softmax_of_halves(plan: Plan, x, maximum):
    """`softmax` of scores in float16 that are in base 2 already, two in an instruction; weights are codes in e4m3.

    The fixed scale is 2^8, so that the exponents' offset is as exact in float16 as the scores are.
    """
    largest = jnp.max(largest_of_columns(x, positive=False).astype(jnp.float32), axis=1)
    new_maximum = jnp.maximum(maximum, largest)
    codes = weights_of_halves(x, 8.0 - new_maximum, plan.config.exponentials_by_polynomial)
    return codes, jnp.exp2(maximum - new_maximum), new_maximum


def add_values(plan: Plan, smem: Shared, slot, p, decay, rescale, acc, total):
    """The decayed sums of P V and of P plus those of one tile; `rescale` is of P V alone, for 8-bit values."""
    dtype = plan.mode.values
    if dtype is None:
        weights, acc = p.astype(smem.v.dtype), acc * along_rows(decay, acc)
        total = total * decay + sum_of_own_columns(p)
        weights, acc, total = lax.optimization_barrier((weights, acc, total))
    else:
        weights = p if plan.half_scores else round_to_operand(p, dtype)
    plgpu.barrier_wait(smem.v_ready.at[slot])
    if dtype is None:
        acc = added_product(lambda ref: plgpu.wgmma(ref, weights, smem.v.at[slot]), acc)
    else:
        shape = ROWS, acc.shape[1] + plan.sum_channels
        part = fresh_product(lambda ref: plgpu.wgmma(ref, weights, smem.v.at[slot].T), shape, dtype)
        part, part_of_total = split_columns(part - MAGIC if dtype == INT8 else part, acc.shape[1])
        acc, total = acc * along_rows(decay * rescale, acc) + part, total * decay + part_of_total
    plgpu.barrier_arrive(smem.v_free.at[slot])
    return acc, total


def fresh_product(multiply, shape: tuple[int, int], dtype: jnp.dtype | None) -> Any:
    """A product in a fresh accumulator, in float32 or, of float16, in this; one of int8 operands is MAGIC too large.

    It starts from a constant, written before its operands are there: ptxas drops zeros that are a constant, while those
    of a scoped accumulator cost 64 moves right before each product, and 64 additions right after an int8 one.
    """
    constant = jnp.zeros(shape, F16 if dtype == F16 else jnp.float32)
    if dtype == INT8:
        constant = jnp.full(shape, MAGIC_BITS, jnp.int32)
    product: Any = pl.run_state(multiply)(plgpu.ACC.init(plgpu.layout_cast(constant, TILE)))
    return lax.bitcast_convert_type(product, jnp.float32) if dtype == INT8 else product


def added_product(multiply, acc):
    """A product added to acc."""
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def scale_rows(q_ref, out_ref, scale: float):
    """Scales queries within shared memory, to float16."""
    out_ref[...] = (plgpu.load(q_ref, layout=TILE).astype(jnp.float32) * scale).astype(F16)
    plgpu.commit_smem()


def quantize_rows(q_ref, codes_ref, dtype: jnp.dtype):
    """Quantizes queries per token within shared memory; returns their scales."""
    q = plgpu.load(q_ref, layout=TILE).astype(jnp.float32)
    absmax = jnp.maximum(jnp.max(jnp.abs(q), axis=1), SMALLEST_ABSMAX)
    q = q * along_rows(LARGEST_CODE[dtype] / absmax, q)
    codes_ref[...] = round_in_place(q, dtype)
    plgpu.commit_smem()
    return absmax * (1 / LARGEST_CODE[dtype])
