"""Products of an activation and a quantized weight, for any grid against any contraction.

Where the grid has several cells along a contracting dimension, the sum is blocked: a partial product for each cell,
scaled, then added. Cells along every other dimension scale the result. So no float copy of a weight is made: codes
enter the product in the dtype of x (integers of up to eight bits are exact in bfloat16 and float16), or stay integers
when the activation is quantized too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._numerics import expand_grid
from jaxquant.arrays._qarray import QArray, codes_of, dequantize_array
from jaxquant.arrays._qtypes import as_signed, decode_codes
from jaxquant.arrays._views import Unrepresentable, packed_dim, refine, reshape, transpose, with_leading
from jaxquant.products._activation import free_size, padding, prepare, quantize_activation, to_x_dims


def refusal(q: QArray, dims: Dims) -> str | None:
    """Says why a weight has no quantized product over these dimensions, or None when it has.

    Args:
        q: the weight.
        dims: how it would meet an activation.

    Returns:
        The reason in words.
    """
    free, contract = dims.w_free(q.ndim), dims.w_contract

    def varies(grid: jax.Array | None, along: tuple[int, ...]) -> bool:
        return grid is not None and any(grid.shape[d] > 1 for d in along)

    if varies(q.pre_scale, free) and varies(q.pre_scale, contract):
        return "its pre_scale differs between outputs"
    if varies(q.perm, free) or (q.perm is not None and packed_dim(q) not in contract):
        return "its input order is not summed over"
    if q.activation is not None and varies(q.act_scale, (*free, *contract)):
        return "its activation scale differs between outputs"
    if packed_dim(q) in dims.w_batch and q.padded != q.shape[packed_dim(q)]:
        return "its padded axis is a batch axis"
    return None


def product(x: jax.Array, q: QArray, dims: Dims, dtype: jnp.dtype, shared: dict | None = None) -> jax.Array:
    """Multiplies an activation by a quantized weight.

    Args:
        x: floating activation.
        q: the weight.
        dims: how they meet.
        dtype: dtype of the result; sums are kept in float32 (int32 for integer products).
        shared: quantized activations of the same trace, so that products of one x quantize it once; filled here.

    Returns:
        [*batch, *free of x, *free of the weight].

    Raises:
        Unrepresentable: see `refusal`.
    """
    why = refusal(q, dims)
    if why is not None:
        raise Unrepresentable(why)
    ready, codes = ready_activation(x, q, dims, {} if shared is None else shared)
    weight = bare(q)
    result: Any = contract(ready, weight, dims) if codes is None else _straight_through(ready, codes, weight, dims)
    return _finish(result, q, dims).astype(dtype)


def ready_activation(x: jax.Array, q: QArray, dims: Dims, shared: dict) -> tuple[jax.Array, QArray | None]:
    """Prepares x, and rounds it to codes where the spec asks for them: once for all weights that need the same."""
    leaves = (x, q.pre_scale, q.perm, q.act_scale, q.act_zero_point)
    key = (*map(id, leaves), dims.x_contract, dims.x_batch, padding(q, dims), q.activation)
    if key not in shared:
        ready = prepare(x, q, dims)
        codes = None
        if q.activation is not None:
            codes = quantize_activation(ready, dims, q.activation, q.act_scale, q.act_zero_point)
        shared[key] = leaves, ready, codes  # holding the leaves keeps their ids theirs
    return shared[key][1:]


def bare(q: QArray) -> QArray:
    """The weight without what `prepare` has already applied to x."""
    return dataclasses.replace(q, pre_scale=None, perm=None, act_scale=None, act_zero_point=None, activation=None)


def _finish(result: jax.Array, q: QArray, dims: Dims) -> jax.Array:
    """Applies to a product what lies on the weight's free dimensions: a `pre_scale`, group padding."""
    free = dims.w_free(q.ndim)
    offset = result.ndim - len(free)
    if packed_dim(q) in free:
        place = free.index(packed_dim(q)) + offset
        result = jax.lax.slice_in_dim(result, 0, q.shape[packed_dim(q)], axis=place)
    if q.pre_scale is not None and any(q.pre_scale.shape[d] > 1 for d in free):
        order = (*dims.w_batch, *dims.w_contract, *free)
        sizes = [q.pre_scale.shape[d] for d in order]
        batch = len(dims.w_batch)
        middle = [1] * (offset - batch)
        factors = jnp.transpose(q.pre_scale, order).reshape([*sizes[:batch], *middle, *sizes[len(order) - len(free) :]])
        result = result * factors.astype(result.dtype)
    return result


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _straight_through(x: jax.Array, codes: QArray, q: QArray, dims: Dims) -> jax.Array:
    """The product of a quantized activation, whose derivative by x is that of the product without rounding x."""
    return contract(codes, q, dims)


@_straight_through.defjvp
def _straight_through_jvp(dims: Dims, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    _, codes, q = primals
    return contract(codes, q, dims), contract(tangents[0], q, dims)


def contract(x: jax.Array | QArray, w: QArray, dims: Dims) -> jax.Array:
    """Sums the product over the contracting dimensions, cell by cell.

    Few rows are multiplied with all cells at once, as a batch; more rows than a cell has elements go through a scan
    over the cells, so that the partial products never outgrow the weight. Where cells are so small that scaling x is
    less work than scaling partial products, x is scaled.

    Args:
        x: floating or quantized activation, prepared.
        w: the weight, its scale, zero point and codes only.
        dims: how they meet.

    Returns:
        float32 [*batch, *free of x, *free of w].
    """
    counts = cell_counts(x, w, dims)
    blocked = next((i for i, count in enumerate(counts) if count > 1), None)
    if blocked is None:
        return _batched(x, w, dims, counts)
    try:
        if _folding_is_smaller(w, dims, counts):
            return _folded(dequantize_array(x) if isinstance(x, QArray) else x, w, dims)
        if free_size(x, dims) * counts[blocked] > w.shape[dims.w_contract[blocked]]:
            return scan_cells(contract, x, w, dims, blocked, counts[blocked])
    except Unrepresentable:  # cells of a table format that do not end on a byte
        pass
    return _batched(x, w, dims, counts)


def scan_cells(
    step: Callable[..., jax.Array],
    x: jax.Array | QArray,
    w: QArray,
    dims: Dims,
    pair: int,
    cells: int,
) -> jax.Array:
    """Adds `step(x, w, dims)` over the cells of one pair of contracting dimensions, one after the other."""
    stacked = _lead(x, dims.x_contract[pair], cells), _lead(w, dims.w_contract[pair], cells)
    first = step(*jax.tree.map(lambda leaf: leaf[0], stacked), dims)
    rest = jax.tree.map(lambda leaf: leaf[1:], stacked)
    return jax.lax.scan(lambda total, cell: (total + step(*cell, dims), None), first, rest)[0]


def cell_counts(x: jax.Array | QArray, w: QArray, dims: Dims) -> list[int]:
    """Cells along each contracting dimension that both grids can be refined to."""

    def held(v: jax.Array | QArray, dim: int) -> int:
        if not isinstance(v, QArray):
            return 1
        return math.lcm(v.scale.shape[dim], 1 if v.zero_point is None else v.zero_point.shape[dim])

    return [math.lcm(held(x, a), held(w, b)) for a, b in zip(dims.x_contract, dims.w_contract, strict=True)]


def _lead(v: jax.Array | QArray, dim: int, cells: int) -> jax.Array | QArray:
    """Splits a dimension into cells and brings them to the front."""
    if isinstance(v, QArray):
        v = _as_unpadded(v)
    split = [*v.shape[:dim], cells, v.shape[dim] // cells, *v.shape[dim + 1 :]]
    front = (dim, *range(dim), *range(dim + 1, v.ndim + 1))
    if not isinstance(v, QArray):
        return jnp.transpose(v.reshape(split), front)
    return with_leading(transpose(reshape(v, split), front))


def _as_unpadded(q: QArray) -> QArray:
    """Calls group padding part of the weight: x is padded alike."""
    shape = [q.padded if d == packed_dim(q) else n for d, n in enumerate(q.shape)]
    return dataclasses.replace(q, trailing=tuple(shape[len(q.lead) :]))


def _folding_is_smaller(w: QArray, dims: Dims, counts: list[int]) -> bool:
    """Whether scaling x for each cell of the free dimensions is less than a partial product for each cell summed over.

    So it is where the scale lies along what is summed: a per-channel weight met from its output side.
    """
    shape, free = _as_unpadded(w).shape, dims.w_free(w.ndim)
    partial = math.prod(shape[d] for d in free) * math.prod(counts)
    folded = math.prod(shape[d] for d in dims.w_contract) * math.prod(w.scale.shape[d] for d in free)
    return folded < partial


def _folded(x: jax.Array, w: QArray, dims: Dims) -> jax.Array:
    """The product with the scale multiplied into x, once for each cell of the free dimensions."""
    free = dims.w_free(w.ndim)
    varying = next((d for d in free if w.scale.shape[d] > 1), None)
    if varying is not None:
        cells = _lead(w, varying, w.scale.shape[varying])
        parts = jnp.moveaxis(
            jax.lax.map(lambda cell: _folded(x, cell, dims), cells), 0, free.index(varying) - len(free) - 1
        )
        place = parts.ndim - len(free) - 1 + free.index(varying)
        return parts.reshape(*parts.shape[:place], -1, *parts.shape[place + 2 :])
    scale = w.scale.astype(jnp.float32)
    for d in (*dims.w_contract, *dims.w_batch):
        scale = refine(scale, d, _as_unpadded(w).shape[d])
    scaled = x.astype(jnp.float32) * to_x_dims(scale, dims, x.ndim)
    numbers = ((dims.x_contract, dims.w_contract), (dims.x_batch, dims.w_batch))
    return jax.lax.dot_general(scaled, _float_values(w, jnp.float32), numbers, preferred_element_type=jnp.float32)


class _Side(NamedTuple):
    """One factor of a blocked product: values, the zero points not yet subtracted, and the dimensions that pair."""

    values: jax.Array
    zero_point: jax.Array | None
    contract: tuple[int, ...]
    batch: tuple[int, ...]


def _batched(x: jax.Array | QArray, w: QArray, dims: Dims, counts: list[int]) -> jax.Array:
    """One blocked product with the cells as batch dimensions."""
    x_values, x_zero, w_values, w_zero, accumulator = meet(x, w)
    a = _Side(x_values, x_zero, dims.x_contract, dims.x_batch)
    b = _Side(w_values, w_zero, dims.w_contract, dims.w_batch)
    partial = _cell_products(a, b, counts, accumulator)
    batch, cells = len(dims.x_batch), sum(count > 1 for count in counts)
    rows, columns = len(dims.x_free(x.ndim)), len(dims.w_free(w.ndim))

    def left(grid: jax.Array) -> jax.Array:
        return grid.reshape(*grid.shape, *([1] * columns))

    def right(grid: jax.Array) -> jax.Array:
        return grid.reshape(*grid.shape[: batch + cells], *([1] * rows), *grid.shape[batch + cells :])

    partial = _correct_zero_points(partial, a, b, counts, left, right).astype(jnp.float32)
    scaled = partial * right(_canonical(w.scale, b, counts).astype(jnp.float32))
    if isinstance(x, QArray):
        scaled = scaled * left(_canonical(x.scale, a, counts).astype(jnp.float32))
    return jnp.sum(scaled, axis=tuple(range(batch, batch + cells))) if cells else scaled


def meet(x: jax.Array | QArray, w: QArray) -> tuple:
    """Values of both sides in dtypes that one product takes, zero points left to correct for, and the accumulator."""
    if not isinstance(x, QArray):
        dtype = jnp.dtype(x.dtype) if w.format.bits <= 8 else _at_least_float32(x.dtype)
        return x.astype(dtype), None, _float_values(w, dtype), None, _at_least_float32(dtype)
    if x.format.is_integer and w.format.is_integer and w.format.bits <= 8:
        return *_integer_values(x), *_integer_values(w), jnp.dtype(jnp.int32)
    if x.format.kind == "float" and (w.format.kind == "float" or (x.qtype, w.qtype) in _EXACT_IN_FLOAT8):
        dtype = x.format.code_dtype
        values = codes_of(w) if w.format.kind == "float" else _float_values(w, jnp.bfloat16).astype(dtype)
        return codes_of(x), None, values, None, jnp.dtype(jnp.float32)
    dtype = _at_least_float32(x.dtype) if w.format.bits > 8 else x.dtype
    return _float_values(x, dtype), None, _float_values(w, dtype), None, jnp.dtype(jnp.float32)


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)


# integers of magnitude up to 16 and the levels of E2M1 need no more than the four significant bits of e4m3
_EXACT_IN_FLOAT8 = {("float8_e4m3fn", name) for name in ("int2", "int3", "int4", "uint2", "uint3", "uint4", "mxfp4")}


def _float_values(q: QArray, dtype: jnp.dtype) -> jax.Array:
    codes = codes_of(q)
    values = decode_codes(codes, q.format, dtype)
    return values if q.zero_point is None else values - expand_grid(q.zero_point.astype(dtype), codes.shape)


def _integer_values(q: QArray) -> tuple[jax.Array, jax.Array | None]:
    """Values as int8, and a zero point still to subtract: eight unsigned bits leave no room for it."""
    codes = codes_of(q)
    if q.zero_point is None:
        return codes.astype(jnp.int8), None
    if q.format.packed:
        return as_signed(codes - expand_grid(q.zero_point, codes.shape)), None
    return as_signed(codes ^ jnp.uint8(128)), q.zero_point.astype(jnp.int32) - 128


def _cell_products(a: _Side, b: _Side, counts: list[int], accumulator: jnp.dtype) -> jax.Array:
    """[*batch, *cells, *free of a, *free of b], every cell summed by itself."""
    (a_values, a_inner, a_cells, a_batch), (b_values, b_inner, b_cells, b_batch) = _split(a, counts), _split(b, counts)
    numbers = ((a_inner, b_inner), (a_batch + a_cells, b_batch + b_cells))
    return jax.lax.dot_general(a_values, b_values, numbers, preferred_element_type=accumulator)


def _split(side: _Side, counts: list[int]) -> tuple[jax.Array, tuple, tuple, tuple]:
    """Splits blocked dimensions into (cells, elements): the values, their inner, cell and batch dimensions."""
    wanted = dict(zip(side.contract, counts, strict=True))
    shape, first, last = [], {}, {}
    for d, size in enumerate(side.values.shape):
        count = wanted.get(d, 1)
        first[d] = len(shape)
        shape += [count, size // count] if count > 1 else [size]
        last[d] = len(shape) - 1
    inner = tuple(last[d] for d in side.contract)
    cells = tuple(first[d] for d in side.contract if wanted[d] > 1)
    return side.values.reshape(shape), inner, cells, tuple(first[d] for d in side.batch)


def _canonical(grid: jax.Array, side: _Side, counts: list[int]) -> jax.Array:
    """A grid as [*batch, *cells, *free], free and batch dimensions either of size 1 or in full."""
    wanted = dict(zip(side.contract, counts, strict=True))
    for d, size in enumerate(side.values.shape):
        if grid.shape[d] > 1 or d in wanted:
            grid = refine(grid, d, wanted.get(d, size))
    free = tuple(d for d in range(grid.ndim) if d not in side.contract + side.batch)
    ordered = jnp.transpose(grid, (*side.batch, *side.contract, *free))
    whole = tuple(len(side.batch) + i for i, count in enumerate(counts) if count == 1)
    return jax.lax.squeeze(ordered, whole)


def _cell_sums(side: _Side, counts: list[int]) -> jax.Array:
    """The integer values summed over each cell: [*batch, *cells, *free]."""
    values, inner, cells, batch = _split(side, counts)
    free = tuple(d for d in range(values.ndim) if d not in inner + cells + batch)
    return jnp.sum(
        jnp.transpose(values, (*batch, *cells, *free, *inner)).astype(jnp.int32), tuple(range(-len(inner), 0))
    )


def _correct_zero_points(partial: jax.Array, a: _Side, b: _Side, counts: list[int], left, right) -> jax.Array:
    """Turns sum(a b) into sum((a - za) (b - zb)) = sum(a b) - za sum(b) - zb sum(a) + n za zb."""
    if a.zero_point is None and b.zero_point is None:
        return partial
    elements = math.prod(a.values.shape[d] for d in a.contract) // math.prod(counts)
    if b.zero_point is not None:
        b_zero = right(_canonical(b.zero_point, b, counts))
        partial = partial - b_zero * left(_cell_sums(a, counts))
    if a.zero_point is not None:
        a_zero = left(_canonical(a.zero_point, a, counts))
        partial = partial - a_zero * right(_cell_sums(b, counts))
        if b.zero_point is not None:
            partial = partial + elements * a_zero * b_zero
    return partial
