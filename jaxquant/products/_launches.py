"""Products with packed weights: which ones a kernel takes, and its launches."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant._kernels import Int4Weight, Int8Weight, grouped_matmul, int8_matmul, int8_matmul_many, packed_matmul
from jaxquant.arrays import _packed
from jaxquant.arrays._dims import Dims
from jaxquant.arrays._packed import FRAGMENT_LAYOUTS, INT4_LAYOUTS, INT8_LAYOUT, KERNEL_FORMATS, LOW_BIT_LAYOUT
from jaxquant.arrays._packing import fragments_refusal, plain
from jaxquant.arrays._qarray import QArray
from jaxquant.products._grouped import GROUPED, grouped_refusal
from jaxquant.products._products import bare, contract
from jaxquant.products._rows import Rows, rows_of

KERNELS = {
    **dict.fromkeys(INT4_LAYOUTS, "int4_matmul"),
    LOW_BIT_LAYOUT: "low_bit_matmul",
    INT8_LAYOUT: "int8_matmul",
}


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
    return grouped_refusal(q, x_dtype, dtype) if dims.w_batch else fragments_refusal(q, x_dtype)


def kernel_name(q: QArray, dims: Dims) -> str:
    """What a packed weight would be multiplied by, if nothing is against it."""
    return GROUPED if dims.w_batch and q.layout in INT4_LAYOUTS else KERNELS[q.layout]


def multiply_siblings(x: jax.Array, products: Sequence[tuple[QArray, Dims, jnp.dtype]], shared: dict) -> None:
    """Multiplies x by packed weights, in one launch for all that are packed alike and need x in the same form.

    Args:
        x: the activation.
        products: each weight, how it meets x, and the dtype of the result; `kernel_refusal` has found nothing against.
        shared: where `dot_general` finds each product.
    """
    kinds: dict[tuple, tuple[Rows, list]] = {}
    for q, dims, dtype in products:
        rows = rows_of(x, q, dims, shared)
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
            shared[product_key(x, q, dims, dtype)] = x, q, out


def product_key(x: jax.Array, q: QArray, dims: Dims, dtype: jnp.dtype) -> tuple:
    return "product", id(x), id(q), dims, jnp.dtype(dtype)


def _launch(rows: Rows, weights: Sequence[QArray], all_dims: Sequence[Dims], dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The products [*batch, *free of x, *free of the weight] of rows with weights that are packed alike."""
    operands = [_operands(q, dims) for q, dims in zip(weights, all_dims, strict=True)]
    if weights[0].layout == INT8_LAYOUT:
        outs = _int8_products(rows, operands, all_dims[0], dtype)
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


def _batched_product(rows: Rows, operand: Int4Weight, dtype: jnp.dtype) -> jax.Array:
    """A batch of products as the groups of one launch, each of as many rows."""
    batch = operand.scale.ndim - 2
    count, each = math.prod(rows.values.shape[:batch]), math.prod(rows.values.shape[batch:-1])
    leaves = [leaf.reshape(count, *leaf.shape[batch:]) for leaf in jax.tree.leaves(operand)]
    scale = None if rows.scale is None else rows.scale.reshape(-1, 1)
    values = rows.values.reshape(-1, rows.values.shape[-1])
    return grouped_matmul(values, *leaves, group_sizes=jnp.full(count, each, jnp.int32), x_scale=scale, out_dtype=dtype)


def _int8_products(rows: Rows, operands: Sequence[Int4Weight], dims: Dims, dtype: jnp.dtype) -> Sequence[jax.Array]:
    """Products of codes: matrices side by side in one launch; batches of them and those of blocks one by one."""
    scales = [operand.scale.astype(jnp.float32) for operand in operands]
    if not dims.w_batch and all(scale.shape[0] == 1 for scale in scales):
        weights = [Int8Weight(o.qweight, s, num_outputs=s.shape[1]) for o, s in zip(operands, scales, strict=True)]
        return int8_matmul_many(rows.values, weights, rows.scale, x_zero_point=rows.zero_point, out_dtype=dtype)

    def multiply(
        x: jax.Array, x_scale: jax.Array | None, zero: jax.Array | None, codes: jax.Array, scale: jax.Array
    ) -> jax.Array:
        outputs = None if scale.shape[0] > 1 else scale.shape[1]
        return int8_matmul(x, codes, scale, x_scale, x_zero_point=zero, num_outputs=outputs, out_dtype=dtype)

    for _ in dims.w_batch:
        multiply = jax.vmap(multiply)
    return [
        multiply(rows.values, rows.scale, rows.zero_point, o.qweight, s) for o, s in zip(operands, scales, strict=True)
    ]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _launch_codes(
    rows: Rows, weights: tuple[QArray, ...], all_dims: tuple[Dims, ...], dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """As `_launch`; the derivative passes straight through the rounding of x."""
    return _launch(rows, weights, all_dims, dtype)


@_launch_codes.defjvp
def _launch_codes_jvp(all_dims: tuple[Dims, ...], dtype: jnp.dtype, primals: tuple, tangents: tuple) -> tuple:
    weights: tuple[QArray, ...] = primals[1]
    slopes = [
        contract(tangents[0].ready, bare(plain(q)), dims).astype(dtype)
        for q, dims in zip(weights, all_dims, strict=True)
    ]
    return _launch_codes(*primals, all_dims, dtype), tuple(slopes)
