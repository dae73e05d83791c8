"""Decode attention for Hopper: the cache is read once, by many small blocks that hide one another's latency.

A block of one warpgroup walks over the tokens of one sequence and key head, or over its share of them: the blocks of a
cluster split the context and merge in distributed shared memory, so that one launch does everything. The query heads
that share a key head are the 8 columns of two products: S^T = K q^T and O^T = V^T P^T. The cache is on the side that
wgmma takes from registers, where 8-bit codes become 16-bit numbers exactly; scales multiply the scores and the weights.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.config import Config, padded_group

TILE = plgpu.Layout.WGMMA
CODES = plgpu.Layout.WGMMA_UPCAST_2X
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
LOWEST_MAXIMUM = -1e30  # finite, so that a block without tokens weighs 0 and not NaN
STATISTIC_ROWS = 64  # the maxima and sums travel as a tile of equal rows
LOG2_E = math.log2(math.e)


def decode_attention_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    page_table: jax.Array | None,
    *,
    scale: float,
    config: Config,
) -> jax.Array:
    """Runs the kernel; arguments as `decode_attention_reference`'s, lengths int32."""
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    operands = {"q": queries, "k": k, "v": v, "lengths": lengths}
    optional = {"k_scale": k_scale, "v_scale": v_scale, "page_table": page_table}
    operands |= {name: x for name, x in optional.items() if x is not None}
    call = plgpu.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(_kernel, dict(zip(operands, refs, strict=False)), refs[-1], scale=scale, config=config),
            _scratch(operands, config),
        ),
        out_type=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid=(kv_heads, batch),
        grid_names=("head", "batch"),
        cluster=(config.split,),
        cluster_names=("split",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return call(*operands.values()).reshape(q.shape)


def _compute_dtype(q: jax.Array, k: jax.Array) -> jnp.dtype:
    """The 16-bit format of the products: float16 holds every e4m3 code, bfloat16 every int8 code."""
    if k.dtype == q.dtype:
        return q.dtype
    return jnp.dtype(jnp.bfloat16 if k.dtype == jnp.int8 else jnp.float16)


def _scratch(operands: dict, config: Config) -> dict:
    """Shared memory and barriers, by name."""
    q, k = operands["q"], operands["k"]
    head_dim, group = q.shape[3], padded_group(q.shape[1] * q.shape[2], q.shape[1])
    stages, block, others = config.stages, config.block, config.split - 1
    dtype = _compute_dtype(q, k)
    scratch = {
        "rows": plgpu.SMEM((group, head_dim), q.dtype),  # queries as they come, outputs as they go
        "q": _tiled((group, head_dim), dtype),
        "k": _tiled((stages, block, head_dim), operands["k"].dtype),
        "v": _tiled((stages, head_dim, block), operands["v"].dtype),
        "p": _tiled((group, block), dtype),
        "q_ready": plgpu.Barrier(),
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=4 if "k_scale" in operands else 2),
    }
    if "k_scale" in operands:
        scratch |= {name: plgpu.SMEM((stages, block), jnp.float32) for name in ("k_scale", "v_scale")}
    if others:
        scratch |= {
            "partial": _tiled((others, head_dim, group), jnp.float32),
            "maximum": _tiled((others, STATISTIC_ROWS, group), jnp.float32),
            "total": _tiled((others, STATISTIC_ROWS, group), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=3 * others),
        }
    return scratch


def _tiled(shape: tuple[int, ...], dtype):
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    )


def _kernel(refs: dict, out_ref, smem: dict, *, scale: float, config: Config):
    """One block: its share of the tokens of one sequence and key head."""
    batch, head, rank = (lax.axis_index(name) for name in ("batch", "head", "split"))
    block, stages, split = config.block, config.stages, config.split
    group, head_dim = smem["q"].shape
    heads = refs["q"].shape[2]
    pages = refs["page_table"].shape[1] if "page_table" in refs else 1
    length = jnp.clip(refs["lengths"][batch], 0, pages * refs["k"].shape[2])
    tiles = lax.div(length + block - 1, jnp.int32(block))
    first, last = lax.div(rank * tiles, jnp.int32(split)), lax.div((rank + 1) * tiles, jnp.int32(split))

    def fetch(tile):
        slot = lax.rem(tile - first, jnp.int32(stages))
        sequence, tokens = batch, tile * block
        if "page_table" in refs:
            page_size = refs["k"].shape[2]
            sequence = refs["page_table"][batch, lax.div(tokens, jnp.int32(page_size))]
            tokens = lax.rem(tokens, jnp.int32(page_size))
        tokens = pl.ds(pl.multiple_of(tokens, block), block)
        ready = smem["ready"].at[slot]
        plgpu.copy_gmem_to_smem(refs["k"].at[sequence, head, tokens], smem["k"].at[slot], ready)
        plgpu.copy_gmem_to_smem(refs["v"].at[sequence, head, slice(None), tokens], smem["v"].at[slot], ready)
        for name in ("k_scale", "v_scale"):
            if name in refs:
                plgpu.copy_gmem_to_smem(refs[name].at[sequence, head, tokens], smem[name].at[slot], ready)

    plgpu.copy_gmem_to_smem(refs["q"].at[batch, head], smem["rows"].at[pl.ds(0, heads)], smem["q_ready"])
    for i in range(stages):
        pl.when(first + i < last)(lambda i=i: fetch(first + i))
    plgpu.barrier_wait(smem["q_ready"])
    # Columns past the heads hold anything: nothing is read from theirs.
    q = plgpu.load(smem["rows"].T, layout=TILE, optimized=False)
    smem["q"].T[...] = q.astype(smem["q"].dtype)
    plgpu.commit_smem()

    def step(tile, carry):
        acc, maximum, total = carry
        slot = lax.rem(tile - first, jnp.int32(stages))
        plgpu.barrier_wait(smem["ready"].at[slot])
        x = _product(_operand(smem["k"].at[slot], smem["q"].dtype), smem["q"].T, (block, group)) * (scale * LOG2_E)
        if "k_scale" in refs:
            x = x * _along_rows(_per_row(smem["k_scale"].at[slot]), x)
        token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=TILE) + tile * block
        x = jnp.where(token < length, x, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(x, axis=0))
        decay = jnp.exp2(maximum - new_maximum)
        p = jnp.exp2(x - _along_columns(new_maximum, x))
        total = total * _along_columns(decay, total) + p
        if "v_scale" in refs:
            p = p * _along_rows(_per_row(smem["v_scale"].at[slot]), p)
        smem["p"].T[...] = p.astype(smem["p"].dtype)
        plgpu.commit_smem()
        v = _operand(smem["v"].at[slot], smem["p"].dtype)
        acc = acc * _along_columns(decay, acc)
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, v, smem["p"].T))(plgpu.ACC.init(acc))
        plgpu.commit_smem()  # every warp has read its part of the slot
        pl.when(tile + stages < last)(lambda: fetch(tile + stages))
        return acc, new_maximum, total

    acc = plgpu.layout_cast(jnp.zeros((head_dim, group), jnp.float32), TILE)
    maximum = plgpu.layout_cast(jnp.full((group,), LOWEST_MAXIMUM, jnp.float32), PER_COLUMN)
    total = plgpu.layout_cast(jnp.zeros((block, group), jnp.float32), TILE)
    acc, maximum, total = lax.fori_loop(first, last, step, (acc, maximum, total))
    state = acc, maximum, jnp.sum(total, axis=0)
    if split == 1:
        return _store(state, out_ref.at[batch, head], smem)
    pl.when(rank != 0)(lambda: _send(state, rank, smem))
    pl.when(rank == 0)(lambda: _store(_merge(state, smem), out_ref.at[batch, head], smem))


def _operand(ref, dtype):
    """A tile of the cache as the first operand of a product: where it lies, or converted in registers."""
    if ref.dtype == dtype:
        return ref
    return plgpu.layout_cast(plgpu.load(ref, layout=CODES).astype(dtype), TILE)


def _product(a, b, shape: tuple[int, int]):
    def multiply(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _send(state, rank, smem: dict):
    """Leaves a block's sums with the first block of its cluster."""
    acc, maximum, total = state
    rows = jnp.zeros((STATISTIC_ROWS, acc.shape[1]), jnp.float32)
    parts = {"partial": acc, "maximum": _along_columns(maximum, rows), "total": _along_columns(total, rows)}
    first = jnp.int32(0)
    for name, value in parts.items():
        plgpu.async_store_smem(value, smem[name].at[rank - 1], smem["arrived"], cluster_idx=first, cluster_dim="split")


def _merge(state, smem: dict):
    """Adds what the other blocks of the cluster have left, in a fixed order."""
    acc, maximum, total = state
    plgpu.barrier_wait(smem["arrived"])
    for other in range(smem["partial"].shape[0]):
        other_maximum, other_total = (
            jnp.max(plgpu.load(smem[name].at[other], layout=TILE), axis=0) for name in ("maximum", "total")
        )
        new_maximum = jnp.maximum(maximum, other_maximum)
        ours, theirs = jnp.exp2(maximum - new_maximum), jnp.exp2(other_maximum - new_maximum)
        partial = plgpu.load(smem["partial"].at[other], layout=TILE)
        acc = acc * _along_columns(ours, acc) + partial * _along_columns(theirs, acc)
        maximum, total = new_maximum, total * ours + other_total * theirs
    return acc, maximum, total


def _store(state, out_ref, smem: dict):
    acc, _, total = state
    inverse = 1.0 / jnp.where(total == 0.0, jnp.inf, total)  # nothing seen: zeros
    smem["rows"].T[...] = (acc * _along_columns(inverse, acc)).astype(out_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["rows"].at[pl.ds(0, out_ref.shape[0])], out_ref)
    plgpu.wait_smem_to_gmem(0)


def _per_row(ref):
    return plgpu.load(ref, layout=PER_ROW, optimized=False)


def _along_rows(per_row, like):
    return lax.broadcast_in_dim(per_row, like.shape, [0])


def _along_columns(per_column, like):
    return lax.broadcast_in_dim(per_column, like.shape, [1])
