"""Products that take a `QArray` where `jax.lax` takes an array: the explicit door for authors of quantized models.

`quantized(fn)` reaches the same functions from an unmodified model.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from jaxquant import _packed, _views
from jaxquant._activation import Dims, padding
from jaxquant._norms import Norm
from jaxquant._numerics import expand_grid
from jaxquant._outlier_products import outlier_product, outlier_refusal, ragged_outliers, split_outliers
from jaxquant._outliers import OutlierArray, dequantize_weight, view_weight
from jaxquant._packed import (
    FRAGMENT_LAYOUTS,
    INT4_CODES_LAYOUT,
    INT4_LAYOUT,
    INT4_LAYOUTS,
    INT8_LAYOUT,
    KERNEL_FORMATS,
    LOW_BIT_LAYOUT,
)
from jaxquant._products import bare, contract, product, ready_activation, refusal
from jaxquant._qarray import QArray, codes_of, pack_padded
from jaxquant._qtypes import as_signed, decode_codes
from jaxquant._ragged import expert_of_rows, ragged_product, ready_rows, round_rows
from jaxquant._spec import PerGroup, PerToken, TensorSpec
from jaxquant._views import Unrepresentable, packed_dim
from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.attention import attention as attention
from pallas_kernels.decode_attention import Cache as Cache
from pallas_kernels.decode_attention import decode_attention as decode_attention
from pallas_kernels.decode_attention import dequantize as dequantize_cache  # noqa: F401 - for kv_cache
from pallas_kernels.decode_attention import layout as kv_layout  # noqa: F401 - for kv_cache
from pallas_kernels.decode_attention import quantized_tokens as quantized_tokens
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul import interleave as interleave
from pallas_kernels.grouped_matmul import separate as separate
from pallas_kernels.grouped_matmul import supports as grouped_supports
from pallas_kernels.int4_matmul import Int4Weight
from pallas_kernels.int4_matmul import pack as pack_fragments
from pallas_kernels.int4_matmul import supports as fragments_support
from pallas_kernels.int4_matmul import unpack as unpack_fragments
from pallas_kernels.int4_matmul.core import packed_matmul
from pallas_kernels.int8_matmul import int8_matmul
from pallas_kernels.int8_matmul import pack as pack_int8
from pallas_kernels.int8_matmul import unpack as unpack_int8

KERNELS = {
    **dict.fromkeys(INT4_LAYOUTS, "int4_matmul"),
    LOW_BIT_LAYOUT: "low_bit_matmul",
    INT8_LAYOUT: "int8_matmul",
}
GROUPED = "grouped_matmul"
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
        shared = {} if shared is None else shared
        if _product_key(x, q, dims, dtype) not in shared:
            multiply_siblings(x, [(q, dims, dtype)], shared)
        return shared[_product_key(x, q, dims, dtype)][-1]
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
    stack, (_, n) = _packed.stack_dims(q), _packed.matrix_shape(q)
    if set(dims.w_contract) != set(_packed.contracting_dims(q)):
        return "it is summed over other axes than it was packed for"
    if any(d >= stack for d in dims.w_batch):
        return "an output of its packed matrices is a batch axis"
    if q.pre_scale is not None and any(q.pre_scale.shape[d] > 1 for d in dims.w_free(q.ndim)):
        return "its pre_scale lies along its outputs"
    tile = 64 if q.layout in FRAGMENT_LAYOUTS else 128
    if len(dims.w_batch) < stack and n % tile:
        return f"its {n} outputs do not fill tiles of {tile}, so that matrices do not lie side by side"
    if q.activation is None and dtype != x_dtype:
        return f"the kernel gives x's {x_dtype}, not {dtype}"
    takes = (jnp.bfloat16, jnp.float16, jnp.float32)
    if q.activation is not None and not (x_dtype in takes and dtype in takes):
        return f"the kernel takes no {x_dtype} and gives no {dtype}"
    if q.layout == INT8_LAYOUT:
        return None
    return _grouped_refusal(q, x_dtype, dtype) if dims.w_batch else _fragments_refusal(q, x_dtype)


def _fragments_refusal(q: QArray, x_dtype: jnp.dtype) -> str | None:
    """Why the kernels of the fragment-major layout cannot take a weight with activations of a dtype, or None."""
    if q.qtype not in KERNEL_FORMATS:
        return f"no kernel takes {q.qtype} weights; taken are {', '.join(KERNEL_FORMATS)}"
    if (q.format.kind == "uint") != (q.zero_point is not None):
        return f"{q.qtype} {'without' if q.zero_point is None else 'with'} zero points"
    k, n = _packed.matrix_shape(q)
    return fragments_support(
        k,
        n + -n % 64,
        math.prod(_packed.group_cells(q)),
        x_dtype if q.activation is None else q.activation.format.code_dtype,
        has_zero_point=q.zero_point is not None,
        scale_dtype=q.scale.dtype,
        qtype=KERNEL_FORMATS[q.qtype],
    )


def _grouped_refusal(q: QArray, x_dtype: jnp.dtype, dtype: jnp.dtype) -> str | None:
    """Why the grouped kernel cannot multiply rows sorted by the matrices of a packed stack, or None."""
    if q.layout == LOW_BIT_LAYOUT:
        return f"the grouped kernel takes no {q.qtype} weights with float activations"
    (k, _), groups = _packed.matrix_shape(q), math.prod(_packed.group_cells(q))
    codes = jnp.dtype(jnp.int32) if q.layout in INT4_LAYOUTS else q.qvalue.dtype
    if groups > 1 and q.layout not in INT4_LAYOUTS:
        return "the grouped kernel takes 8-bit weights with one scale a column"
    if q.activation is not None and (not q.activation.symmetric or isinstance(q.activation.granularity, PerGroup)):
        return "the grouped kernel takes activations with one scale a row and no zero point"
    return grouped_supports(
        k,
        groups,
        x_dtype if q.activation is None else q.activation.format.code_dtype,
        codes,
        has_zero_point=q.zero_point is not None,
        scale_dtype=q.scale.dtype,
        out_dtype=dtype,
    )


def multiply_siblings(x: jax.Array, products: Sequence[tuple[QArray, Dims, jnp.dtype]], shared: dict) -> None:
    """Multiplies x by packed weights, in one launch for all that are packed alike and need x in the same form.

    Args:
        x: the activation.
        products: each weight, how it meets x, and the dtype of the result; `kernel_refusal` has found nothing against.
        shared: where `dot_general` finds each product.
    """
    kinds: dict[tuple, tuple[_Rows, list]] = {}
    for q, dims, dtype in products:
        rows = _rows(x, q, dims, shared)
        groups = math.prod(_packed.group_cells(q))
        kind = (
            id(rows.values),
            q.layout,
            KERNEL_FORMATS[q.qtype],
            len(dims.w_batch),
            groups,
            q.scale.dtype,
            q.zero_point is None,
            dtype,
        )
        kinds.setdefault(kind, (rows, []))[1].append((q, dims))
    for (*_, dtype), (rows, siblings) in kinds.items():
        weights, all_dims = zip(*siblings, strict=True)
        launch = _launch if rows.scale is None else _launch_codes
        for q, dims, out in zip(weights, all_dims, launch(rows, weights, all_dims, dtype), strict=True):
            shared[_product_key(x, q, dims, dtype)] = x, q, out


def _product_key(x: jax.Array, q: QArray, dims: Dims, dtype: jnp.dtype) -> tuple:
    return "product", id(x), id(q), dims, jnp.dtype(dtype)


class _Rows(NamedTuple):
    """An activation as the kernels take it: [*batch, *free, K].

    Attributes:
        ready: the activation before it was laid out so, and rounded.
        values: itself, or its codes.
        scale: [..., 1], or a scale for each group of inputs, of codes.
        zero_point: int32 [..., 1] of codes that have one.
    """

    ready: jax.Array
    values: jax.Array
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None


def _rows(x: jax.Array, q: QArray, dims: Dims, shared: dict) -> _Rows:
    """Prepares and rounds an activation: once for all weights that need the same."""
    grid = None if q.activation is None or q.act_scale is not None else _kernel_grid(q.activation)
    by_kernel = dataclasses.replace(q, activation=None) if grid else q
    ready, codes = ready_activation(x, by_kernel, dims, shared)
    key = "rows", id(ready), id(codes), dims.x_batch, tuple(_packed.contracting_order(q, dims)), q.activation
    if key in shared:
        return shared[key]
    if codes is not None:
        shared[key] = _rounded_by_xla(ready, codes, q, dims)
    elif grid is None:
        shared[key] = _Rows(ready, _packed.to_rows(ready, q, dims))
    else:
        _, norm = shared.get(("norm", id(x)), (x, None))
        shared[key] = _Rows(ready, *_rounded_by_kernel(x, ready, norm, q, dims, grid))
    return shared[key]


def _rounded_by_kernel(
    x: jax.Array, ready: jax.Array, norm: Norm | None, q: QArray, dims: Dims, grid: dict
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of an activation; factors of the last dimension and the RMSNorm before them in the same pass."""
    by_last = (dims.x_contract, q.perm, padding(q, dims)[1]) == ((x.ndim - 1,), None, 0)
    factors = q.pre_scale
    if not by_last or (factors is not None and factors.size != x.shape[-1]):
        return activation_quant(_packed.to_rows(ready, q, dims), **grid)
    factors = None if factors is None else factors.reshape(-1)
    if norm is None:
        return activation_quant(_packed.to_rows(x, q, dims), pre_scale=factors, **grid)
    source = _packed.to_rows(norm.source, q, dims)
    return activation_quant(source, pre_scale=factors, norm_weight=norm.weight, epsilon=norm.epsilon, **grid)


def _rounded_by_xla(ready: jax.Array, codes: QArray, q: QArray, dims: Dims) -> _Rows:
    """The codes of an activation, those of uint8 as -128..127 with a zero point that follows them."""

    def every_row(grid: jax.Array) -> jax.Array:
        laid = _packed.to_rows(grid, q, dims)
        sizes = [ready.shape[d] for d in dims.x_batch]
        return jnp.broadcast_to(laid, (*sizes, *laid.shape[len(sizes) :]))

    values, scale = _packed.to_rows(codes.qvalue, q, dims), every_row(codes.scale)
    if codes.zero_point is None:
        return _Rows(ready, values, scale)
    zero = jnp.broadcast_to(every_row(codes.zero_point), (*values.shape[:-1], 1)).astype(jnp.int32) - 128
    return _Rows(ready, as_signed(values ^ jnp.uint8(128)), scale, zero)


def _kernel_grid(spec: TensorSpec) -> dict | None:
    """What `activation_quant` is to round to, or None where it has no such grid."""
    if not isinstance(spec.granularity, PerGroup | PerToken) or spec.range != "absmax":
        return None
    if spec.scale_dtype != "float32" or spec.grid == "signed" or spec.qtype not in ("int8", "float8_e4m3fn"):
        return None
    levels = {"full": 127.5, "restricted": 127.0, "power": 128.0}
    limit = levels[spec.grid] if spec.format.is_integer else spec.format.qmax
    return {
        "dtype": spec.format.code_dtype,
        "limit": limit,
        "group_size": spec.granularity.size if isinstance(spec.granularity, PerGroup) else None,
    }


def _launch(
    rows: _Rows, weights: Sequence[QArray], all_dims: Sequence[Dims], dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """The products [*batch, *free of x, *free of the weight] of rows with weights that are packed alike."""
    operands = [_operands(q, dims) for q, dims in zip(weights, all_dims, strict=True)]
    if weights[0].layout == INT8_LAYOUT:
        outs = [_int8_product(rows, operand, all_dims[0], dtype) for operand in operands]
    elif all_dims[0].w_batch:
        outs = [_batched_product(rows, operand, dtype) for operand in operands]
    else:
        options = {} if rows.scale is None else {"x_scale": rows.scale, "out_dtype": dtype}
        outs = packed_matmul(rows.values, operands, qtype=KERNEL_FORMATS[weights[0].qtype], **options)
    return tuple(
        _packed.to_free(out, rows.values, q, dims) for out, q, dims in zip(outs, weights, all_dims, strict=True)
    )


def _operands(q: QArray, dims: Dims) -> Int4Weight:
    """A weight as a kernel's operands, batches of matrices in front."""

    def of_grid(grid: jax.Array) -> jax.Array:
        return _packed.gather_matrices(_packed.grid_to_matrix(grid, q), q, dims, 1)

    codes = _packed.gather_matrices(q.qvalue, q, dims, 0)
    if q.layout == INT8_LAYOUT and _packed.is_blocked(q):
        return Int4Weight(codes, _packed.gather_matrices(_packed.block_scales(q), q, dims, 1))
    return Int4Weight(codes, of_grid(q.scale), None if q.zero_point is None else of_grid(q.zero_point))


def _batched_product(rows: _Rows, operand: Int4Weight, dtype: jnp.dtype) -> jax.Array:
    """A batch of products as the groups of one launch, each of as many rows."""
    batch = operand.scale.ndim - 2
    count, each = math.prod(rows.values.shape[:batch]), math.prod(rows.values.shape[batch:-1])
    leaves = [leaf.reshape(count, *leaf.shape[batch:]) for leaf in jax.tree.leaves(operand)]
    scale = None if rows.scale is None else rows.scale.reshape(-1, 1)
    values = rows.values.reshape(-1, rows.values.shape[-1])
    return grouped_matmul(values, *leaves, group_sizes=jnp.full(count, each, jnp.int32), x_scale=scale, out_dtype=dtype)


def _int8_product(rows: _Rows, operand: Int4Weight, dims: Dims, dtype: jnp.dtype) -> jax.Array:
    """Batches of matrices one by one."""
    scale = operand.scale.astype(jnp.float32)
    blocked = scale.shape[-2] > 1
    outputs = None if blocked else scale.shape[-1]

    def multiply(
        x: jax.Array, x_scale: jax.Array | None, zero: jax.Array | None, codes: jax.Array, scale: jax.Array
    ) -> jax.Array:
        return int8_matmul(x, codes, scale, x_scale, x_zero_point=zero, num_outputs=outputs, out_dtype=dtype)

    for _ in dims.w_batch:
        multiply = jax.vmap(multiply)
    return multiply(rows.values, rows.scale, rows.zero_point, operand.qweight, scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _launch_codes(
    rows: _Rows, weights: tuple[QArray, ...], all_dims: tuple[Dims, ...], dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """As `_launch`; the derivative passes straight through the rounding of x."""
    return _launch(rows, weights, all_dims, dtype)


@_launch_codes.defjvp
def _launch_codes_jvp(all_dims: tuple[Dims, ...], dtype: jnp.dtype, primals: tuple, tangents: tuple) -> tuple:
    slopes = [
        contract(tangents[0].ready, bare(_plain_array(q)), dims).astype(dtype)
        for q, dims in zip(primals[1], all_dims, strict=True)
    ]
    return _launch_codes(*primals, all_dims, dtype), tuple(slopes)


def is_packed(q: Quantized) -> bool:
    """Whether a weight lies in a kernel's layout."""
    return (q.base if isinstance(q, OutlierArray) else q).layout != "plain"


def packing_refusal(q: Quantized) -> str | None:
    """Says why no Hopper kernel takes a plain weight, or None when one does."""
    q = q.base if isinstance(q, OutlierArray) else q
    if len(q.axis) == q.ndim:
        return "it has no outputs"
    if q.qtype in ("int8", "float8_e4m3fn") and q.activation is not None:
        return _int8_refusal(q, q.activation)
    if q.activation is not None and isinstance(q.activation.granularity, PerGroup):
        return "the scales of its activation differ along its inputs"
    return _fragments_refusal(q, jnp.dtype(jnp.bfloat16))


def _int8_refusal(q: QArray, activation: TensorSpec) -> str | None:
    asymmetric = (q.qtype, activation.qtype) == ("int8", "uint8")
    if activation.qtype != q.qtype and not asymmetric:
        return f"its activation is quantized to {activation.qtype}; the kernel multiplies {q.qtype} by {q.qtype}"
    if activation.granularity == PerGroup(_packed.BLOCK) and q.act_scale is None:
        if _packed.is_blocked(q) and not asymmetric:
            return None
    elif not isinstance(activation.granularity, PerGroup) and math.prod(_packed.group_cells(q)) == 1:
        return None
    return "its scales differ along its inputs; the kernel takes blocks of 128 x 128 with activations in groups of 128"


def pack_array(q: Quantized) -> Quantized:
    """Packs a plain weight for its kernel; `plain` undoes it exactly.

    Args:
        q: a weight that `packing_refusal` lets pass.

    Returns:
        The weight in one of the layouts of `KERNELS`. Zero points are in units of signed codes and in the
        scale's dtype, which holds them exactly.
    """
    if isinstance(q, OutlierArray):
        return dataclasses.replace(q, base=pack_array(q.base))
    matrix = _packed.codes_to_matrix(codes_of(q), q)
    if q.activation is not None and q.format.bits == 8:
        return dataclasses.replace(q, qvalue=pack_int8(matrix), layout=INT8_LAYOUT)
    qvalue = pack_fragments(matrix, **_fragments(q))
    is_int4 = q.format.bits == 4 and q.format.is_integer
    layout = (INT4_LAYOUT if is_int4 else LOW_BIT_LAYOUT) if q.activation is None else INT4_CODES_LAYOUT
    middle = _packed.unsigned_middle(q)
    zero = None if q.zero_point is None else q.zero_point.astype(q.scale.dtype) - jnp.asarray(middle, q.scale.dtype)
    return dataclasses.replace(q, qvalue=qvalue, zero_point=zero, layout=layout)


def _fragments(q: QArray) -> dict:
    """The options of the fragment-major layout of a weight."""
    return {"x_bytes": 2 if q.activation is None else 1, "qtype": KERNEL_FORMATS[q.qtype]}


@overload
def plain(q: QArray) -> QArray: ...
@overload
def plain(q: Quantized) -> Quantized: ...
def plain(q: Quantized) -> Quantized:
    """Gives a weight in the plain layout, unpacking one that is packed for a kernel."""
    if isinstance(q, OutlierArray):
        return dataclasses.replace(q, base=_plain_array(q.base))
    return _plain_array(q)


def _plain_array(q: QArray) -> QArray:
    if q.layout == "plain":
        return q
    k, n = _packed.matrix_shape(q)
    if q.layout == INT8_LAYOUT:
        codes = _packed.codes_from_matrix(unpack_int8(q.qvalue, k, n), q)
        return dataclasses.replace(q, qvalue=codes, layout="plain")
    codes = _packed.codes_from_matrix(unpack_fragments(q.qvalue, **_fragments(q))[..., :k, :n], q)
    zero = q.zero_point
    if zero is not None:
        zero = (zero + jnp.asarray(_packed.unsigned_middle(q), zero.dtype)).astype(jnp.uint8)
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
        if ragged_implementation(rhs, lhs.dtype, dtype)[0] == GROUPED:
            return grouped_product(lhs, rhs, group_sizes, dtype)
        return ragged_product(lhs, plain(rhs), group_sizes, dtype)
    if rhs.axis != (-2,):
        raise NotImplementedError(
            f"ragged_dot: outlier channels along axis {rhs.axis}; those of K, (-2,), are accepted"
        )
    base, term = ragged_outliers(lhs, rhs, group_sizes)
    kept = lhs if rhs.base.activation is None else base
    return (ragged_product(kept, plain(rhs.base), group_sizes, term.dtype) + term).astype(dtype)


def grouped_product(
    x: jax.Array,
    q: QArray,
    group_sizes: jax.Array,
    dtype: jnp.dtype,
    *,
    activation: Literal["silu_mul"] | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """The ragged product by the grouped kernel, for which `ragged_implementation` has found the weight fit.

    Args:
        x: [M, K] rows sorted by expert.
        q: packed [E, K, N].
        group_sizes: [E].
        dtype: of the result.
        activation: `"silu_mul"` where the columns are a gate and an up projection, interleaved.
        row_scale: [M] factors of the result's rows.

    Returns:
        [M, N], or [M, N / 2] after an activation.
    """
    expert = expert_of_rows(group_sizes, x.shape[0])
    rows, x_scale = ready_rows(x, q, expert), None
    if q.activation is not None:
        rows, x_scale = _rounded_rows(rows, q, q.activation, expert)
    zero = None if q.zero_point is None else _packed.grid_to_matrix(q.zero_point, q)
    options = {"x_scale": x_scale, "activation": activation, "row_scale": row_scale, "out_dtype": dtype}
    return grouped_matmul(rows, q.qvalue, _packed.grid_to_matrix(q.scale, q), zero, group_sizes=group_sizes, **options)


def _rounded_rows(rows: jax.Array, q: QArray, spec: TensorSpec, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes, scales [M, 1]) of ready rows."""
    grid = None if q.act_scale is not None else _kernel_grid(spec)
    if grid is not None:
        return activation_quant(rows, **grid)
    codes = round_rows(rows, q, spec, expert)
    return codes.qvalue, jnp.broadcast_to(codes.scale, (rows.shape[0], 1)).astype(jnp.float32)


def ragged_implementation(q: Quantized, x_dtype: jnp.dtype, dtype: jnp.dtype) -> tuple[str, str]:
    """What `ragged_dot` multiplies this weight [E, K, N] with, and why not with the grouped kernel."""
    q = q.base if isinstance(q, OutlierArray) else q
    if q.layout == "plain":
        return "xla", ""
    if (_packed.stack_dims(q), _packed.contracting_dims(q)) != (1, (1,)):
        return "xla", "unpacked in the program: it is summed over other axes than it was packed for"
    why = _grouped_refusal(q, x_dtype, dtype)
    return (GROUPED, "") if why is None else ("xla", f"unpacked in the program: {why}")


def why_dense(q: Quantized, lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> str | None:
    """Why `dot_general` would refuse this weight, or None."""
    dims = pairing(lhs_is_weight, dimension_numbers)
    return outlier_refusal(q, dims) if isinstance(q, OutlierArray) else refusal(q, dims)


def implementation(
    q: Quantized, lhs_is_weight: bool, dimension_numbers: DimensionNumbers, x_dtype: jnp.dtype, dtype: jnp.dtype
) -> tuple[str, str]:
    """What `dot_general` multiplies this weight with, and why not with the kernel that it is packed for."""
    q = q.base if isinstance(q, OutlierArray) else q
    if q.layout == "plain":
        return "xla", ""
    dims = pairing(lhs_is_weight, dimension_numbers)
    why = kernel_refusal(q, dims, x_dtype, dtype)
    name = GROUPED if dims.w_batch and q.layout in INT4_LAYOUTS else KERNELS[q.layout]
    return (name, "") if why is None else ("xla", f"unpacked in the program: {why}")


def pairing(lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> Dims:
    """How the activation and the weight of a `dot_general` meet."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
        tuple(tuple(map(int, dims)) for dims in pair) for pair in dimension_numbers
    )
    if lhs_is_weight:
        return Dims(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
    return Dims(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
