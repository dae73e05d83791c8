"""Random experts on the device, and the check that precedes every timing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import separate
from pallas_kernels.int4_matmul import dequantize

GROUP = 128
# Dtypes of weights and rows, products a second at the ceiling.
FORMATS = {
    "w4a16": (jnp.int32, jnp.bfloat16, 790e12),
    "w4a8": (jnp.int32, jnp.int8, 1550e12),
    "w4a8-fp8": (jnp.int32, jnp.float8_e4m3fn, 1550e12),
    "int8": (jnp.int8, jnp.int8, 1550e12),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e4m3fn, 1550e12),
}
# The result is rounded to 8 bits once and, scaled before the product, so is the weight: half an eps each. After
# silu(gate) * up both of them count, and silu's slope reaches 1.1.
TOLERANCE = {None: 2.0**-8, "silu_mul": 3 * 2.0**-8}


def group_sizes(rng, tokens: int, experts: int, top: int) -> np.ndarray:
    """Rows of each expert when every token chooses `top` of them at random."""
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top]
    return np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int32)


def drawn(form: str, rows: int, experts: int, k: int, n: int, copies: int):
    """A compiled program from a key to random rows with their scale, if they have one, and experts with theirs."""
    weight_dtype, x_dtype, _ = FORMATS[form]
    groups = k // GROUP if weight_dtype == jnp.int32 else 1
    spread = {"int32": 0.2, "int8": 0.014, "float8_e4m3fn": 0.014}[jnp.dtype(weight_dtype).name]

    def weight(key):
        key, other = jax.random.split(key)
        if weight_dtype == jnp.int32:  # any word is eight codes
            bits = jax.random.bits(key, (experts, -(-n // 64), -(-k // 64), 2, 256), jnp.uint32)
        else:  # any byte without its fourth bit is a number
            bits = jax.random.bits(key, (experts, n, k), jnp.uint8) & jnp.uint8(0xF7)
        scale = jax.random.uniform(other, (experts, groups, n), jnp.float32, 0.5, 1.5) * spread / k**0.5
        return jax.lax.bitcast_convert_type(bits, weight_dtype), scale.astype(jnp.bfloat16)

    def draw(key):
        key, other, *keys = jax.random.split(key, 2 + copies)
        x, x_scale = jax.random.normal(key, (rows, k), jnp.bfloat16), None
        if jnp.dtype(x_dtype).itemsize == 1:
            x, x_scale = (x * 30).astype(x_dtype), jax.random.uniform(other, (rows, 1), jnp.float32, 0.01, 0.03)
        return (x, x_scale), [weight(key) for key in keys]

    return jax.jit(draw).lower(jax.random.key(0)).compile()


def room_for(sizes) -> int:
    """Rows of the largest expert, in few different numbers."""
    return 1 << max(3, (int(sizes.max()) - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(5, 6))
def relative_error(out, x, qweight, scale, sizes, room: int, activation):
    """`|out - exact| / |exact|` against float32 products at the highest precision, expert by expert."""
    codes, x_scale = x
    x_bytes, k = codes.dtype.itemsize, codes.shape[1]
    pad = lambda a: jnp.pad(a.astype(jnp.float32), ((0, room), (0, 0)))  # noqa: E731
    x, out = pad(codes if x_scale is None else codes.astype(jnp.float32) * x_scale), pad(out)
    starts = jnp.cumsum(sizes) - sizes

    def dense(words, scale):
        if words.ndim == 4:
            return dequantize(words, scale, None, k, x_bytes=x_bytes)
        return words.T.astype(jnp.float32) * scale.astype(jnp.float32)

    def expert(sums, operands):
        words, scale, start, size = operands
        rows = jax.lax.dynamic_slice_in_dim(x, start, room)
        exact = jnp.matmul(rows, dense(words, scale), precision="highest")
        if activation is not None:
            gate, up = separate(exact)
            exact = jax.nn.silu(gate) * up
        mine = (jnp.arange(room) < size)[:, None]
        off = jnp.where(mine, jax.lax.dynamic_slice_in_dim(out, start, room) - exact, 0)
        return (sums[0] + jnp.sum(off * off), sums[1] + jnp.sum(jnp.where(mine, exact * exact, 0))), None

    (off, norm), _ = jax.lax.scan(expert, (jnp.float32(0), jnp.float32(0)), (qweight, scale, starts, sizes))
    return jnp.sqrt(off / jnp.maximum(norm, 1e-30))


def compiled_error(out, x, words, scale, sizes, room: int, activation):
    # By cuBLAS, unsearched: the device must be still while another worker measures.
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (out, x, words, scale, sizes))
    return relative_error.lower(*shapes, room, activation).compile(compiler_options=options)
