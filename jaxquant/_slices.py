"""Large weights quantized by slices as they are read: the codes of `quantize`, without the weight in memory.

Slices that have scales of their own are quantized alone. Where one scale spans them all (per tensor), a first pass
finds its range, and a second the codes. Ranges that are searched for (mse, percentile) need all that shares a scale at
once.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant._quantize import dequantize
from jaxquant.arrays._numerics import all_finite, encode, find_range, grid_shape, padded_length, range_to_scale
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray, dequantize_array, from_codes, pad_axis, quantize_array
from jaxquant.arrays._spec import QuantSpec, TensorSpec
from jaxquant.calibration._calibrated import not_finite
from jaxquant.storage._mapped import forget_pages, mapped_array

SLICE_BYTES = 1 << 21  # a larger weight is cut; what its slices take on the way adds up to a tenth of 470 MB
AT_ONCE = 2  # slices read and quantized
COARSE = 4  # times that size a slice may have before a second pass is preferred


@dataclasses.dataclass(frozen=True)
class Slicing:
    """How a weight is cut.

    Attributes:
        dim: the dimension that is cut, negative; never the packed one.
        size: its elements.
        width: those in a slice; the last slice may have fewer.
        cell: those that share a scale; more than a slice has where one scale spans all slices.
        grid: the shape of the whole weight's scale grid.
    """

    dim: int
    size: int
    width: int
    cell: int
    grid: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether all slices have the same scales."""
        return self.width < self.cell

    def starts(self) -> range:
        """Where the slices begin."""
        return range(0, self.size, self.width)

    def place(self, start: int, unit: int = 1) -> tuple[Any, ...]:
        """The index of a slice in an array that has one element for `unit` of the weight's along the dimension."""
        stop = min(start + self.width, self.size)
        return (..., slice(start // unit, -(-stop // unit)), *[slice(None)] * (-self.dim - 1))


def plan_slices(weight: jax.ShapeDtypeStruct, spec: QuantSpec, axis: tuple[int, ...]) -> Slicing | None:
    """Decides how to cut a weight so that its slices get the codes of the whole.

    Args:
        weight: its shape and dtype.
        spec: how it is quantized, to the nearest codes.
        axis: its contracting axes, negative and ascending.

    Returns:
        The cut, or None for a weight that is small or has to be whole.

    >>> plan_slices(jax.ShapeDtypeStruct((4096, 4096), jnp.float32), QuantSpec(TensorSpec("int8")), (-2,)).width
    128
    """
    shape, nbytes = weight.shape, math.prod(weight.shape) * weight.dtype.itemsize
    grid = grid_shape(_padded_shape(shape, spec.weight, axis), axis, spec.weight.granularity)
    wanted = max(1, -(-nbytes // SLICE_BYTES))
    alone, shared = [], []
    for dim, (size, cells) in enumerate(zip(shape, grid, strict=True), start=-len(shape)):
        if dim not in axis and cells > 1:
            cell = size // cells
            alone.append(Slicing(dim, size, cell * max(1, cells // wanted), cell, grid))
        elif dim != axis[-1] and cells == 1 and spec.weight.range in ("absmax", "minmax"):
            shared.append(Slicing(dim, size, max(1, size // wanted), size, grid))

    def part(cut: Slicing) -> float:
        return cut.width / cut.size

    best = min(reversed(alone), key=part, default=None)
    if best is None or part(best) * nbytes > COARSE * SLICE_BYTES:
        best = min([*reversed(shared), *reversed(alone)], key=part, default=None)
    return None if best is None or best.width == best.size else best


def quantize_slices(path: str, leaf: Any, spec: QuantSpec, axis: tuple[int, ...], cut: Slicing) -> QArray:
    """Quantizes slice by slice, straight into the arrays of the whole weight.

    Args:
        path: the weight's, for errors.
        leaf: an array, memory-mapped or not, or what reads a slice of one when it is indexed.
        spec: what `plan_slices` was given, as is the axis.
        axis: the contracting axes.
        cut: what it answered.

    Returns:
        The weight; every leaf is NumPy.

    Raises:
        ValueError: NaN or Inf in the weight.
    """

    def on_slice(fn: Callable[[Any], tuple[Any, jax.Array]], start: int) -> Any:
        result, finite = fn(leaf[cut.place(start)])
        forget_pages(leaf)
        if not finite:  # this waits for the slice
            raise not_finite(path, leaf[...])
        return result

    def fill(fn: Callable[[Any], tuple[Any, jax.Array]], start: int) -> None:
        for array, piece in zip(jax.tree.leaves(whole), jax.tree.leaves(on_slice(fn, start)), strict=True):
            array[cut.place(start, cut.size // array.shape[cut.dim])] = piece

    held = jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    abstract = jax.eval_shape(functools.partial(quantize_array, spec=spec, axis=axis), held)
    whole = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), abstract)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        code = functools.partial(_quantize_alone, spec=spec, axis=axis)
        if cut.shared:
            find = functools.partial(on_slice, functools.partial(_find_range, spec=spec.weight, grid=cut.grid))
            low, high = functools.reduce(_wider, pool.map(find, cut.starts()))
            scale, zero_point = _to_scale(low, high, spec.weight)
            code = functools.partial(_quantize_with, scale=scale, zero_point=zero_point, spec=spec, axis=axis)
        list(pool.map(functools.partial(fill, code), cut.starts()))
    return whole


def dequantized(leaf: QArray | OutlierArray, folder: pathlib.Path | None = None) -> np.ndarray:
    """The float weight that a quantized one stands for, made slice by slice.

    Args:
        leaf: the quantized weight.
        folder: where an array that takes no memory can lie in a file; None makes one in memory.

    Returns:
        An array of the weight's shape and dtype.
    """
    if not isinstance(leaf, QArray) or leaf.layout != "plain":
        return np.asarray(dequantize(leaf))
    cut = _plan_dequantizing(leaf)
    first = (cut.size, *np.delete(leaf.shape, cut.dim).tolist())  # slices lie side by side, each on pages of its own
    whole = np.empty(first, leaf.dtype) if folder is None else mapped_array(folder, first, leaf.dtype)
    whole = np.moveaxis(whole, 0, cut.dim)
    for start in cut.starts():
        whole[cut.place(start)] = _dequantize(_part_of(leaf, cut, start))
        forget_pages(whole)
    return whole


def _plan_dequantizing(q: QArray) -> Slicing:
    """The finest cut that goes through no cell; the whole of a vector."""
    wanted, cuts = max(1, q.size * q.dtype.itemsize // SLICE_BYTES), []
    for dim, (size, cells) in enumerate(zip(q.shape, q.scale.shape, strict=True), start=-q.ndim):
        unit = size // cells if cells > 1 else 1
        if dim != q.axis[-1]:
            cuts.append(Slicing(dim, size, unit * max(1, size // unit // wanted), unit, q.scale.shape))
    return min(reversed(cuts), key=lambda cut: cut.width / cut.size) if cuts else Slicing(-1, q.size, q.size, 1, (1,))


def _part_of(q: QArray, cut: Slicing, start: int) -> QArray:
    if cut.width == cut.size:
        return q
    part = jax.tree.map(lambda grid: grid[cut.place(start, cut.size // grid.shape[cut.dim])], q)
    trailing = list(q.trailing)
    if -cut.dim <= len(trailing):  # a dimension before these is read off the leaves
        trailing[cut.dim] = min(cut.width, cut.size - start)
    return dataclasses.replace(part, trailing=tuple(trailing))


def _padded_shape(shape: tuple[int, ...], spec: TensorSpec, axis: tuple[int, ...]) -> tuple[int, ...]:
    padded = list(shape)
    if spec.pad:
        padded[axis[-1]] = padded_length(shape, axis, spec.granularity)
    return tuple(padded)


def _wider(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(a[0], b[0]), np.maximum(a[1], b[1])


@functools.partial(jax.jit, static_argnames=("spec", "grid"))
def _find_range(w: jax.Array, spec: TensorSpec, grid: tuple[int, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return find_range(w.astype(jnp.float32), grid, spec), all_finite(w)


_to_scale = jax.jit(range_to_scale, static_argnames="spec")
_dequantize = jax.jit(dequantize_array)


@functools.partial(jax.jit, static_argnames=("spec", "axis"))
def _quantize_alone(w: jax.Array, spec: QuantSpec, axis: tuple[int, ...]) -> tuple[QArray, jax.Array]:
    return quantize_array(w, spec, axis), all_finite(w)


@functools.partial(jax.jit, static_argnames=("spec", "axis"))
def _quantize_with(
    w: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: QuantSpec, axis: tuple[int, ...]
) -> tuple[QArray, jax.Array]:
    """Quantizes a slice by given scales."""
    missing = _padded_shape(w.shape, spec.weight, axis)[axis[-1]] - w.shape[axis[-1]]
    codes = encode(pad_axis(w.astype(jnp.float32), axis[-1], missing), scale, zero_point, spec.weight)
    return from_codes(codes, scale, zero_point, spec, axis, w.shape, w.dtype), all_finite(w)
