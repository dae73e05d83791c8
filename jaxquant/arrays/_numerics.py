"""Pure array maths of quantization: block grids, ranges, scales, rounding.

A *scale grid* has the rank of its tensor, and each of its dimensions divides the tensor's: element `i` of a dimension
belongs to grid cell `i // (size // cells)`. Per tensor, channel, group and block are all grids, so one piece of code
serves every granularity.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxquant.arrays._qtypes import decode_codes, encode_values
from jaxquant.arrays._spec import Granularity, PerBlock, PerGroup, PerTensor, TensorSpec

# GPTQ's range search (Frantar et al. 2022, reference code): shrink the range in steps of 1 %, down to 20 %, and keep
# the shrink of least sum |error|^2.4.
SHRINK_STEPS = 80
SHRINK_STEP = 0.01
ERROR_NORM = 2.4
MAX_SUGGESTED_GROUP = 512


def padded_length(shape: tuple[int, ...], axis: tuple[int, ...], granularity: Granularity) -> int:
    """The length of the last contracting axis once padded to whole groups.

    Args:
        shape: the tensor's shape.
        axis: its contracting axes, negative and ascending.
        granularity: which elements share a scale.

    Returns:
        The axis's own length where groups already fit, else the next multiple of the group.

    >>> padded_length((100, 64), (-2,), PerGroup(32))
    128
    """
    length, size = shape[axis[-1]], _group_size(granularity)
    if size is None or _split_groups([shape[a] for a in axis], size) is not None:
        return length
    return -(-length // size) * size


def grid_shape(shape: tuple[int, ...], axis: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scale grid of a (padded) tensor.

    Args:
        shape: the tensor's shape.
        axis: its contracting axes, negative and ascending.
        granularity: which elements share a scale.

    Returns:
        A shape of the same rank whose every dimension divides the tensor's.

    Raises:
        ValueError: the group or block does not divide the axes (the message names sizes that would), or a block has
            no output axis behind the contracting ones.

    >>> grid_shape((256, 64), (-2,), PerGroup(128))
    (2, 64)
    """
    rank = len(shape)
    reduced = {rank + a for a in axis}
    if isinstance(granularity, PerTensor):
        first = min(reduced)
        return tuple(size if dim < first else 1 for dim, size in enumerate(shape))
    grid = [1 if dim in reduced else size for dim, size in enumerate(shape)]
    size = _group_size(granularity)
    if size is not None:
        for a, cells in zip(axis, _groups(shape, axis, size), strict=True):
            grid[a] = cells
    if isinstance(granularity, PerBlock):
        last = max(dim for dim in range(rank) if dim not in reduced or dim == min(reduced))
        if last in reduced:  # an output axis in front of `axis[0]` is a stack's, which scan and vmap may slice
            raise ValueError(
                f"PerBlock needs an output axis behind the contracting axes {axis} of shape {shape}:"
                " transpose the weight, or take PerGroup"
            )
        columns = granularity.shape[1]
        if shape[last] % columns:
            raise ValueError(
                f"block columns {columns} do not divide the {shape[last]} outputs; sizes that would:"
                f" {_nearest([n for n in range(8, shape[last] + 1) if shape[last] % n == 0], columns)}"
            )
        grid[last] = shape[last] // columns
    return tuple(grid)


def _group_size(granularity: Granularity) -> int | None:
    """Elements of a group along the contracting axes, or None where groups do not matter."""
    if isinstance(granularity, PerGroup):
        return granularity.size
    return granularity.shape[0] if isinstance(granularity, PerBlock) else None


def _split_groups(lengths: Sequence[int], size: int) -> list[int] | None:
    """Cells along each axis for groups of `size` neighbours of the flattened axes, or None where groups do not fit."""
    cells, remaining = [], size
    for length in reversed(lengths):
        inside = min(remaining, length)
        if length % inside or remaining % inside:
            return None
        cells.append(length // inside)
        remaining //= inside
    return cells[::-1] if remaining == 1 else None


def _groups(shape: tuple[int, ...], axis: tuple[int, ...], size: int) -> list[int]:
    lengths = [shape[a] for a in axis]
    cells = _split_groups(lengths, size)
    if cells is None:
        fitting = [n for n in range(8, min(math.prod(lengths), MAX_SUGGESTED_GROUP) + 1) if _split_groups(lengths, n)]
        length = " x ".join(map(str, lengths))
        raise ValueError(
            f"group size {size} does not divide the contracting length {length}; sizes that would:"
            f" {_nearest(fitting, size)}; or pad=True in the spec pads with zeros"
        )
    return cells


def _nearest(sizes: list[int], size: int) -> str:
    nearest = sorted(sorted(sizes, key=lambda n: abs(n - size))[:4])
    return ", ".join(map(str, nearest)) if nearest else "none of 8 or more"


def reduce_cells(reduction: Callable[..., jax.Array], x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Reduces each cell of a grid to one number.

    Args:
        reduction: `jnp.max` or its like, called with `axis`.
        x: the tensor.
        grid: the scale grid's shape.

    Returns:
        An array of shape `grid`.

    >>> reduce_cells(jnp.max, jnp.arange(8.0).reshape(4, 2), (2, 1)).tolist()
    [[3.0], [7.0]]
    """
    split, axes = [], []
    for size, cells in zip(x.shape, grid, strict=True):  # no dimensions of size 1: XLA copies to lay them out anew
        split += [size] if cells in (1, size) else [cells, size // cells]
        if cells != size:
            axes.append(len(split) - 1)
    return reduction(x.reshape(split), axis=tuple(axes)).reshape(grid) if axes else x


def expand_grid(grid: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats a grid to the shape of its tensor.

    >>> expand_grid(jnp.asarray([[1.0], [2.0]]), (4, 1))[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    if grid.shape == shape:
        return grid
    spread = jax.lax.expand_dims(grid, range(1, 2 * grid.ndim, 2))
    full = [n for size, cells in zip(shape, grid.shape, strict=True) for n in (cells, size // max(cells, 1))]
    return jnp.broadcast_to(spread, full).reshape(shape)


def find_range(x: jax.Array, grid: tuple[int, ...], spec: TensorSpec) -> tuple[jax.Array, jax.Array]:
    """Finds the range of each grid cell by the data-free methods.

    Args:
        x: float32 values.
        grid: the scale grid's shape.
        spec: its `range` method decides.

    Returns:
        (low, high), float32 of shape `grid`; low <= 0 <= high.

    Raises:
        ValueError: the method needs calibration data.
    """
    if spec.range not in ("absmax", "minmax", "percentile", "mse"):
        raise ValueError(
            f"range={spec.range!r} is a method for calibrated activations, not for a weight; accepted: absmax, minmax,"
            " percentile, mse"
        )
    # Two reductions, not one of |x|: XLA's CPU kernel for the plain ones is ten times as fast.
    low, high = jnp.minimum(reduce_cells(jnp.min, x, grid), 0), jnp.maximum(reduce_cells(jnp.max, x, grid), 0)
    if spec.range == "percentile":
        tail = reduce_cells(functools.partial(jnp.percentile, q=spec.percentile), jnp.abs(x), grid)
        tail = jnp.where(tail > 0, tail, jnp.inf)  # almost all zeros: cutting the rest would leave nothing
        low, high = jnp.maximum(low, -tail), jnp.minimum(high, tail)
    return low, high


def range_to_scale(low: jax.Array, high: jax.Array, spec: TensorSpec) -> tuple[jax.Array, jax.Array | None]:
    """Turns ranges into scales and zero points.

    A range of zero width gives scale 1, so that zeros come back as zeros. Scales are rounded to `spec.scale_dtype` (a
    power of two for mxfp4), never to zero and never to infinity.

    Args:
        low: least value of each cell, <= 0.
        high: greatest value, >= 0.
        spec: the format and grid.

    Returns:
        (scale in `spec.scale_dtype`, zero point as uint8 or None when symmetric).
    """
    qtype = spec.format
    if not spec.symmetric:
        steps = qtype.qmax - qtype.qmin
        scale = _round_scale((high / 2 - low / 2) / (steps / 2), high - low, spec)  # halves: high - low may overflow
        zero_point = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), qtype.qmin, qtype.qmax)
        return scale, zero_point.astype(jnp.uint8)
    absmax = jnp.maximum(-low, high)
    if spec.qtype == "mxfp4":
        return _power_of_two_scale(absmax, spec), None
    signed = jnp.where(high > -low, -absmax, absmax) if spec.grid == "signed" else absmax
    return _round_scale(signed / _span(spec), absmax, spec), None


def _span(spec: TensorSpec) -> float:
    """What a symmetric cell's largest magnitude becomes in units of the scale."""
    qtype = spec.format
    if qtype.kind != "int" or spec.grid == "restricted":
        return qtype.qmax
    return (qtype.qmax - qtype.qmin) / 2 if spec.grid == "full" else -qtype.qmin


def _scale_limits(dtype: str) -> tuple[float, float]:
    """The least and greatest scale of a dtype whose inverses are normal float32.

    float16 may use its subnormals, which float32 holds as normal numbers.
    """
    info, tiny = jnp.finfo(dtype), float(jnp.finfo(jnp.float32).tiny)
    return max(float(info.smallest_subnormal), tiny), min(float(info.max), 1 / tiny)


def _round_scale(scale: jax.Array, width: jax.Array, spec: TensorSpec) -> jax.Array:
    magnitude = jnp.clip(jnp.abs(scale), *_scale_limits(spec.scale_dtype))
    return jnp.where(width > 0, jnp.where(scale < 0, -magnitude, magnitude), 1.0).astype(spec.scale_dtype)


def _power_of_two_scale(absmax: jax.Array, spec: TensorSpec) -> jax.Array:
    """OCP Microscaling's shared exponent: floor(log2 absmax) - 2, where 2 is E2M1's largest exponent."""
    _, exponent = jnp.frexp(absmax)  # absmax = m 2^exponent with 1/2 <= m < 1; log2 would be off at powers of two
    least, most = (math.frexp(limit)[1] - 1 for limit in _scale_limits(spec.scale_dtype))
    scale = jnp.ldexp(jnp.ones_like(absmax), jnp.clip(exponent - 3, least, most))
    return jnp.where(absmax > 0, scale, 1.0).astype(spec.scale_dtype)


def encode(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: TensorSpec) -> jax.Array:
    """Rounds a tensor to codes, given its scale grid.

    Args:
        x: float32 values.
        scale: grid, any float dtype.
        zero_point: grid of integers, or None.
        spec: the format.

    Returns:
        Unpacked codes of the shape of `x`.
    """
    # XLA turns a division by a broadcast into a product with its inverse, but not for every form of broadcast. Writing
    # the product gives a tensor the same codes in every program.
    values = x * expand_grid(1.0 / scale.astype(jnp.float32), x.shape)
    if zero_point is not None:  # round before adding: ties must not depend on the zero point's parity
        values = jnp.round(values) + expand_grid(zero_point.astype(jnp.float32), x.shape)
    return encode_values(values, spec.format)


def search_shrink(
    x: jax.Array,
    low: jax.Array,
    high: jax.Array,
    spec: TensorSpec,
    weight: jax.Array | None = None,
    norm: float = ERROR_NORM,
    at_once: int = 1,
) -> jax.Array:
    """Searches the shrink of each cell's range that gives the least weighted |error|^norm.

    Args:
        x: float32 values.
        low: least value of each cell.
        high: greatest value of each cell.
        spec: the format and grid.
        weight: importance of each element, broadcastable to `x`, or None for equal.
        norm: the power of the error.
        at_once: candidates evaluated together, a divisor of 80: fewer launches on a GPU, more memory.

    Returns:
        float32 grid of factors in (0.2, 1].

    References:
        Frantar et al. 2022 (arXiv:2210.17323), reference implementation's `Quantizer.find_params` with `mse=True`.
    """
    # Errors are taken relative to the range, so that their power neither under- nor overflows.
    width = expand_grid(jnp.where(high > low, high - low, 1.0), x.shape)

    def score(factor):
        scale, zero_point = range_to_scale(low * factor, high * factor, spec)
        codes = encode(x, scale, zero_point, spec)
        error = (jnp.abs(decode(codes, scale, zero_point, spec) - x) / width) ** norm
        return reduce_cells(jnp.sum, error if weight is None else error * weight, low.shape)

    def try_shrinks(best, factors):
        shrink, least = best
        totals = jax.vmap(score)(factors)
        total = jnp.min(totals, 0)
        better = total < least
        return (jnp.where(better, factors[jnp.argmin(totals, 0)], shrink), jnp.where(better, total, least)), None

    factors = 1.0 - SHRINK_STEP * jnp.arange(SHRINK_STEPS, dtype=jnp.float32)
    start = (jnp.ones_like(low), jnp.full_like(low, jnp.inf))
    (shrink, _), _ = jax.lax.scan(try_shrinks, start, factors.reshape(-1, at_once))
    return shrink


def find_scale(x: jax.Array, grid: tuple[int, ...], spec: TensorSpec) -> tuple[jax.Array, jax.Array | None]:
    """Finds scale and zero point of each cell by the spec's data-free range method.

    Args:
        x: float32 values.
        grid: the scale grid's shape.
        spec: format, range method and grid form.

    Returns:
        (scale, zero point or None).
    """
    low, high = find_range(x, grid, spec)
    if spec.range == "mse":
        shrink = search_shrink(x, low, high, spec)
        low, high = low * shrink, high * shrink
    return range_to_scale(low, high, spec)


def decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: TensorSpec) -> jax.Array:
    """The float32 values that unpacked codes stand for."""
    return decode_values(decode_codes(codes, spec.format), scale, zero_point)


def decode_values(values: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """What float32 values of codes stand for once zero points are taken off and scales multiplied."""
    if zero_point is not None:
        values = values - expand_grid(zero_point.astype(jnp.float32), values.shape)
    return values * expand_grid(scale.astype(jnp.float32), values.shape)


def all_finite(x: jax.Array) -> jax.Array:
    """Whether no element is NaN or infinite, at the cost of one sum.

    XLA's max drops NaN on some backends, so a range tells nothing; a sum does not. Only where it overflows are the
    elements looked at one by one.

    Args:
        x: floating array.

    Returns:
        bool scalar.

    >>> bool(all_finite(jnp.asarray([1.0, jnp.nan]))), bool(all_finite(jnp.asarray([3e38, 3e38])))
    (False, True)
    """
    return jax.lax.cond(jnp.isfinite(jnp.sum(x)), lambda x: jnp.bool_(True), lambda x: jnp.all(jnp.isfinite(x)), x)
