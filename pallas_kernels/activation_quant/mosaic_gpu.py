"""The Hopper kernels: x is read from device memory once, whatever the number of passes over it in shared memory.

A scale a token: a block is one warpgroup and takes one row; as many blocks as fit share a multiprocessor, so that one
waits for its row while others work on theirs. A scale a group: a block takes the groups of 64 tokens, rows of a
wgmma-shaped register tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels.activation_quant.reference import LIMITS, LOWEST, scale_of

LANES = 128
GROUP = 128
TOKENS = 64
MAGIC = 1.5 * 2**23  # float32 from here to 2^23 further has steps of 1: adding it rounds to an integer, ties to even


def quantize_tokens(x, gain, dtype, limit: float, epsilon: float | None) -> tuple[jax.Array, jax.Array]:
    """Quantize each row of x [M, K] by its own scale, K a multiple of 128; see `activation_quant_reference`."""
    m, k = x.shape
    rows = k // LANES
    chunk = max(c for c in (8, 4, 2, 1) if rows % c == 0)
    operands = [x.reshape(m, rows, LANES), *([] if gain is None else [gain.reshape(rows, LANES)])]
    body = functools.partial(_tokens_body, dtype=jnp.dtype(dtype), limit=limit, epsilon=epsilon, chunk=chunk)
    codes, scale = plgpu.kernel(
        lambda *refs: body(refs[0], None if gain is None else refs[1], *refs[-4:]),
        out_type=(jax.ShapeDtypeStruct((m, rows, LANES), dtype), jax.ShapeDtypeStruct((m,), jnp.float32)),
        scratch_types=[plgpu.SMEM((rows, LANES), x.dtype), plgpu.Barrier()],
        grid=(m,),
        grid_names=("token",),
    )(*operands)
    return codes.reshape(m, k), scale.reshape(m, 1)


def _tokens_body(x, gain, codes, scale, row, arrived, *, dtype, limit, epsilon, chunk):
    """One token."""
    token = lax.axis_index("token")
    plgpu.copy_gmem_to_smem(x.at[token], row, arrived)
    plgpu.barrier_wait(arrived)
    chunks = row.shape[0] // chunk
    layout = plgpu.Layout.WG_STRIDED((chunk, LANES), vec_size=chunk)

    def load(ref, i):
        return plgpu.load(ref.at[pl.ds(i * chunk, chunk)], layout=layout, optimized=False).astype(jnp.float32)

    def scaled(value, i):
        return value if gain is None else value * load(gain, i)

    zeros = plgpu.layout_cast(jnp.zeros((chunk, LANES), jnp.float32), layout)

    def measure(i, carry):
        absmax, squares = carry
        value = load(row, i)
        return jnp.maximum(absmax, jnp.abs(scaled(value, i))), squares + value * value

    absmax, squares = lax.fori_loop(0, chunks, measure, (zeros, zeros))
    absmax = jnp.max(absmax)
    factor = None
    if epsilon is not None:
        factor = lax.rsqrt(jnp.sum(squares) * (1.0 / (row.shape[0] * LANES)) + epsilon)
        absmax = absmax * factor  # the same as the largest product: rounding is monotone
    scale_value = scale_of(absmax, limit)
    scale[token] = scale_value
    inverse = 1.0 / scale_value

    def write(i, _):
        value = scaled(load(row, i), i)
        value = value if factor is None else value * factor
        codes[token, pl.ds(i * chunk, chunk)] = _round(value * inverse, dtype)

    lax.fori_loop(0, chunks, write, None)


def quantize_groups(x, gain, inverse_rms, dtype, limit: float) -> tuple[jax.Array, jax.Array]:
    """Quantize each 128 inputs of each row of x [M, K] by a scale of their own.

    The rows are first multiplied by inverse_rms [M], if given.
    The scales come out as the transpose of what is stored, [K / 128, M]: the layout that the product wants.
    """
    m, k = x.shape
    tokens = m if m <= 8 else -(-m // 8) * 8  # The copy engine addresses x in tiles of 8 rows.
    x = jnp.pad(x, ((0, tokens - m), (0, 0)))
    if inverse_rms is not None:  # Read with ordinary loads, which mind no bounds.
        inverse_rms = jnp.pad(inverse_rms, (0, -m % TOKENS))
    optional = {"gain": gain, "inverse_rms": inverse_rms}
    optional = {name: value for name, value in optional.items() if value is not None}
    shared = [tiled((TOKENS, GROUP), x.dtype), tiled((TOKENS, GROUP), dtype), plgpu.SMEM((TOKENS,), jnp.float32)]

    def body(x, *refs):
        given = dict(zip(optional, refs, strict=False))
        _groups_body(
            x, given.get("gain"), given.get("inverse_rms"), *refs[len(optional) :], dtype=jnp.dtype(dtype), limit=limit
        )

    codes, scale = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((tokens, k), dtype),
            # The scales of a block are contiguous: the copy engine stores them whole, past no bounds it would know.
            jax.ShapeDtypeStruct((k // GROUP, pl.cdiv(m, TOKENS) * TOKENS), jnp.float32),
        ),
        scratch_types=[*shared, plgpu.Barrier()],
        grid=(pl.cdiv(m, TOKENS), k // GROUP),
        grid_names=("tokens", "group"),
    )(x, *optional.values())
    return codes[:m], scale[:, :m].T


def _groups_body(x, gain, inverse_rms, codes, scale, x_smem, codes_smem, scale_smem, arrived, *, dtype, limit):
    """One group of 64 tokens."""
    group = lax.axis_index("group")
    tokens = pl.ds(lax.axis_index("tokens") * TOKENS, TOKENS)
    inputs = pl.ds(group * GROUP, GROUP)
    plgpu.copy_gmem_to_smem(x.at[tokens, inputs], x_smem, arrived)
    plgpu.barrier_wait(arrived)
    value = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    if gain is not None:
        columns = plgpu.load(gain.at[inputs], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        value = value * lax.broadcast_in_dim(columns, value.shape, (1,))
    if inverse_rms is not None:
        rows = plgpu.load(inverse_rms.at[tokens], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        value = value * lax.broadcast_in_dim(rows, value.shape, (0,))
    scales = scale_of(jnp.max(jnp.abs(value), axis=1), limit)
    codes_smem[...] = _round(value * lax.broadcast_in_dim(1.0 / scales, value.shape, (0,)), dtype)
    scale_smem[...] = scales
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_smem, codes.at[tokens, inputs])
    plgpu.copy_smem_to_gmem(scale_smem, scale.at[group, tokens])
    plgpu.wait_smem_to_gmem(0)


def _round(value, dtype):
    """`reference.round_to`, in what registers can do."""
    value = jnp.minimum(jnp.maximum(value, LOWEST[dtype.name]), LIMITS[dtype.name])
    if dtype != jnp.int8:
        return value.astype(dtype)
    return (lax.bitcast_convert_type(value + MAGIC, jnp.int32) & 255).astype(jnp.int8)
