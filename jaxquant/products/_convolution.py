"""Convolution with a quantized kernel."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._spec import PerGroup
from jaxquant.arrays._views import refine, slice_dim, unpacked
from jaxquant.products._activation import quantize_activation, to_x_dims
from jaxquant.products._products import bare, meet


def convolution_refusal(q: QArray, params: dict) -> str | None:
    """Says why a kernel has no quantized convolution, or None when it has.

    Args:
        q: the convolution's right side.
        params: parameters of `conv_general_dilated`.

    Returns:
        The reason in words.
    """
    out, channel, *window = params["dimension_numbers"].rhs_spec
    grouped = params["feature_group_count"] > 1

    def varies(grid: jax.Array | None, along: list[int]) -> bool:
        return grid is not None and any(grid.shape[d] > 1 for d in along)

    if params["batch_group_count"] > 1:
        return "its batch is grouped"
    if varies(q.scale, [channel]) and grouped:
        return "its scale differs between inputs of a grouped convolution"
    if q.perm is not None or varies(q.pre_scale, [out, *window]) or (q.pre_scale is not None and grouped):
        return "its pre_scale or input order does not go through a window"
    if q.activation is not None and isinstance(q.activation.granularity, PerGroup):
        return "groups of its activation do not go through a window"
    return None


def convolution(x: jax.Array, q: QArray, params: dict, dtype: jnp.dtype) -> jax.Array:
    """Convolves x with a quantized kernel.

    Args:
        x: floating input.
        q: the kernel, in the dimensions that `params` names.
        params: parameters of `conv_general_dilated`.
        dtype: dtype of the result.

    Returns:
        What `lax.conv_general_dilated` gives.
    """
    spec = params["dimension_numbers"]
    if q.padded != q.shape[q.axis[-1]]:
        q = unpacked(q)
    dims = Dims((spec.lhs_spec[1],), (spec.rhs_spec[1],))
    if q.pre_scale is not None:
        x = x * to_x_dims(q.pre_scale, dims, x.ndim).astype(x.dtype)
    inputs = x
    if q.activation is not None:
        inputs = quantize_activation(
            x, Dims(spec.lhs_spec[1:], spec.rhs_spec[1:]), q.activation, q.act_scale, q.act_zero_point
        )
    parts = _cells(bare(q), inputs, params)
    terms = [_one_cell(x, kernel, params | {"padding": padding}) for kernel, x, padding in parts]
    return sum(terms[1:], terms[0]).astype(dtype)


def _cells(kernel: QArray, x: jax.Array | QArray, params: dict) -> Iterator[tuple[QArray, jax.Array | QArray, tuple]]:
    """Cuts a convolution into one for each scale along the kernel's window and input channels.

    A part of the window sees x through padding reduced by what lies before and after it.
    """
    spec = params["dimension_numbers"]
    channel, *window = spec.rhs_spec[1:]
    for place in itertools.product(*(range(kernel.scale.shape[d]) for d in (channel, *window))):
        part, inputs, padding = kernel, x, list(params["padding"])
        for cell, dim in zip(place, (channel, *window), strict=True):
            length = kernel.shape[dim]
            size = length // kernel.scale.shape[dim]
            if size == length:
                continue
            start, limit = cell * size, (cell + 1) * size
            part = slice_dim(part, dim, start, limit)
            if dim == channel:
                inputs = _channels(inputs, spec.lhs_spec[1], start, limit)
            else:
                side, step = window.index(dim), params["rhs_dilation"][window.index(dim)]
                low, high = padding[side]
                padding[side] = (low - start * step, high - (length - limit) * step)
        yield part, inputs, tuple(padding)


def _channels(x: jax.Array | QArray, dim: int, start: int, limit: int) -> jax.Array | QArray:
    if isinstance(x, QArray):
        return slice_dim(x, dim, start, limit)
    return jax.lax.slice_in_dim(x, start, limit, axis=dim)


def _one_cell(x: jax.Array | QArray, w: QArray, params: dict) -> jax.Array:
    """Convolves where each output channel has one scale: float32."""
    spec = params["dimension_numbers"]
    x_values, x_zero, w_values, w_zero, accumulator = meet(x, w)
    if w_zero is not None:  # eight unsigned bits: subtracting before the product costs a wider dtype, and is exact
        w_values, x_values, accumulator = (
            w_values.astype(jnp.float32) - w_zero,
            x_values.astype(jnp.float32),
            jnp.float32,
        )

    def convolve(values: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            values,
            w_values,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            spec,
            params["feature_group_count"],
            params["batch_group_count"],
            preferred_element_type=accumulator,
        )

    def per_output(grid: jax.Array) -> jax.Array:
        shape = [1] * w.ndim
        shape[spec.out_spec[1]] = w.shape[spec.rhs_spec[0]]
        return refine(grid.reshape(-1), 0, w.shape[spec.rhs_spec[0]]).reshape(shape)

    total = convolve(x_values)
    if x_zero is not None:  # padding is a true zero: it takes part in neither sum
        total = total - x_zero.reshape(_by_sample(x_zero, spec)) * convolve(jnp.ones_like(x_values[:1]))
    total = total.astype(jnp.float32) * per_output(w.scale).astype(jnp.float32)
    return total * x.scale.astype(jnp.float32).reshape(_by_sample(x.scale, spec)) if isinstance(x, QArray) else total


def _by_sample(grid: jax.Array, spec: jax.lax.ConvDimensionNumbers) -> list[int]:
    shape = [1] * grid.ndim
    shape[spec.out_spec[0]] = grid.shape[spec.lhs_spec[0]]
    return shape
