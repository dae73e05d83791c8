"""Products that take a `QArray` where `jax.lax` takes an array: the explicit door for authors of quantized models.

`quantized(fn)` reaches the same functions from an unmodified model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant import _views
from jaxquant._activation import Dims
from jaxquant._numerics import expand_grid
from jaxquant._products import product, refusal
from jaxquant._qarray import QArray, dequantize_array
from jaxquant._qtypes import decode_codes
from jaxquant._ragged import ragged_product
from jaxquant._views import Unrepresentable, packed_dim
from pallas_kernels.attention import attention as attention
from pallas_kernels.decode_attention import decode_attention as decode_attention

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot_general(
    lhs: jax.Array | QArray,
    rhs: jax.Array | QArray,
    dimension_numbers: DimensionNumbers,
    preferred_element_type: jnp.dtype | None = None,
    *,
    shared: dict | None = None,
) -> jax.Array:
    """Multiplies as `jax.lax.dot_general` does, with a quantized weight on either side.

    The weight stays in codes: per-channel scales multiply the result, per-group scales each group's partial sum. With
    an `activation` spec in the weight the other side is quantized too, and integers (or float8s) meet in the product.
    Derivatives reach the floating side straight through its rounding.

    Args:
        lhs: floating array or QArray.
        rhs: QArray or floating array; one side at least is quantized.
        dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)).
        preferred_element_type: dtype of the result; the floating side's own by default. Sums are kept in float32.
        shared: a dict that products in one trace hand on, so that each activation is quantized once.

    Returns:
        [*batch, *free of lhs, *free of rhs].

    Raises:
        NotImplementedError: both sides are quantized, or this weight has no product over these dimensions; the message
            says why.

    >>> from jaxquant._qarray import quantize_array
    >>> from jaxquant._spec import PRESETS
    >>> w = quantize_array(jnp.ones((128, 16)), PRESETS["w4a16"])
    >>> dot_general(jnp.ones((2, 128)), w, (((1,), (0,)), ((), ()))).shape
    (2, 16)
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
        tuple(tuple(map(int, dims)) for dims in pair) for pair in dimension_numbers
    )
    try:
        if isinstance(rhs, QArray) and not isinstance(lhs, QArray):
            dims = Dims(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
            return product(lhs, rhs, dims, preferred_element_type or lhs.dtype, shared)
        if isinstance(rhs, QArray) or not isinstance(lhs, QArray):
            raise NotImplementedError("dot_general: one side must be a QArray and the other a floating array")
        dims = Dims(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
        result = product(rhs, lhs, dims, preferred_element_type or rhs.dtype, shared)
    except Unrepresentable as error:
        raise NotImplementedError(f"dot_general: {error}") from error
    batch, rows = len(rhs_batch), len(dims.x_free(rhs.ndim))
    return jnp.moveaxis(result, range(batch, batch + rows), range(result.ndim - rows, result.ndim))


def take(q: QArray, indices: jax.Array, axis: int = 0, mode: str | jax.lax.GatherScatterMode = "fill") -> jax.Array:
    """Looks rows of a quantized weight up, and dequantizes those only.

    Args:
        q: for example an embedding [V, D].
        indices: integers of any shape; negative ones count from the end.
        axis: the dimension they index.
        mode: what out-of-range indices give: `"fill"` (NaN) or `"clip"`.

    Returns:
        Floating array of `q.dtype`, the dimensions of `indices` in place of `axis`.

    >>> from jaxquant._qarray import quantize_array
    >>> from jaxquant._spec import PRESETS
    >>> table = quantize_array(jnp.ones((10, 128)), PRESETS["w8a16"], axis=-1)
    >>> take(table, jnp.asarray([3, -1])).shape
    (2, 128)
    """
    dim, indices = axis % q.ndim, jnp.asarray(indices)
    indices = jnp.where(indices < 0, indices + q.shape[dim], indices)
    return take_rows(q, indices, dim, mode)


def take_rows(q: QArray, indices: jax.Array, dim: int, mode: str | jax.lax.GatherScatterMode) -> jax.Array:
    """`take` with a dimension counted from the front and negative indices out of range."""
    if dim != packed_dim(q):
        return dequantize_array(_views.take(q, indices, dim, mode))
    if q.perm is not None:
        raise NotImplementedError("take: the rows of an act-order weight lie in another order along this axis")
    return _take_packed(q, indices, dim, mode)


def _take_packed(q: QArray, indices: jax.Array, dim: int, mode: str | jax.lax.GatherScatterMode) -> jax.Array:
    """Rows that share bytes with their neighbours: two bytes hold any code of up to eight bits."""
    length = q.shape[dim]
    safe = jnp.clip(indices, 0, length - 1)
    bit = safe * q.format.bits
    first, shift = bit // 8, bit % 8

    def rows(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take(x, at, axis=dim, mode="clip")

    def of_cell(grid: jax.Array) -> jax.Array:
        return rows(grid, safe // (q.padded // grid.shape[dim]))

    codes = rows(q.qvalue, safe)
    if q.format.packed:
        trailing = [1] * (q.ndim - dim - 1)
        low, high = rows(q.qvalue, first).astype(jnp.uint16), rows(q.qvalue, first + 1).astype(jnp.uint16)
        word = (low | high << 8) >> shift.astype(jnp.uint16).reshape([1] * dim + [*indices.shape, *trailing])
        codes = (word & jnp.uint16(2**q.format.bits - 1)).astype(q.format.code_dtype)
        if q.format.kind == "int":
            codes = codes - jnp.asarray(-q.format.qmin, codes.dtype)
    values = decode_codes(codes, q.format)
    for name, apply in (("zero_point", jnp.subtract), ("scale", jnp.multiply), ("pre_scale", jnp.multiply)):
        if getattr(q, name) is not None:
            grid = of_cell(getattr(q, name)).astype(jnp.float32)
            values = apply(values, expand_grid(grid, values.shape))
    if mode in ("fill", jax.lax.GatherScatterMode.FILL_OR_DROP):
        inside = ((indices >= 0) & (indices < length)).reshape([1] * dim + [*indices.shape] + [1] * (q.ndim - dim - 1))
        values = jnp.where(inside, values, jnp.nan)
    return values.astype(q.dtype)


def ragged_dot(
    lhs: jax.Array, rhs: QArray, group_sizes: jax.Array, preferred_element_type: jnp.dtype | None = None
) -> jax.Array:
    """Multiplies as `jax.lax.ragged_dot` does: rows sorted by expert, each with its expert's quantized weight.

    Args:
        lhs: [M, K] floating rows.
        rhs: [E, K, N] quantized weight.
        group_sizes: [E] rows of each expert.
        preferred_element_type: dtype of the result; that of `lhs` by default.

    Returns:
        [M, N].

    >>> from jaxquant._qarray import quantize_array
    >>> from jaxquant._spec import PRESETS
    >>> experts = quantize_array(jnp.ones((2, 128, 16)), PRESETS["w4a16"])
    >>> ragged_dot(jnp.ones((5, 128)), experts, jnp.asarray([2, 3])).shape
    (5, 16)
    """
    if rhs.ndim != 3 or lhs.ndim != 2:
        raise NotImplementedError(
            f"ragged_dot: lhs [M, K] and rhs [E, K, N] are accepted, got {lhs.shape}, {rhs.shape}"
        )
    return ragged_product(lhs, rhs, group_sizes, preferred_element_type or lhs.dtype)


def why_dense(q: QArray, lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> str | None:
    """Why `dot_general` would refuse this weight, or None."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    dims = Dims(tuple(lhs_contract), tuple(rhs_contract), tuple(lhs_batch), tuple(rhs_batch))
    if lhs_is_weight:
        dims = Dims(dims.w_contract, dims.x_contract, dims.w_batch, dims.x_batch)
    return refusal(q, dims)
