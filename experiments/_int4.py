"""Random int4 problems on the device, and the check that precedes every timing."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments._clock import rotations
from experiments._workers import stage
from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.int4_matmul import dequantize, pack

# Outputs are rounded to 16 bits once and, when scaled before the product, so are the weights: each is off by at most
# half an eps of its own size, so that the norm of the error stays under one eps of the norm of the result. The fp8
# tensor core truncates sums to about 14 bits: below that in 16 bits, and what is left in 32.
TOLERANCE = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-10}
# Integers that every format holds exactly.
_RANGES = {"int4": (-8, 8), "int2": (-2, 2), "nf4": (0, 16), "int8": (-128, 128), "float8_e4m3fn": (-16, 17)}


def problem(
    seed: int,
    m: int,
    k: int,
    n: int,
    group: int,
    *,
    dtype="bfloat16",
    scale_dtype=None,
    zero=False,
    bias=False,
    code: int | None = None,
    qtype: str = "int4",
    copies: int = 1,
) -> dict:
    """`x`, and `copies` of packed weights with their scales: fresh random values of a trained layer's sizes.

    An 8-bit `dtype` gives x's codes and their scales. `code` makes every code of the weight that one: -8 and 7 are the
    extremes of the format.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 3 + 3 * copies))
    groups, codes_of_x = k // group, jnp.dtype(dtype).itemsize == 1
    wide = "bfloat16" if codes_of_x else dtype
    scale_dtype, (low, high) = scale_dtype or wide, _RANGES[qtype] if code is None else (code, code + 1)
    x_bytes = jnp.dtype(dtype).itemsize
    scales = lambda: (jax.random.uniform(next(keys), (groups, n), jnp.float32, 0.5, 1.5) * 0.02).astype(scale_dtype)  # noqa: E731
    codes = lambda: pack(  # noqa: E731
        jax.random.randint(next(keys), (k, n), low, high), x_bytes=x_bytes, qtype=qtype
    )
    zeros = lambda: jax.random.randint(next(keys), (groups, n), -8, 8, jnp.int8).astype(wide)  # noqa: E731
    x, x_scale = jax.random.normal(next(keys), (m, k), jnp.dtype(wide)), None
    if codes_of_x:
        x, x_scale = activation_quant(x, dtype, implementation="xla")
    return {
        "x": x,
        "x_scale": x_scale,
        "qtype": qtype,
        "weights": [(codes(), scales(), zeros() if zero else None) for _ in range(copies)],
        "bias": jax.random.normal(next(keys), (n,), jnp.dtype(wide)) if bias else None,
    }


def copies_for(k: int, n: int) -> int:
    """Copies of a packed weight to rotate over."""
    return rotations(k * n // 2)


@functools.partial(jax.jit, static_argnames="qtype")
def relative_error(out, x, qweight, scale, zero, bias, x_scale=None, qtype="int4"):
    """`|out - exact| / |exact|` against float32 products at the highest precision."""
    weight = dequantize(qweight, scale, zero, x.shape[1], x_bytes=x.dtype.itemsize, qtype=qtype)
    exact = jnp.matmul(x.astype(jnp.float32), weight, precision="highest")
    if x_scale is not None:
        exact = exact * x_scale
    if bias is not None:
        exact = exact + bias.astype(jnp.float32)[None, :]
    return jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)


@functools.lru_cache(maxsize=2)
def _compiled_error(qtype, *shapes):
    # By cuBLAS, unsearched: the device must be still while another worker measures.
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return relative_error.lower(*shapes, qtype=qtype).compile(compiler_options=options)


def compiled_check(data: dict, run: Callable[[], jax.Array], out_dtype=None) -> Callable[[], dict]:
    """Compile the check of the product with the first weight.

    Args:
      data: a problem.
      run: the product.
      out_dtype: of its result; x's by default.

    Returns:
      A function that runs the product twice over poisoned memory and returns its error, and whether both runs agree
      bit for bit.
    """
    qweight, scale, zero = data["weights"][0]
    operands = (data["x"], qweight, scale, zero, data["bias"], data["x_scale"])
    shape, dtype = (data["x"].shape[0], scale.shape[1]), jnp.dtype(out_dtype or data["x"].dtype)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    error_of = _compiled_error(data["qtype"], jax.ShapeDtypeStruct(shape, dtype), *shapes)

    def check() -> dict:
        outs = []
        for _ in range(2):
            poison = [jnp.full(shape, jnp.nan, dtype) for _ in range(4)]
            jax.block_until_ready(poison)
            del poison
            stage("the kernel")
            outs.append(jax.block_until_ready(run()))
        stage("its error")
        error = float(error_of(outs[0], *operands))
        bits = [out.view(f"int{8 * dtype.itemsize}") for out in outs]
        same = bool((bits[0] == bits[1]).all())
        return {"relative_error": error, "deterministic": same, "ok": error <= TOLERANCE[dtype.name] and same}

    return check
