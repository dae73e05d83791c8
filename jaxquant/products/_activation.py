"""Quantization of an activation at the moment it meets a quantized weight."""

import math

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._numerics import encode, find_scale, grid_shape
from jaxquant.arrays._qarray import QArray, pad_axis
from jaxquant.arrays._spec import PerGroup, PerTensor, TensorSpec


def to_x_dims(grid: jax.Array, dims: Dims, rank: int) -> jax.Array:
    """Lays a grid of the weight that varies along batch and contracting dimensions only over the dimensions of x."""
    source, target = dims.w_batch + dims.w_contract, dims.x_batch + dims.x_contract
    order = sorted(range(len(source)), key=lambda i: target[i])
    free = tuple(d for d in range(grid.ndim) if d not in source)
    shape = [1] * rank
    for s, t in zip(source, target, strict=True):
        shape[t] = grid.shape[s]
    return jnp.transpose(grid, (*(source[i] for i in order), *free)).reshape(shape)


def prepare(x: jax.Array, q: QArray, dims: Dims) -> jax.Array:
    """Brings x to what the codes of a weight expect: `pre_scale` multiplied in, `perm` applied, groups padded.

    Args:
        x: floating activation.
        q: the weight; its `pre_scale` and `perm` vary along batch and contracting dimensions only.
        dims: how they meet.

    Returns:
        The activation, in its own dtype.
    """
    if q.pre_scale is not None and any(q.pre_scale.shape[d] > 1 for d in dims.w_contract):
        x = x * to_x_dims(q.pre_scale, dims, x.ndim).astype(x.dtype)
    target, missing = padding(q, dims)
    if q.perm is not None:
        one_order = q.perm.size == q.perm.shape[q.axis[-1]]
        x = (
            jnp.take(x, q.perm.reshape(-1), axis=target, mode="clip")
            if one_order
            else jnp.take_along_axis(x, to_x_dims(q.perm, dims, x.ndim), axis=target, mode="clip")
        )
    return pad_axis(x, target - x.ndim, missing)


def padding(q: QArray, dims: Dims) -> tuple[int, int]:
    """The dimension of x that meets the packed axis, and the elements it lacks to whole groups; none: (0, 0)."""
    packed = q.ndim + q.axis[-1]
    if packed not in dims.w_contract:
        return 0, 0
    return dims.x_contract[dims.w_contract.index(packed)], q.padded - q.shape[packed]


def activation_grid(shape: tuple[int, ...], dims: Dims, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of an activation's scale grid.

    >>> activation_grid((2, 7, 64), Dims((2,), (0,)), TensorSpec("int8", PerTensor()))
    (1, 1, 1)
    """
    if isinstance(spec.granularity, PerTensor):
        return tuple(size if d in dims.x_batch else 1 for d, size in enumerate(shape))
    if isinstance(spec.granularity, PerGroup):
        return grid_shape(shape, tuple(sorted(d - len(shape) for d in dims.x_contract)), spec.granularity)
    return tuple(1 if d in dims.x_contract else size for d, size in enumerate(shape))


def quantize_activation(
    x: jax.Array,
    dims: Dims,
    spec: TensorSpec,
    act_scale: jax.Array | None = None,
    act_zero_point: jax.Array | None = None,
) -> QArray:
    """Quantizes an activation by its own range, or by a given static scale.

    Args:
        x: floating activation.
        dims: how it meets its weight.
        spec: format, granularity, grid form.
        act_scale: static scale, a grid of the weight that varies along batch dimensions only; None for dynamic.
        act_zero_point: static zero point, alike.

    Returns:
        The activation as a QArray whose codes are not packed.
    """
    values = jax.lax.stop_gradient(x).astype(jnp.float32)
    if act_scale is None:
        grid = activation_grid(x.shape, dims, spec)
        ranged = values if x.size else jnp.zeros(grid, jnp.float32)  # no rows at all have no range
        scale, zero_point = find_scale(ranged, grid, spec)
    else:
        scale = to_x_dims(act_scale, dims, x.ndim)
        zero_point = None if act_zero_point is None else to_x_dims(act_zero_point, dims, x.ndim)
        if zero_point is None and not spec.symmetric:
            raise ValueError(f"a static {spec.qtype} activation needs act_zero_point beside act_scale")
    return QArray(
        qvalue=encode(values, scale, zero_point, spec),
        scale=scale,
        zero_point=zero_point,
        pre_scale=None,
        act_scale=None,
        act_zero_point=None,
        perm=None,
        qtype=spec.qtype,
        axis=tuple(d - x.ndim for d in dims.x_contract),
        trailing=x.shape,
        padded=x.shape[dims.x_contract[-1]],
        dtype=x.dtype,
        activation=None,
    )


def free_size(x: jax.Array | QArray, dims: Dims) -> int:
    """How many rows an activation has beside its batch dimensions."""
    return math.prod(x.shape[d] for d in dims.x_free(x.ndim))
