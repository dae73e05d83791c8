"""What the products of packed weights share: checks, derivatives, batches, and the choice of what runs."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._batching import foldable
from pallas_kernels.int4_matmul.choice import default_config
from pallas_kernels.int4_matmul.config import Config, supports
from pallas_kernels.int4_matmul.formats import FORMATS
from pallas_kernels.int4_matmul.layout import TILE
from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic_gpu
from pallas_kernels.int4_matmul.reference import int4_matmul_reference

Implementation = Literal["mosaic_gpu", "xla"]


class Int4Weight(NamedTuple):
    """One weight of `int4_matmul_many`; its fields are those of `int4_matmul`.

    Attributes:
      qweight: `[ceil(N / 64), ceil(K / 64), 2, 256]` int32, from `pack` for activations of x's bytes.
      scale: `[K / group, N]`.
      zero_point: like `scale`, or None.
      bias: `[N]`, or None.
    """

    qweight: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    bias: jax.Array | None = None


def packed_matmul(
    x: jax.Array,
    weights: Sequence[Int4Weight],
    *,
    qtype: str,
    x_scale: jax.Array | None = None,
    pre_scale: jax.Array | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> list[jax.Array]:
    """Multiply as `int4_matmul_many` does, weights whose codes are of a format of `FORMATS`."""
    weights = [Int4Weight(*weight) for weight in weights]
    if not weights:
        raise ValueError("int4_matmul_many: weights is empty; it takes one or more")
    for weight in weights:
        _check(x, *weight, FORMATS[qtype].tile_k)
    if len({(w.scale.shape[0], w.scale.dtype, w.zero_point is None) for w in weights}) != 1:
        raise ValueError("int4_matmul_many: the weights differ in the groups or dtype of scales, or in zero points")
    _check_codes(x, x_scale, pre_scale, out_dtype)
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
        qtype=qtype,
    )
    if implementation is None and reason is not None:
        implementation = "xla"
    elif implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"{qtype} weights: {reason}")
    elif implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    rows = x.reshape(-1, k)
    if x_scale is not None:
        x_scale = jnp.broadcast_to(x_scale.astype(jnp.float32), (*x.shape[:-1], 1)).reshape(-1, 1)
    call = _Call(qtype, implementation, config, jnp.dtype(out_dtype or (x.dtype if x_scale is None else jnp.bfloat16)))
    outs = _multiply_jit(call, (rows, x_scale), padded)
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


def _check(x, qweight, scale, zero_point, bias, tile_k: int):
    """Refuse operands whose shapes do not fit, by name."""
    if x.ndim < 1 or scale.ndim != 2 or qweight.ndim != 4 or qweight.dtype != jnp.int32:
        raise ValueError(
            f"x is [..., K], qweight [N/64, K/{tile_k}, 2, 256] int32 (see pack) and scale [groups, N]; "
            f"got x {x.shape}, qweight {qweight.shape} {qweight.dtype}, scale {scale.shape} (vmap over stacked weights)"
        )
    k, (groups, n) = x.shape[-1], scale.shape
    packed = (-(-n // TILE), -(-k // tile_k), 2, 256)
    if qweight.shape != packed:
        raise ValueError(f"qweight has shape {qweight.shape}; x with K = {k} and scale with N = {n} need {packed}")
    if k % groups:
        raise ValueError(f"scale has {groups} groups, which do not divide K = {k}")
    for name, array, shape in (("zero_point", zero_point, scale.shape), ("bias", bias, (n,))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def _check_codes(x, x_scale, pre_scale, out_dtype):
    """Refuse codes without their scale, and what goes with codes only."""
    if (x.dtype in (jnp.int8, jnp.float8_e4m3fn)) != (x_scale is not None):
        raise TypeError(f"x is {x.dtype} {'with' if x_scale is not None else 'without'} x_scale; int8 and "
                        "float8_e4m3fn codes come with theirs, bfloat16 and float16 without")  # fmt: skip
    if x_scale is None:
        if out_dtype is not None and jnp.dtype(out_dtype) != x.dtype:
            raise TypeError(f"out_dtype={jnp.dtype(out_dtype).name}; the product of {x.dtype} has x's dtype")
        return
    if x_scale.shape not in ((*x.shape[:-1], 1), (1,) * x.ndim):
        raise ValueError(f"x_scale has shape {x_scale.shape}, expected {(*x.shape[:-1], 1)} or all ones")
    if pre_scale is not None:
        raise ValueError("pre_scale with codes x; multiply by it before quantizing (activation_quant's pre_scale)")
    if jnp.dtype(out_dtype or jnp.bfloat16) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"out_dtype={jnp.dtype(out_dtype).name}; accepted are bfloat16, float16 and float32")


class _Call(NamedTuple):
    """The static part of one call."""

    qtype: str
    implementation: Implementation | None
    config: Config | None
    out_dtype: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(call, rows, weights):
    """`[M, K]` (and its scale `[M, 1]` or None) to `[M, N]` for each weight, all padded: differentiable, batchable."""
    return _batchable(call)(rows, weights)


def _multiply_forward(call, rows, weights):
    return _multiply(call, rows, weights), (rows, weights)


def _multiply_backward(call, residuals, cotangents):
    (x, x_scale), weights = residuals
    floating = x if x_scale is None else x_scale

    def product(floating, floats):
        rows = (floating, None) if x_scale is None else (x, floating)
        return _reference(call, rows, [(w.qweight, *f) for w, f in zip(weights, floats, strict=True)])

    _, vjp = jax.vjp(product, floating, tuple(weight[1:] for weight in weights))
    slope, slopes = vjp(cotangents)
    rows = (slope, None) if x_scale is None else (None, slope)
    return rows, tuple(Int4Weight._make((None, *slope)) for slope in slopes)


_multiply.defvjp(_multiply_forward, _multiply_backward)
# A model calls the same product in every layer: traced and lowered once.
_multiply_jit = jax.jit(_multiply, static_argnums=0)


@functools.cache
def _batchable(call):
    return foldable(functools.partial(_dispatch, call))


def _dispatch(call, rows, weights):
    """Run the named implementation, or the one for the platform that the program is lowered for."""
    x, head, xla = rows[0], weights[0], functools.partial(_reference, call)
    m, k = x.shape
    if call.implementation == "xla" or m == 0:
        return xla(rows, weights)
    n, groups = sum(weight.scale.shape[1] for weight in weights), head.scale.shape[0]
    zero = head.zero_point is not None
    config = call.config or default_config(m, k, n, groups, x.dtype, zero, head.scale.dtype, call.qtype)

    def kernel(rows, weights):
        x, x_scale = rows
        x_scale = None if x_scale is None else x_scale.reshape(-1)
        options = {"out_dtype": call.out_dtype, "qtype": call.qtype, "config": config}
        return int4_matmul_mosaic_gpu(x, weights, x_scale, **options)

    if call.implementation == "mosaic_gpu":
        return kernel(rows, weights)
    return jax.lax.platform_dependent(rows, weights, cuda=kernel, default=xla)


def _reference(call, rows, weights):
    options = {"out_dtype": call.out_dtype, "qtype": call.qtype}
    return tuple(int4_matmul_reference(*rows, *weight, **options) for weight in weights)
