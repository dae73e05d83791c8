"""Weights packed for a kernel: their matrix [K, N], its grids, and the views that survive the packing.

A packed `QArray` keeps its grids as they are; `qvalue` is `[*stack, ...]` with the kernel's dimensions behind the
stack: the leading dimensions that are no outputs of one product (layers, experts, heads). K runs over the contracting
axes in the order of `axis`, N over the other dimensions behind the stack in their own order.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import as_signed
from jaxquant.arrays._views import Unrepresentable, code_shape, common_factors, map_grids, refine, remake, reshape

INT4_LAYOUT = "int4_fragments"  # of pallas_kernels.int4_matmul, for 16-bit activations
INT4_CODES_LAYOUT = "int4_byte_fragments"  # the same for 8-bit codes
LOW_BIT_LAYOUT = "low_bit_fragments"  # of pallas_kernels.low_bit_matmul
INT8_LAYOUT = "int8_k_major"  # of pallas_kernels.int8_matmul
INT4_LAYOUTS = (INT4_LAYOUT, INT4_CODES_LAYOUT)
FRAGMENT_LAYOUTS = (*INT4_LAYOUTS, LOW_BIT_LAYOUT)
KERNEL_DIMS = {**dict.fromkeys(FRAGMENT_LAYOUTS, 4), INT8_LAYOUT: 2}
# The format of the kernel's that holds the codes of one of ours: three bits do not divide a word.
KERNEL_FORMATS = {"int8": "int8", "float8_e4m3fn": "float8_e4m3fn", "nf4": "nf4"}
KERNEL_FORMATS |= {
    f"{sign}int{bits}": f"int{max(bits, 4) if bits > 2 else 2}" for sign in ("", "u") for bits in (2, 3, 4)
}
BLOCK = 128  # the scales of int8_matmul may belong to blocks of so many inputs and outputs


def stack_dims(q: QArray) -> int:
    """How many leading dimensions stay in front: of a packed weight, or of a plain one that will be packed."""
    if q.layout != "plain":
        return q.qvalue.ndim - KERNEL_DIMS[q.layout]
    lead = len(q.lead)
    return lead if len(q.trailing) > len(q.axis) else max(lead - 1, 0)


def contracting_dims(q: QArray) -> tuple[int, ...]:
    """The contracting dimensions counted from the front, in the order in which they make K."""
    return tuple(q.ndim + a for a in q.axis)


def output_dims(q: QArray) -> tuple[int, ...]:
    """The dimensions that make N."""
    return tuple(d for d in range(stack_dims(q), q.ndim) if d - q.ndim not in q.axis)


def matrix_order(q: QArray) -> tuple[int, ...]:
    """The permutation that leads to [*stack, *K, *N]."""
    return (*range(stack_dims(q)), *contracting_dims(q), *output_dims(q))


def matrix_shape(q: QArray) -> tuple[int, int]:
    """(K, N), group padding included."""
    shape = code_shape(q)
    return math.prod(shape[d] for d in contracting_dims(q)), math.prod(shape[d] for d in output_dims(q))


def codes_to_matrix(codes: jax.Array, q: QArray) -> jax.Array:
    """Gives the codes of a plain weight, unsigned ones less `unsigned_middle`, as the kernels' matrix.

    Args:
        codes: its unpacked codes.
        q: the weight.

    Returns:
        [*stack, K, N] of int8, float8, or uint8 indices of a table.
    """
    signed = as_signed(codes) - jnp.int8(unsigned_middle(q)) if q.format.kind == "uint" else codes
    matrix = jnp.transpose(signed, matrix_order(q))
    return matrix.reshape(*q.shape[: stack_dims(q)], *matrix_shape(q))


def codes_from_matrix(matrix: jax.Array, q: QArray) -> jax.Array:
    """Undoes `codes_to_matrix`, for a packed weight."""
    order, shape = matrix_order(q), code_shape(q)
    back = sorted(range(q.ndim), key=order.__getitem__)
    signed = jnp.transpose(matrix.reshape([shape[d] for d in order]), back)
    return (signed + jnp.int8(unsigned_middle(q))).astype(jnp.uint8) if q.format.kind == "uint" else signed


def unsigned_middle(q: QArray) -> int:
    """What lies between the unsigned codes of a weight and the signed ones of a kernel."""
    return 2 ** (q.format.bits - 1)


def group_cells(q: QArray) -> tuple[int, ...]:
    """Cells of each contracting dimension, refined until they are equal runs of K; their product is the groups."""
    dims, shape = contracting_dims(q), code_shape(q)
    grids = [grid for grid in (q.scale, q.zero_point) if grid is not None]
    held = [math.lcm(*(grid.shape[d] for grid in grids)) for d in dims]
    last = max((i for i, count in enumerate(held) if count > 1), default=0)
    return tuple(shape[d] if i < last else count for i, (d, count) in enumerate(zip(dims, held, strict=True)))


def grid_to_matrix(grid: jax.Array, q: QArray) -> jax.Array:
    """Gives a grid of a weight as the kernels' [*stack, groups, N]."""
    for d, cells in zip(contracting_dims(q), group_cells(q), strict=True):
        grid = refine(grid, d, cells)
    for d in (*range(stack_dims(q)), *output_dims(q)):
        grid = refine(grid, d, q.shape[d])
    matrix = jnp.transpose(grid, matrix_order(q))
    return matrix.reshape(*q.shape[: stack_dims(q)], math.prod(group_cells(q)), matrix_shape(q)[1])


def is_blocked(q: QArray) -> bool:
    """Whether the scales of a weight belong to whole blocks of inputs and outputs."""
    if len(q.axis) > 1 or len(output_dims(q)) != 1:
        return False
    (k,), (n,) = contracting_dims(q), output_dims(q)
    shape = code_shape(q)
    return (q.scale.shape[k] * BLOCK, q.scale.shape[n] * BLOCK) == (shape[k], shape[n]) != (BLOCK, BLOCK)


def block_scales(q: QArray) -> jax.Array:
    """Gives the scales of blocks as the kernel's [*stack, K / 128, N / 128]."""
    scale = q.scale
    for d in range(stack_dims(q)):
        scale = refine(scale, d, q.shape[d])
    return jnp.transpose(scale, matrix_order(q))


def contracting_order(q: QArray, dims: Dims) -> list[int]:
    """The contracting dimensions of x, in the order in which the weight's make K."""
    return [dims.x_contract[dims.w_contract.index(d)] for d in contracting_dims(q)]


def to_rows(x: jax.Array, q: QArray, dims: Dims) -> jax.Array:
    """An activation, or a grid of it, as [*batch, *free, K]."""
    order = contracting_order(q, dims)
    rows = jnp.transpose(x, (*dims.x_batch, *dims.x_free(x.ndim), *order))
    kept = rows.ndim - len(order)
    return rows.reshape(*rows.shape[:kept], math.prod(rows.shape[kept:]))  # of no rows at all, -1 would be nothing


def gather_matrices(leaf: jax.Array, q: QArray, dims: Dims, columns: int) -> jax.Array:
    """Batches to the front; the other matrices of a stack side by side along N.

    Args:
        leaf: qvalue, or a grid as `grid_to_matrix` gives it.
        q: the weight.
        dims: how it meets x.
        columns: dimensions of the leaf between its stack and that of N.

    Returns:
        [*batch, ...].
    """
    stack, batch = stack_dims(q), len(dims.w_batch)
    beside = tuple(d for d in range(stack) if d not in dims.w_batch)
    last = stack + columns
    moved = jnp.transpose(leaf, (*dims.w_batch, *range(stack, last), *beside, *range(last, leaf.ndim)))
    return moved.reshape(*moved.shape[: batch + columns], -1, *moved.shape[batch + columns + len(beside) + 1 :])


def to_free(out: jax.Array, rows: jax.Array, q: QArray, dims: Dims) -> jax.Array:
    """A product [*batch, *free of x, N], N cut into the weight's free dimensions."""
    return out.reshape(*rows.shape[:-1], *(q.shape[d] for d in dims.w_free(q.ndim)))


def transposed(q: QArray, permutation: Sequence[int]) -> QArray | None:
    """The packed weight with permuted dimensions, or None where N would run in another order."""
    order, stack = tuple(permutation), stack_dims(q)
    outputs = [order.index(d) for d in output_dims(q)]
    if sorted(order[:stack]) != list(range(stack)) or outputs != sorted(outputs):
        return None
    axis = tuple(order.index(d) - q.ndim for d in contracting_dims(q))
    leaves = map_grids(q, lambda grid: jnp.transpose(grid, order))
    leaves["qvalue"] = jnp.transpose(q.qvalue, (*order[:stack], *range(stack, q.qvalue.ndim)))
    return remake(q, [q.shape[d] for d in order], axis, q.padded, leaves)


def reshaped(q: QArray, shape: Sequence[int]) -> QArray | None:
    """The packed weight in another shape, or None where stack, K and N would mix or run in another order."""
    codes = list(code_shape(q))
    codes[q.axis[-1]] = -(-q.padded // 8) * q.format.bits if q.format.packed else q.padded
    plain = dataclasses.replace(q, qvalue=jnp.zeros(codes, jnp.uint8), layout="plain")
    try:
        made = reshape(plain, tuple(shape))
    except Unrepresentable:
        return None
    stack, contracting = stack_dims(q), contracting_dims(q)
    kinds = ["stack" if d < stack else "K" if d in contracting else "N" for d in range(q.ndim)]
    mixed = any(len({kinds[d] for d in before if q.shape[d] > 1}) > 1 for before, _ in common_factors(q.shape, shape))
    in_order = list(q.axis) == sorted(q.axis) and list(made.axis) == sorted(made.axis)
    if mixed or not in_order or made.qtype != q.qtype:
        return None
    whole = math.prod(q.shape[:stack])
    front = next(d for d in range(len(shape) + 1) if math.prod(shape[:d]) == whole)
    qvalue = q.qvalue.reshape(*shape[:front], *q.qvalue.shape[stack:])
    return dataclasses.replace(made, qvalue=qvalue, layout=q.layout)
