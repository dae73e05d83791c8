"""Pure array maths of quantization: block grids, ranges, scales, rounding.

A *scale grid* has the rank of its tensor, and each of its dimensions divides the tensor's: element `i` of a dimension
belongs to grid cell `i // (size // cells)`. Per tensor, channel, group and block are all grids, so one piece of code
serves every granularity.
"""

import math

import jax
import jax.numpy as jnp

from jaxquant._qtypes import decode_codes, encode_values
from jaxquant._spec import Granularity, PerBlock, PerGroup, PerTensor, TensorSpec

# GPTQ's range search (Frantar et al. 2022, reference code): shrink the range in steps of 1 %, down to 20 %, and keep
# the shrink of least sum |error|^2.4.
SHRINK_STEPS = 80
SHRINK_STEP = 0.01
ERROR_NORM = 2.4


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
    length = shape[axis[-1]]
    if isinstance(granularity, PerGroup):
        size = granularity.size
    elif isinstance(granularity, PerBlock):
        size = granularity.shape[0]
    else:
        return length
    total = math.prod(shape[a] for a in axis)
    if length % size == 0 or (size % length == 0 and total % size == 0):
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
        ValueError: the group or block does not divide the axes; the message names sizes that would.

    >>> grid_shape((256, 64), (-2,), PerGroup(128))
    (2, 64)
    """
    rank = len(shape)
    reduced = {rank + a for a in axis}
    if isinstance(granularity, PerTensor):
        first = min(reduced)
        return tuple(size if dim < first else 1 for dim, size in enumerate(shape))
    grid = [1 if dim in reduced else size for dim, size in enumerate(shape)]
    if isinstance(granularity, PerBlock):
        rows, columns = granularity.shape
        last_output = max((dim for dim in range(rank) if dim not in reduced), default=None)
        if last_output is None:
            raise ValueError(f"PerBlock needs an output axis beside the contracting axes {axis} of shape {shape}")
        grid[last_output] = _cells(shape[last_output], columns, "block columns")
        _split_groups(grid, shape, axis, rows)
    elif isinstance(granularity, PerGroup):
        _split_groups(grid, shape, axis, granularity.size)
    return tuple(grid)


def _split_groups(grid: list[int], shape: tuple[int, ...], axis: tuple[int, ...], size: int) -> None:
    """Writes the cells of groups of `size` consecutive elements of the flattened contracting axes into `grid`."""
    remaining = size
    for a in reversed(axis):
        length = shape[a]
        if remaining >= length:
            if remaining % length:
                raise ValueError(_indivisible(math.prod(shape[i] for i in axis), size, "group"))
            remaining //= length
            grid[a] = 1
        else:
            grid[a] = _cells(length, remaining, "group")
            remaining = 1
    if remaining > 1:
        raise ValueError(_indivisible(math.prod(shape[i] for i in axis), size, "group"))


def _cells(length: int, size: int, what: str) -> int:
    if length % size:
        raise ValueError(_indivisible(length, size, what))
    return length // size


def _indivisible(length: int, size: int, what: str) -> str:
    fits = [d for d in range(min(length, 512), 7, -1) if length % d == 0]
    nearest = sorted(sorted(fits, key=lambda d: abs(d - size))[:4])
    sizes = ", ".join(map(str, nearest)) if nearest else "none of 8 or more"
    return f"{what} size {size} does not divide {length}; sizes that would: {sizes}; or pad=True in the spec pads with zeros"


def to_blocks(x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Splits each dimension into (cells, elements of a cell).

    >>> to_blocks(jnp.zeros((256, 64)), (2, 64)).shape
    (2, 128, 64, 1)
    """
    return x.reshape([n for size, cells in zip(x.shape, grid, strict=True) for n in (cells, size // cells if cells else 0)])


def block_axes(rank: int) -> tuple[int, ...]:
    """The within-cell axes of `to_blocks`."""
    return tuple(range(1, 2 * rank, 2))


def expand_grid(grid: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats a grid to the shape of its tensor.

    >>> expand_grid(jnp.asarray([[1.0], [2.0]]), (4, 1))[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    if grid.shape == shape:
        return grid
    spread = jax.lax.expand_dims(grid, block_axes(grid.ndim))
    full = [n for size, cells in zip(shape, grid.shape, strict=True) for n in (cells, size // cells)]
    return jnp.broadcast_to(spread, full).reshape(shape)


def find_range(x: jax.Array, grid: tuple[int, ...], spec: TensorSpec) -> tuple[jax.Array, jax.Array]:
    """Finds the range of each grid cell by the data-free methods.

    Args:
        x: float32 values.
        grid: the scale grid's shape.
        spec: its `range` method decides.

    Returns:
        (low, high), float32 of shape `grid`; low <= 0 <= high. For `grid="signed"` the end of larger magnitude is kept.

    Raises:
        ValueError: the method needs calibration data.
    """
    blocks, axes = to_blocks(x, grid), block_axes(x.ndim)
    if spec.range == "percentile":
        quantile = jnp.percentile(jnp.abs(blocks), spec.percentile, axis=axes)
        low, high = jnp.min(blocks, axes), jnp.max(blocks, axes)
        low, high = jnp.maximum(low, -quantile), jnp.minimum(high, quantile)
    elif spec.range in ("absmax", "minmax", "mse"):
        low, high = jnp.min(blocks, axes), jnp.max(blocks, axes)
    else:
        raise ValueError(f"range={spec.range!r} is a method for calibrated activations, not for a weight; accepted: absmax,"
                         " minmax, percentile, mse")
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def range_to_scale(low: jax.Array, high: jax.Array, spec: TensorSpec) -> tuple[jax.Array, jax.Array | None]:
    """Turns ranges into scales and zero points.

    A range of zero width gives scale 1, so that zeros come back as zeros. Scales are rounded to `spec.scale_dtype` (a
    power of two for mxfp4) and never round to zero.

    Args:
        low: least value of each cell, <= 0.
        high: greatest value, >= 0.
        spec: the format and grid.

    Returns:
        (scale in `spec.scale_dtype`, zero point as uint8 or None when symmetric).
    """
    qtype, dtype = spec.format, jnp.dtype(spec.scale_dtype)
    if not spec.symmetric:
        scale = _round_scale((high - low) / (qtype.qmax - qtype.qmin), spec)
        zero_point = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), qtype.qmin, qtype.qmax)
        return scale, zero_point.astype(jnp.uint8)
    absmax = jnp.maximum(-low, high)
    if qtype.kind == "int":
        span = {
            "full": (qtype.qmax - qtype.qmin) / 2,
            "restricted": qtype.qmax,
            "power": -qtype.qmin,
            "signed": -qtype.qmin,
        }[spec.grid]
        signed = jnp.where(high > -low, -absmax, absmax) if spec.grid == "signed" else absmax
        return _round_scale(signed / span, spec), None
    if spec.qtype == "mxfp4":  # OCP MX: the shared exponent is floor(log2 absmax) - 2, E2M1's largest exponent
        safe = jnp.where(absmax > 0, absmax, 4.0)
        return jnp.exp2(jnp.clip(jnp.floor(jnp.log2(safe)) - 2, -126, 127)).astype(dtype), None
    return _round_scale(absmax / qtype.qmax, spec), None


def _round_scale(scale: jax.Array, spec: TensorSpec) -> jax.Array:
    info = jnp.finfo(spec.scale_dtype)
    tiny, largest = float(info.tiny), float(info.max)
    magnitude = jnp.clip(jnp.abs(scale), tiny, largest)
    sign = jnp.where(scale < 0, -1.0, 1.0)
    return jnp.where(scale == 0, 1.0, sign * magnitude).astype(spec.scale_dtype)


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
    values = x / expand_grid(scale.astype(jnp.float32), x.shape)
    if zero_point is not None:  # round before adding: ties must not depend on the zero point's parity
        values = jnp.round(values) + expand_grid(zero_point.astype(jnp.float32), x.shape)
    return encode_values(values, spec.format)


def search_shrink(x: jax.Array, low: jax.Array, high: jax.Array, spec: TensorSpec, weight: jax.Array | None = None) -> jax.Array:
    """Searches the shrink of each cell's range that gives the least weighted |error|^2.4.

    Args:
        x: float32 values.
        low: least value of each cell.
        high: greatest value of each cell.
        spec: the format and grid.
        weight: importance of each element, broadcastable to `x`, or None for equal.

    Returns:
        float32 grid of factors in (0.2, 1].

    References:
        Frantar et al. 2022 (arXiv:2210.17323), reference implementation's `Quantizer.find_params` with `mse=True`.
    """
    axes = block_axes(x.ndim)

    def try_shrink(best, step):
        shrink, least = best
        factor = 1.0 - SHRINK_STEP * step.astype(jnp.float32)
        scale, zero_point = range_to_scale(low * factor, high * factor, spec)
        codes = encode(x, scale, zero_point, spec)
        error = jnp.abs(decode(codes, scale, zero_point, spec) - x) ** ERROR_NORM
        total = jnp.sum(to_blocks(error if weight is None else error * weight, low.shape), axes)
        better = total < least
        return (jnp.where(better, factor, shrink), jnp.where(better, total, least)), None

    start = (jnp.ones_like(low), jnp.full_like(low, jnp.inf))
    (shrink, _), _ = jax.lax.scan(try_shrink, start, jnp.arange(SHRINK_STEPS))
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
    values = decode_codes(codes, spec.format)
    if zero_point is not None:
        values = values - expand_grid(zero_point.astype(jnp.float32), codes.shape)
    return values * expand_grid(scale.astype(jnp.float32), codes.shape)
