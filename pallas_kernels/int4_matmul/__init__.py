"""int4 weights times 16-bit activations."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.config import Config, default_config, supports
from pallas_kernels.int4_matmul.layout import TILE, pack, unpack
from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.reference import dequantize, int4_matmul_reference

__all__ = [
    "Config",
    "Int4Weight",
    "default_config",
    "dequantize",
    "int4_matmul",
    "int4_matmul_many",
    "pack",
    "supports",
    "unpack",
]

Implementation = Literal["mosaic_gpu", "xla"]


class Int4Weight(NamedTuple):
    """One weight of `int4_matmul_many`; its fields are those of `int4_matmul`.

    Attributes:
      qweight: `[ceil(N / 64), ceil(K / 64), 2, 256]` int32, from `pack`.
      scale: `[K / group, N]`.
      zero_point: like `scale`, or None.
      bias: `[N]`, or None.
    """

    qweight: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    bias: jax.Array | None = None


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
    weight = Int4Weight(qweight, scale, zero_point, bias)
    return int4_matmul_many(x, [weight], pre_scale=pre_scale, implementation=implementation, config=config)[0]


def int4_matmul_many(
    x: jax.Array,
    weights: Sequence[Int4Weight],
    *,
    pre_scale: jax.Array | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> list[jax.Array]:
    """Multiply the same activations by several int4 weights in one launch: q, k and v, or gate and up.

    Each product is what `int4_matmul` gives; the outputs of all weights are cut into the tiles of one launch, so that
    small weights share its cost. Nothing is copied: the weights stay where they are.

    Args:
      x: `[..., K]` bfloat16 or float16.
      weights: alike in K, in the groups and dtype of their scales, and in having zero points or not.
      pre_scale: `[K]`; x is multiplied by it first.
      implementation: as for `int4_matmul`.
      config: the kernel's configuration; by default that of one weight with all their outputs.

    Returns:
      `[..., N]` in x's dtype for each weight.

    Raises:
      ValueError: for operands whose shapes do not fit, or weights that are not alike.
      NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> weight = Int4Weight(pack(jnp.ones((128, 64), jnp.int8)), jnp.full((1, 64), 0.5, jnp.bfloat16))
    >>> [out.shape for out in int4_matmul_many(jnp.ones((2, 128), jnp.bfloat16), [weight, weight])]
    [(2, 64), (2, 64)]
    """
    weights = [Int4Weight(*weight) for weight in weights]
    for weight in weights:
        _check(x, *weight)
    if len({(w.scale.shape[0], w.scale.dtype, w.zero_point is None) for w in weights}) != 1:
        raise ValueError("int4_matmul_many: the weights differ in the groups or dtype of scales, or in zero points")
    if pre_scale is not None:
        if pre_scale.shape != x.shape[-1:]:
            raise ValueError(f"pre_scale has shape {pre_scale.shape}, expected {x.shape[-1:]}")
        x = x * pre_scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + x.shape[-1:])
    k, padded = x.shape[-1], tuple(map(_padded, weights))
    outputs = sum(weight.scale.shape[1] for weight in padded)
    head = padded[0]
    reason = supports(
        k,
        outputs,
        head.scale.shape[0],
        x.dtype,
        config=config,
        has_zero_point=head.zero_point is not None,
        scale_dtype=head.scale.dtype,
    )
    if implementation is None and reason is not None:
        implementation = "xla"
    elif implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"int4_matmul: {reason}")
    elif implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    outs = _multiply_jit(implementation, config, x.reshape(-1, k), padded)
    cuts = [(out.shape[1], weight.scale.shape[1]) for out, weight in zip(outs, weights, strict=True)]
    return [out.reshape(*x.shape[:-1], held)[..., :n] for out, (held, n) in zip(outs, cuts, strict=True)]


def _padded(weight: Int4Weight) -> Int4Weight:
    """The outputs filled up to the tiles of the packed codes; zero points in the dtype of the scales."""
    pad = weight.qweight.shape[0] * TILE - weight.scale.shape[1]
    zero_point = weight.zero_point
    if zero_point is not None:
        zero_point = jnp.pad(zero_point.astype(weight.scale.dtype), ((0, 0), (0, pad)))
    scale = jnp.pad(weight.scale, ((0, 0), (0, pad)))
    return Int4Weight(
        weight.qweight, scale, zero_point, None if weight.bias is None else jnp.pad(weight.bias, (0, pad))
    )


def _check(x, qweight, scale, zero_point, bias):
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
    for name, array, shape in (("zero_point", zero_point, scale.shape), ("bias", bias, (n,))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(implementation, config, x, weights):
    """`[M, K]` to `[M, N]` for each weight, all padded; the differentiable and batchable core."""
    return _batchable(implementation, config)(x, weights)


def _multiply_forward(implementation, config, x, weights):
    return _multiply(implementation, config, x, weights), (x, weights)


def _multiply_backward(implementation, config, residuals, cotangents):
    del implementation, config
    x, weights = residuals
    _, vjp = jax.vjp(
        lambda x, floats: tuple(int4_matmul_reference(x, w.qweight, *f) for w, f in zip(weights, floats, strict=True)),
        x,
        tuple(weight[1:] for weight in weights),
    )
    dx, slopes = vjp(cotangents)
    return dx, tuple(Int4Weight._make((None, *slope)) for slope in slopes)


_multiply.defvjp(_multiply_forward, _multiply_backward)
# A model calls the same product in every layer: traced and lowered once.
_multiply_jit = jax.jit(_multiply, static_argnums=(0, 1))


@functools.cache
def _batchable(implementation, config):
    """The product with its vmap rule: batched tokens fold into M, batched weights are mapped over."""

    @jax.custom_batching.custom_vmap
    def product(x, weights):
        return _dispatch(implementation, config, x, weights)

    @product.def_vmap
    def batched(axis_size, in_batched, x, weights):
        every = [True] * len(weights)
        if not any(jax.tree.leaves(in_batched[1])):
            outs = product(x.reshape(-1, x.shape[-1]), weights)
            return tuple(out.reshape(axis_size, -1, out.shape[-1]) for out in outs), tuple(every)
        leaves, tree = jax.tree.flatten((x, weights))
        flags = jax.tree.leaves(in_batched)
        mapped = [leaf if flag else None for leaf, flag in zip(leaves, flags, strict=True)]

        def one(slices):
            held = [s if flag else leaf for s, leaf, flag in zip(slices, leaves, flags, strict=True)]
            return product(*tree.unflatten(held))

        return jax.lax.map(one, mapped), tuple(every)

    return product


def _dispatch(implementation, config, x, weights):
    """Run the named implementation, or the one for the platform that the program is lowered for."""
    if implementation == "xla" or x.shape[0] == 0:
        return _reference(x, weights)
    (m, k), head = x.shape, weights[0]
    n, groups = sum(weight.scale.shape[1] for weight in weights), head.scale.shape[0]
    chosen = config or default_config(m, k, n, groups, x.dtype, head.zero_point is not None, head.scale.dtype)
    kernel = functools.partial(int4_matmul_mosaic_gpu, config=chosen)
    if implementation == "mosaic_gpu":
        return kernel(x, weights)
    return jax.lax.platform_dependent(x, weights, cuda=kernel, default=_reference)


def _reference(x, weights):
    return tuple(int4_matmul_reference(x, *weight) for weight in weights)
