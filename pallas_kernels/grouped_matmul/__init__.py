"""Rows sorted by expert times their experts' weights: int4 with 16- or 8-bit activations, int8 and fp8 with 8-bit."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.grouped_matmul.config import Config, default_config, supports
from pallas_kernels.grouped_matmul.layout import interleave, separate
from pallas_kernels.grouped_matmul.mosaic_gpu import grouped_matmul_mosaic_gpu
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.int4_matmul.layout import TILE
from pallas_kernels.int8_matmul.layout import BLOCK

__all__ = ["Config", "default_config", "grouped_matmul", "interleave", "separate", "supports"]

Implementation = Literal["mosaic_gpu", "xla"]
Activation = Literal["silu_mul"]


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one call."""

    implementation: Implementation | None
    config: Config | None
    activation: Activation | None
    out_dtype: jnp.dtype


def grouped_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    group_sizes: jax.Array,
    x_scale: jax.Array | None = None,
    activation: Activation | None = None,
    row_scale: jax.Array | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply each row by its expert's weight: `activation(x[t] @ w[expert(t)]) * row_scale[t]`.

    Rows of one expert lie together, in the order of the experts; rows past the sum of the group sizes become zeros.
    Sums, activation and scaling are float32 (int32 for int8 weights); the result is rounded once. An expert without
    rows costs nothing: its weight is not read. Differentiable in everything but the codes (through 8-bit
    activations: in the scales only); under `vmap` one product after another.

    Args:
      x: `[T, K]` bfloat16 or float16, or 8-bit codes with `x_scale`: int8 or float8_e4m3fn with int4 weights, else of
        the weight's dtype. With 8-bit weights a floating x is quantized here, a scale a row.
      qweight: int4 codes `[E, ceil(N / 64), ceil(K / 64), 2, 256]` int32 from `int4_matmul.pack` for x's bytes, or int8
        or float8_e4m3fn `[E, padded N, padded K]` from `int8_matmul.pack`.
      scale: `[E, K / group, N]`, any sign; one row for per-channel scales. Groups of 8-bit weights are multiples of
        128 inputs.
      zero_point: of int4 codes, like `scale`, in the units of the codes (-8..7), whole numbers.
      group_sizes: `[E]` integers, rows of each expert: any sizes, also zero; their sum is at most T.
      x_scale: float32 `[T, 1]`, of x that holds 8-bit codes.
      activation: "silu_mul": the columns are a gate and an up projection merged by `interleave`; the result is
        silu(gate) * up, of N / 2 columns.
      row_scale: `[T]` multiplies each row of the result (the routing weight).
      out_dtype: of the result; x's by default, bfloat16 if x holds codes.
      implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the kernel on a CUDA device
        if it takes the problem, else "xla"; decided when the program is lowered for its platform.
      config: the kernel's configuration; by default chosen by the mean number of rows of an expert.

    Returns:
      `[T, N]` (`[T, N / 2]` after "silu_mul").

    Raises:
      TypeError: for operands of other dtypes.
      ValueError: for operands whose shapes do not fit.
      NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.int4_matmul import pack
    >>> experts = pack(jnp.stack([jnp.ones((128, 64), jnp.int8), jnp.full((128, 64), 2, jnp.int8)]))
    >>> x, scale = jnp.ones((3, 128), jnp.bfloat16), jnp.ones((2, 1, 64), jnp.bfloat16)
    >>> grouped_matmul(x, experts, scale, group_sizes=jnp.array([1, 1]))[:, 0].tolist()
    [128.0, 256.0, 0.0]
    """
    _check(x, qweight, scale, zero_point, group_sizes, x_scale, activation, row_scale)
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    rows, k, n = *x.shape, scale.shape[2]
    out_dtype = jnp.dtype(out_dtype or (x.dtype if x.dtype in (jnp.bfloat16, jnp.float16) else jnp.bfloat16))
    if qweight.dtype != jnp.int32:
        x = jnp.pad(x, ((0, 0), (0, qweight.shape[2] - k)))
        if x_scale is None:
            x, x_scale = activation_quant(x, qweight.dtype, implementation=implementation)
    padding = ((0, 0), (0, 0), (0, -n % (TILE if qweight.dtype == jnp.int32 else BLOCK)))
    scale = jnp.pad(scale, padding)
    zero_point = None if zero_point is None else jnp.pad(zero_point, padding).astype(scale.dtype)
    call = _Call(implementation, config, activation, out_dtype)
    reason = supports(
        k,
        scale.shape[1],
        x.dtype,
        qweight.dtype,
        config=config,
        num_experts=scale.shape[0],
        has_zero_point=zero_point is not None,
        scale_dtype=scale.dtype,
        out_dtype=out_dtype,
    )
    if implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"grouped_matmul: {reason}")
    if reason is not None or rows == 0:
        call = dataclasses.replace(call, implementation="xla")
    out = _multiply_jit(call, x, qweight, scale, zero_point, group_sizes, x_scale, row_scale)
    return out[:, : n // 2 if activation else n]


def _check(x, qweight, scale, zero_point, group_sizes, x_scale, activation, row_scale):
    """Refuse operands that do not fit, by name."""
    ranks = {jnp.dtype(jnp.int32): 5, jnp.dtype(jnp.int8): 3, jnp.dtype(jnp.float8_e4m3fn): 3}
    if qweight.dtype not in ranks:
        raise TypeError(f"qweight is {qweight.dtype}; accepted are int32 (packed int4), int8 and float8_e4m3fn")
    if x.ndim != 2 or scale.ndim != 3 or qweight.ndim != ranks[qweight.dtype]:
        raise ValueError(
            "grouped_matmul takes x [T, K], qweight [E, ...] as packed by int4_matmul.pack or int8_matmul.pack and "
            f"scale [E, groups, N]; got x {x.shape}, qweight {qweight.shape} {qweight.dtype}, scale {scale.shape}"
        )
    (rows, k), (experts, groups, n) = x.shape, scale.shape
    if qweight.dtype == jnp.int32:
        packed = (experts, -(-n // TILE), -(-k // TILE), 2, 256)
    else:
        packed = (experts, -(-n // BLOCK) * BLOCK, -(-k // BLOCK) * BLOCK)
    if qweight.shape != packed:
        raise ValueError(f"qweight has shape {qweight.shape}; x with K = {k} and scale {scale.shape} need {packed}")
    if k % groups or (qweight.dtype != jnp.int32 and groups > 1 and k // groups % BLOCK):
        raise ValueError(
            f"scale has {groups} groups; accepted are divisors of K = {k}, for 8-bit weights into multiples of {BLOCK}"
        )
    if activation not in (None, "silu_mul"):
        raise ValueError(f"activation={activation!r}; accepted are 'silu_mul' and None")
    if activation is not None and n % 16:
        raise ValueError(f"activation='silu_mul' takes columns merged by interleave(), in sixteens; N = {n}")
    _check_dtypes(x, qweight, group_sizes, x_scale, zero_point)
    for name, array, shape in (
        ("zero_point", zero_point, scale.shape),
        ("group_sizes", group_sizes, (experts,)),
        ("x_scale", x_scale, (rows, 1)),
        ("row_scale", row_scale, (rows,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def _check_dtypes(x, qweight, group_sizes, x_scale, zero_point):
    codes = (qweight.dtype,) if qweight.dtype != jnp.int32 else (jnp.int8, jnp.float8_e4m3fn)
    accepted = (jnp.bfloat16, jnp.float16) if x_scale is None else codes
    if x.dtype not in accepted:
        raise TypeError(
            f"x is {x.dtype} {'without' if x_scale is None else 'with'} x_scale; accepted are "
            + ", ".join(jnp.dtype(d).name for d in accepted)
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes are {group_sizes.dtype}; accepted are integers")
    if zero_point is not None and qweight.dtype != jnp.int32:
        raise NotImplementedError("grouped_matmul: a zero point of 8-bit weights")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(call: _Call, *operands):
    """`[T, K]` to `[T, N]`, all padded; the differentiable core."""
    return _sequential(call)(*operands)


def _multiply_forward(call, *operands):
    return _multiply(call, *operands), operands


def _multiply_backward(call, operands, cotangent):
    x, qweight, scale, zero_point, group_sizes, x_scale, row_scale = operands

    def product(x, scale, zero_point, x_scale, row_scale):
        return grouped_matmul_reference(
            x, qweight, scale, zero_point, group_sizes, x_scale, row_scale,
            activation=call.activation, out_dtype=call.out_dtype,
        )  # fmt: skip

    if x_scale is not None:  # codes have no gradient
        _, vjp = jax.vjp(functools.partial(product, x), scale, zero_point, x_scale, row_scale)
        dx = None, *vjp(cotangent)
    else:
        _, vjp = jax.vjp(product, x, scale, zero_point, x_scale, row_scale)
        dx = vjp(cotangent)
    dx, dscale, dzero, dx_scale, drow_scale = dx
    return dx, None, dscale, dzero, None, dx_scale, drow_scale


_multiply.defvjp(_multiply_forward, _multiply_backward)
# A model calls the same product in every layer: traced and lowered once.
_multiply_jit = jax.jit(_multiply, static_argnums=(0,))


@functools.cache
def _sequential(call: _Call):
    """The product; batched operands are taken one after another."""
    return jax.custom_batching.sequential_vmap(functools.partial(_dispatch, call))


def _dispatch(call: _Call, *operands):
    """Run the named implementation, or the one for the platform that the program is lowered for."""
    xla = functools.partial(grouped_matmul_reference, activation=call.activation, out_dtype=call.out_dtype)
    if call.implementation == "xla":
        return xla(*operands)
    kernel = functools.partial(_mosaic_gpu, call)
    if call.implementation == "mosaic_gpu":
        return kernel(*operands)
    return lax.platform_dependent(*operands, cuda=kernel, default=xla)


def _mosaic_gpu(call: _Call, x, qweight, scale, zero_point, group_sizes, x_scale, row_scale):
    (experts, groups, n), has_zero_point = scale.shape, zero_point is not None
    config = call.config or default_config(
        x.shape[0], experts, x.shape[1], n, groups, x.dtype, qweight.dtype, has_zero_point, scale.dtype
    )
    return grouped_matmul_mosaic_gpu(
        x, qweight, scale, zero_point, group_sizes, x_scale, row_scale,
        activation=call.activation, out_dtype=call.out_dtype, config=config,
    )  # fmt: skip
