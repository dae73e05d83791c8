"""Quantization of keys and values at the speed of memory: each block reads a tile once and writes its codes.

Small blocks, several to a multiprocessor, hide one another's copies. What needs more than a tile's tokens (the keys'
mean, the values' magnitudes by channel) is computed by XLA, from a sample.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels.attention.quantize import (
    F16,
    INT8,
    LARGEST_CODE,
    SMALLEST_ABSMAX,
    Keys,
    Values,
    channel_scale,
    keys_mean,
)
from pallas_kernels.attention.registers import (
    MAGIC,
    MAGIC_BITS,
    PER_COLUMN,
    PER_ROW,
    QUAD_COLUMNS,
    TILE,
    along_columns,
    along_rows,
    round_to_operand,
)

CHUNK = 64  # tokens in registers at a time


def quantize_keys_mosaic_gpu(k: jax.Array, dtype: jnp.dtype, block: int, lengths: jax.Array | None) -> Keys:
    """`quantize.quantize_keys` as a kernel, for keys [B, S, K, H] in a 16-bit format, S a multiple of 8."""
    batch, tokens, heads, head_dim = k.shape
    tiles = pl.cdiv(tokens, block)
    mean = keys_mean(k, lengths)
    codes = jax.ShapeDtypeStruct((batch, heads, tiles * block, head_dim), dtype)
    scale = jax.ShapeDtypeStruct((batch, heads, tiles, QUAD_COLUMNS), jnp.float32)
    call = plgpu.kernel(
        functools.partial(_quantize_keys, block=block),
        out_type=[codes, scale],
        scratch_types=[
            tiled((block, head_dim), k.dtype),
            tiled((block, head_dim), dtype),
            plgpu.Barrier(),
        ],
        grid=(batch, tiles, heads),  # heads run fastest: neighbours in memory are read together
        grid_names=("batch", "tile", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return Keys(*call(k, mean, _all_lengths(lengths, batch, tokens)))


def smooth_keys_mosaic_gpu(k: jax.Array, block: int, lengths: jax.Array | None) -> jax.Array:
    """`quantize.smooth_keys` as a kernel, for keys [B, S, K, H] in a 16-bit format, S a multiple of 8."""
    batch, tokens, heads, head_dim = k.shape
    tiles = pl.cdiv(tokens, block)
    call = plgpu.kernel(
        functools.partial(_smooth_keys, block=block),
        out_type=jax.ShapeDtypeStruct((batch, heads, tiles * block, head_dim), F16),
        scratch_types=[tiled((block, head_dim), k.dtype), tiled((block, head_dim), F16), plgpu.Barrier()],
        grid=(batch, tiles, heads),
        grid_names=("batch", "tile", "head"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return call(k, keys_mean(k, lengths), _all_lengths(lengths, batch, tokens))


def quantize_values_mosaic_gpu(v: jax.Array, dtype: jnp.dtype, block: int, lengths: jax.Array | None) -> Values:
    """`quantize.quantize_values` as a kernel, tokens interleaved as `registers.round_to_operand` leaves the weights.

    Scales of blocks come with their reciprocals: [B, N, S / block, 2].
    """
    batch, tokens, heads, head_dim = v.shape
    tiles = pl.cdiv(tokens, block)
    scale = channel_scale(v, dtype, lengths)
    codes = jax.ShapeDtypeStruct((batch, heads, head_dim, tiles * block), dtype)
    block_scale = jax.ShapeDtypeStruct((batch, heads, tiles, 2), jnp.float32)
    call = plgpu.kernel(
        functools.partial(_quantize_values, block=block),
        out_type=[codes, block_scale],
        scratch_types=[
            tiled((block, head_dim), v.dtype),
            tiled((head_dim, block), dtype, columns=CHUNK),
            plgpu.Barrier(),
        ],
        grid=(batch, tiles, heads),  # heads run fastest: neighbours in memory are read together
        grid_names=("batch", "tile", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    codes, block_scale = call(v, 1 / scale, _all_lengths(lengths, batch, tokens))
    return Values(codes, scale, block_scale)


def _all_lengths(lengths, batch: int, tokens: int):
    return np.full((batch,), tokens, np.int32) if lengths is None else lengths  # a constant needs no launch


def _quantize_keys(k_ref, mean_ref, length_ref, codes_ref, scale_ref, k_smem, codes_smem, ready, *, block: int):
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    smoothed = _smoothed(k_ref, mean_ref, length_ref, k_smem, ready, block)
    dtype = jnp.dtype(codes_ref.dtype)
    group = lax.div(lax.rem(_iota_rows(), QUAD_COLUMNS), 2)
    absmax = lax.fori_loop(  # a loop: unrolled, its chunks would be in registers together
        0,
        block // CHUNK,
        lambda chunk, absmax: jnp.maximum(absmax, jnp.max(jnp.abs(smoothed(chunk)), axis=1)),
        plgpu.layout_cast(jnp.full((CHUNK,), SMALLEST_ABSMAX, jnp.float32), PER_ROW),
    )
    inverse = jnp.zeros_like(absmax)
    for index in range(QUAD_COLUMNS // 2):
        largest = jnp.max(jnp.where(group == index, absmax, 0.0))
        inverse = jnp.where(group == index, LARGEST_CODE[dtype] / largest, inverse)
        scale_ref[batch, head, tile, 2 * index] = largest * (1 / LARGEST_CODE[dtype])
        scale_ref[batch, head, tile, 2 * index + 1] = largest * (1 / LARGEST_CODE[dtype])

    @pl.loop(0, block // CHUNK)
    def _(chunk):
        x = smoothed(chunk)
        codes_smem[pl.ds(chunk * CHUNK, CHUNK)] = round_in_place(x * along_rows(inverse, x), dtype)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_smem, codes_ref.at[batch, head, pl.ds(tile * block, block)])
    plgpu.wait_smem_to_gmem(0)


def _smoothed(k_ref, mean_ref, length_ref, k_smem, ready, block: int):
    """Of a chunk of this block's keys, themselves less the mean; zeros past the length."""
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    _copy_tile(k_ref, k_smem, ready, block)
    mean = plgpu.load(mean_ref.at[batch, head], layout=PER_COLUMN, optimized=False)

    def smoothed(chunk):
        x = plgpu.load(k_smem.at[pl.ds(chunk * CHUNK, CHUNK)], layout=TILE).astype(jnp.float32)
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=TILE) + (tile * block + chunk * CHUNK)
        return jnp.where(row < length_ref[batch], x - along_columns(mean, x), 0.0)

    return smoothed


def _smooth_keys(k_ref, mean_ref, length_ref, out_ref, k_smem, out_smem, ready, *, block: int):
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    smoothed = _smoothed(k_ref, mean_ref, length_ref, k_smem, ready, block)

    @pl.loop(0, block // CHUNK)
    def _(chunk):
        out_smem[pl.ds(chunk * CHUNK, CHUNK)] = smoothed(chunk).astype(F16)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[batch, head, pl.ds(tile * block, block)])
    plgpu.wait_smem_to_gmem(0)


def _quantize_values(
    v_ref, inverse_ref, length_ref, codes_ref, block_scale_ref, v_smem, codes_smem, ready, *, block: int
):
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    _copy_tile(v_ref, v_smem, ready, block)
    dtype = jnp.dtype(codes_ref.dtype)
    inverse = plgpu.load(inverse_ref.at[batch, head], layout=PER_COLUMN, optimized=False)

    def larger(chunk, absmax):  # tokens along rows: four times as fast to read as they are written below
        x = plgpu.load(v_smem.at[pl.ds(chunk * CHUNK, CHUNK)], layout=TILE).astype(jnp.float32)
        x = jnp.abs(x * along_columns(inverse, x))
        valid = _iota_rows() + (tile * block + chunk * CHUNK) < length_ref[batch]
        return jnp.maximum(absmax, jnp.where(valid, jnp.max(x, axis=1), 0.0))

    smallest = plgpu.layout_cast(jnp.full((CHUNK,), SMALLEST_ABSMAX, jnp.float32), PER_ROW)
    largest = jnp.max(lax.fori_loop(0, block // CHUNK, larger, smallest))
    block_scale_ref[batch, head, tile, 0] = largest * (1 / LARGEST_CODE[dtype])
    block_scale_ref[batch, head, tile, 1] = LARGEST_CODE[dtype] / largest

    inverse = plgpu.load(inverse_ref.at[batch, head], layout=PER_ROW, optimized=False)
    inverse = inverse * (LARGEST_CODE[dtype] / largest)
    for chunk in range(block // CHUNK):
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        x = plgpu.load(v_smem.at[tokens].T, layout=TILE, optimized=False).astype(jnp.float32)
        token = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=TILE) + (tile * block + chunk * CHUNK)
        x = jnp.where(token < length_ref[batch], x * along_rows(inverse, x), 0.0)
        codes_smem[:, tokens] = round_to_operand(x, dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_smem, codes_ref.at[batch, head, :, pl.ds(tile * block, block)])
    plgpu.wait_smem_to_gmem(0)


def _copy_tile(x_ref, x_smem, ready, block: int):
    """Brings this block's tile into shared memory; tokens past the end are zeros."""
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    plgpu.copy_gmem_to_smem(x_ref.at[batch, pl.ds(tile * block, block), head], x_smem, ready)
    plgpu.barrier_wait(ready)


def _iota_rows():
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (CHUNK,), 0), PER_ROW)


def round_in_place(x, dtype: jnp.dtype):
    """Rounds float32 to 8 bits; callers scale |x| to at most the dtype's largest code."""
    if dtype == INT8:
        return (lax.bitcast_convert_type(x + MAGIC, jnp.int32) - MAGIC_BITS).astype(INT8)
    return x.astype(dtype)
