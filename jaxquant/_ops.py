"""Products that take a `QArray` where `jax.lax` takes an array: the explicit door for authors of quantized models.

`quantized(fn)` reaches the same functions from an unmodified model.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant import _packed, _views
from jaxquant._activation import Dims
from jaxquant._numerics import expand_grid
from jaxquant._outlier_products import outlier_product, outlier_refusal, ragged_outliers, split_outliers
from jaxquant._outliers import OutlierArray, dequantize_weight, view_weight
from jaxquant._products import product, ready_activation, refusal
from jaxquant._qarray import QArray, codes_of, pack_padded
from jaxquant._qtypes import decode_codes
from jaxquant._ragged import ragged_product
from jaxquant._views import Unrepresentable, packed_dim
from pallas_kernels.attention import attention as attention
from pallas_kernels.decode_attention import decode_attention as decode_attention
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul import pack as pack_int4
from pallas_kernels.int4_matmul import supports as int4_supports
from pallas_kernels.int4_matmul import unpack as unpack_int4

INT4_LAYOUT = "int4_fragments"  # the layout of pallas_kernels.int4_matmul
Quantized = QArray | OutlierArray
DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot_general(
    lhs: jax.Array | Quantized,
    rhs: jax.Array | Quantized,
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
        lhs: floating array or quantized weight.
        rhs: quantized weight or floating array; one side at least is quantized.
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
        if isinstance(rhs, Quantized) and not isinstance(lhs, Quantized):
            dims = Dims(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
            return _multiply(lhs, rhs, dims, preferred_element_type or lhs.dtype, shared)
        if isinstance(rhs, Quantized) or not isinstance(lhs, Quantized):
            raise NotImplementedError("dot_general: one side must be quantized and the other a floating array")
        dims = Dims(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
        result = _multiply(rhs, lhs, dims, preferred_element_type or rhs.dtype, shared)
    except Unrepresentable as error:
        raise NotImplementedError(f"dot_general: {error}") from error
    batch, rows = len(rhs_batch), len(dims.x_free(rhs.ndim))
    return jnp.moveaxis(result, range(batch, batch + rows), range(result.ndim - rows, result.ndim))


def _multiply(x: jax.Array, q: Quantized, dims: Dims, dtype: jnp.dtype, shared: dict | None) -> jax.Array:
    """The product by the kernel that the weight is packed for, or by XLA; outlier channels are a term of their own."""
    if isinstance(q, OutlierArray):
        base, outliers = split_outliers(x, q, dims)
        term = outlier_product(outliers, q, dims)
        kept = x if q.base.activation is None else base  # the base's own rows are zero there
        partial_dtype = term.dtype if q.base.layout == "plain" else x.dtype
        return (_multiply(kept, q.base, dims, partial_dtype, shared).astype(term.dtype) + term).astype(dtype)
    if q.layout != "plain" and kernel_refusal(q, dims, x.dtype, dtype) is None:
        return _int4_product(x, q, dims, {} if shared is None else shared)
    return product(x, plain(q), dims, dtype, shared)


def kernel_refusal(q: QArray, dims: Dims, x_dtype: jnp.dtype, dtype: jnp.dtype) -> str | None:
    """Says why the kernel that a weight is packed for cannot take a product, or None when it can.

    Args:
        q: a packed weight.
        dims: how it would meet an activation.
        x_dtype: dtype of the activation.
        dtype: dtype of the result.

    Returns:
        The reason in words.
    """
    stack, (k, n) = _packed.stack_dims(q), _packed.matrix_shape(q)
    if set(dims.w_contract) != set(_packed.contracting_dims(q)):
        return "it is summed over other axes than it was packed for"
    if any(d >= stack for d in dims.w_batch):
        return "an output of its packed matrices is a batch axis"
    if q.pre_scale is not None and any(q.pre_scale.shape[d] > 1 for d in dims.w_free(q.ndim)):
        return "its pre_scale lies along its outputs"
    if len(dims.w_batch) < stack and n % 64:
        return f"its {n} outputs do not fill tiles of 64, so that matrices do not lie side by side"
    if dtype != x_dtype:
        return f"the kernel gives x's {x_dtype}, not {dtype}"
    groups = math.prod(_packed.group_cells(q))
    zero = q.zero_point is not None
    return int4_supports(k, n + -n % 64, groups, x_dtype, has_zero_point=zero, scale_dtype=q.scale.dtype)


def _int4_product(x: jax.Array, q: QArray, dims: Dims, shared: dict) -> jax.Array:
    """[*batch, *free of x, *free of the weight]: batches of matrices one by one, other matrices side by side."""
    ready = ready_activation(x, q, dims, shared)[0]
    order = [dims.x_contract[dims.w_contract.index(d)] for d in _packed.contracting_dims(q)]
    rows = jnp.transpose(ready, (*dims.x_batch, *dims.x_free(ready.ndim), *order))
    batch, free = len(dims.x_batch), rows.shape[len(dims.x_batch) : rows.ndim - len(order)]
    rows = rows.reshape(*rows.shape[: rows.ndim - len(order)], -1)
    stack = _packed.stack_dims(q)
    beside = tuple(d for d in range(stack) if d not in dims.w_batch)

    def gather_matrices(leaf: jax.Array, columns: int) -> jax.Array:
        """Batches to the front; the matrices side by side along the dimension of N."""
        last = stack + columns
        between = tuple(range(stack, last))
        moved = jnp.transpose(leaf, (*dims.w_batch, *between, *beside, *range(last, leaf.ndim)))
        return moved.reshape(*moved.shape[: batch + columns], -1, *moved.shape[batch + columns + len(beside) + 1 :])

    grids = [None if g is None else _packed.grid_to_matrix(g, q) for g in (q.scale, q.zero_point)]
    operands = [gather_matrices(q.qvalue, 0), *(None if g is None else gather_matrices(g, 1) for g in grids)]
    multiply = int4_matmul
    for _ in range(batch):
        multiply = jax.vmap(multiply)
    out = multiply(rows, *operands)
    return out.reshape(*out.shape[:batch], *free, *(q.shape[d] for d in dims.w_free(q.ndim)))


def is_packed(q: Quantized) -> bool:
    """Whether a weight lies in a kernel's layout."""
    return (q.base if isinstance(q, OutlierArray) else q).layout != "plain"


def packing_refusal(q: Quantized) -> str | None:
    """Says why no Hopper kernel takes a plain weight, or None when one does."""
    q = q.base if isinstance(q, OutlierArray) else q
    if q.format.bits != 4 or not q.format.is_integer:
        return f"no kernel takes {q.qtype} weights packed; int4 and uint4 are"
    if q.activation is not None:
        return f"its activation is quantized to {q.activation.qtype}; the int4 kernel takes 16-bit ones"
    if (q.format.kind == "uint") != (q.zero_point is not None):
        return f"{q.qtype} {'without' if q.zero_point is None else 'with'} zero points"
    k, n = _packed.matrix_shape(q)
    if len(q.axis) == q.ndim:
        return "it has no outputs"
    groups, zero = math.prod(_packed.group_cells(q)), q.zero_point is not None
    return int4_supports(k, n + -n % 64, groups, jnp.bfloat16, has_zero_point=zero, scale_dtype=q.scale.dtype)


def pack_array(q: Quantized) -> Quantized:
    """Packs a plain weight for `pallas_kernels.int4_matmul`; `plain` undoes it exactly.

    Args:
        q: a weight that `packing_refusal` lets pass.

    Returns:
        The weight in the layout `INT4_LAYOUT`. Its zero points are in units of signed codes and in the scale's dtype,
        which holds them exactly.
    """
    if isinstance(q, OutlierArray):
        return dataclasses.replace(q, base=pack_array(q.base))
    qvalue = pack_int4(_packed.codes_to_matrix(codes_of(q), q))
    zero = None if q.zero_point is None else q.zero_point.astype(q.scale.dtype) - jnp.asarray(8, q.scale.dtype)
    return dataclasses.replace(q, qvalue=qvalue, zero_point=zero, layout=INT4_LAYOUT)


def plain(q: Quantized) -> Quantized:
    """Gives a weight in the plain layout, unpacking one that is packed for a kernel."""
    if isinstance(q, OutlierArray):
        return dataclasses.replace(q, base=plain(q.base))
    if q.layout != INT4_LAYOUT:
        return q
    k, n = _packed.matrix_shape(q)
    codes = _packed.codes_from_matrix(unpack_int4(q.qvalue)[..., :k, :n], q)
    zero = None if q.zero_point is None else (q.zero_point + jnp.asarray(8, q.zero_point.dtype)).astype(jnp.uint8)
    return dataclasses.replace(q, qvalue=pack_padded(codes, q.format, q.axis[-1]), zero_point=zero, layout="plain")


def take(q: Quantized, indices: jax.Array, axis: int = 0, mode: str | jax.lax.GatherScatterMode = "fill") -> jax.Array:
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


def take_rows(q: Quantized, indices: jax.Array, dim: int, mode: str | jax.lax.GatherScatterMode) -> jax.Array:
    """`take` with a dimension counted from the front and negative indices out of range."""
    q = plain(q)
    if isinstance(q, OutlierArray) or dim != packed_dim(q):
        return dequantize_weight(view_weight(q, lambda part: _views.take(part, indices, dim, mode)))
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
    lhs: jax.Array, rhs: Quantized, group_sizes: jax.Array, preferred_element_type: jnp.dtype | None = None
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
    dtype = preferred_element_type or lhs.dtype
    if not isinstance(rhs, OutlierArray):
        return ragged_product(lhs, plain(rhs), group_sizes, dtype)
    if rhs.axis != (-2,):
        raise NotImplementedError(f"ragged_dot: outlier channels along axis {rhs.axis}; those of K, (-2,), are accepted")
    base, term = ragged_outliers(lhs, rhs, group_sizes)
    kept = lhs if rhs.base.activation is None else base
    return (ragged_product(kept, plain(rhs.base), group_sizes, term.dtype) + term).astype(dtype)


def why_dense(q: Quantized, lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> str | None:
    """Why `dot_general` would refuse this weight, or None."""
    dims = _dims(lhs_is_weight, dimension_numbers)
    return outlier_refusal(q, dims) if isinstance(q, OutlierArray) else refusal(q, dims)


def implementation(
    q: Quantized, lhs_is_weight: bool, dimension_numbers: DimensionNumbers, x_dtype: jnp.dtype, dtype: jnp.dtype
) -> tuple[str, str]:
    """What `dot_general` multiplies this weight with, and why not with the kernel that it is packed for."""
    q = q.base if isinstance(q, OutlierArray) else q
    if q.layout == "plain":
        return "xla", ""
    why = kernel_refusal(q, _dims(lhs_is_weight, dimension_numbers), x_dtype, dtype)
    return ("int4_matmul", "") if why is None else ("xla", f"unpacked in the program: {why}")


def _dims(lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> Dims:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
        tuple(tuple(map(int, dims)) for dims in pair) for pair in dimension_numbers
    )
    if lhs_is_weight:
        return Dims(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
    return Dims(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
