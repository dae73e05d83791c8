"""int4 weights times 16-bit activations."""

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.config import Config, default_config, supports
from pallas_kernels.int4_matmul.layout import TILE, pack, unpack
from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.reference import dequantize, int4_matmul_reference

__all__ = ["Config", "default_config", "dequantize", "int4_matmul", "pack", "supports", "unpack"]

Implementation = Literal["mosaic_gpu", "xla"]


def int4_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    pre_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply activations by an int4 weight: `(x * pre_scale) @ ((code - zero_point) * scale) + bias`.

    Sums are float32. Differentiable in everything but the codes; under `vmap` tokens fold into one product, and
    weights are taken one after another.

    Args:
      x: `[..., K]` bfloat16 or float16.
      qweight: `[ceil(N / 64), ceil(K / 64), 2, 256]` int32, from `pack`.
      scale: `[K / group, N]`, any sign; one row for per-channel scales.
      zero_point: like `scale`, in the units of the codes (-8..7), whole numbers.
      pre_scale: `[K]`; x is multiplied by it first.
      bias: `[N]`.
      implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the kernel on a CUDA device
        if it takes the problem, else "xla"; decided when the program is lowered for its platform.
      config: the kernel's configuration; by default what was tuned for a problem like it, else a cost model's choice.

    Returns:
      `[..., N]` in x's dtype.

    Raises:
      ValueError: for operands whose shapes do not fit.
      NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> qweight = pack(jnp.ones((128, 64), jnp.int8))
    >>> out = int4_matmul(jnp.ones((2, 128), jnp.bfloat16), qweight, jnp.full((1, 64), 0.5, jnp.bfloat16))
    >>> out.shape, float(out[0, 0])
    ((2, 64), 64.0)
    """
    _check(x, qweight, scale, zero_point, pre_scale, bias)
    k, n = x.shape[-1], scale.shape[1]
    if pre_scale is not None:
        x = x * pre_scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (k,))
    pad = -n % TILE
    if pad:
        scale = jnp.pad(scale, ((0, 0), (0, pad)))
        zero_point = None if zero_point is None else jnp.pad(zero_point, ((0, 0), (0, pad)))
        bias = None if bias is None else jnp.pad(bias, (0, pad))
    if zero_point is not None:
        zero_point = zero_point.astype(scale.dtype)
    reason = supports(
        k,
        n + pad,
        scale.shape[0],
        x.dtype,
        config=config,
        has_zero_point=zero_point is not None,
        scale_dtype=scale.dtype,
    )
    if implementation is None and reason is not None:
        implementation = "xla"
    elif implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"int4_matmul: {reason}")
    elif implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    out = cast(jax.Array, _multiply_jit(implementation, config, x.reshape(-1, k), qweight, scale, zero_point, bias))
    return out.reshape(*x.shape[:-1], n + pad)[..., :n]


def _check(x, qweight, scale, zero_point, pre_scale, bias):
    """Refuse operands whose shapes do not fit, by name."""
    if x.ndim < 1 or scale.ndim != 2 or qweight.ndim != 4 or qweight.dtype != jnp.int32:
        raise ValueError(
            f"int4_matmul takes x [..., K], qweight [N/64, K/64, 2, 256] int32 (see pack) and scale [groups, N]; "
            f"got x {x.shape}, qweight {qweight.shape} {qweight.dtype}, scale {scale.shape} (vmap over stacked weights)"
        )
    k, (groups, n) = x.shape[-1], scale.shape
    packed = (-(-n // TILE), -(-k // TILE), 2, 256)
    if qweight.shape != packed:
        raise ValueError(f"qweight has shape {qweight.shape}; x with K = {k} and scale with N = {n} need {packed}")
    if k % groups:
        raise ValueError(f"scale has {groups} groups, which do not divide K = {k}")
    for name, array, shape in (
        ("zero_point", zero_point, scale.shape),
        ("pre_scale", pre_scale, (k,)),
        ("bias", bias, (n,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(implementation, config, x, qweight, scale, zero_point, bias):
    """`[M, K]` to `[M, N]`, all padded; the differentiable and batchable core."""
    return _batchable(implementation, config)(x, qweight, scale, zero_point, bias)


def _multiply_forward(implementation, config, x, qweight, scale, zero_point, bias):
    return _multiply(implementation, config, x, qweight, scale, zero_point, bias), (x, qweight, scale, zero_point, bias)


def _multiply_backward(implementation, config, residuals, cotangent):
    del implementation, config
    x, qweight, scale, zero_point, bias = residuals
    _, vjp = jax.vjp(
        lambda x, scale, zero, bias: int4_matmul_reference(x, qweight, scale, zero, bias), x, scale, zero_point, bias
    )
    dx, dscale, dzero, dbias = vjp(cotangent)
    return dx, None, dscale, dzero, dbias


_multiply.defvjp(_multiply_forward, _multiply_backward)
# A model calls the same product in every layer: traced and lowered once.
_multiply_jit = jax.jit(_multiply, static_argnums=(0, 1))


@functools.cache
def _batchable(implementation, config):
    """The product with its vmap rule: batched tokens fold into M, batched weights are mapped over."""

    @jax.custom_batching.custom_vmap
    def product(x, qweight, scale, zero_point, bias):
        return _dispatch(implementation, config, x, qweight, scale, zero_point, bias)

    @product.def_vmap
    def batched(axis_size, in_batched, x, *weight):
        x_batched, *weight_batched = in_batched
        if not any(jax.tree.leaves(weight_batched)):
            out = product(x.reshape(-1, x.shape[-1]), *weight)
            return out.reshape(axis_size, -1, out.shape[-1]), True
        operands, flags = (x, *weight), (x_batched, *weight_batched)
        mapped = [a if flag else None for a, flag in zip(operands, flags, strict=True)]

        def one(slices):
            return product(*(s if flag else a for s, a, flag in zip(slices, operands, flags, strict=True)))

        return jax.lax.map(one, mapped), True

    return product


def _dispatch(implementation, config, x, qweight, scale, zero_point, bias):
    """Run the named implementation, or the one for the platform that the program is lowered for."""
    operands = (x, qweight, scale, zero_point, bias)
    if implementation == "xla" or x.shape[0] == 0:
        return int4_matmul_reference(*operands)
    m, k = x.shape
    n, groups, has_zero_point = scale.shape[1], scale.shape[0], zero_point is not None
    chosen = config or default_config(m, k, n, groups, x.dtype, has_zero_point, scale.dtype)
    kernel = functools.partial(int4_matmul_mosaic_gpu, config=chosen)
    if implementation == "mosaic_gpu":
        return kernel(*operands)
    return jax.lax.platform_dependent(*operands, cuda=kernel, default=int4_matmul_reference)
