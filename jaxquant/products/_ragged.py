"""The ragged product: rows of x, sorted by expert, each with its own expert's quantized weight.

Fewer rows than experts each fetch their expert's codes, so that no other expert is read. More rows go through XLA's
ragged product, cell by cell.
"""

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._qarray import QArray, pad_axis
from jaxquant.arrays._spec import TensorSpec
from jaxquant.arrays._views import packed_dim, refine, take
from jaxquant.products._activation import quantize_activation
from jaxquant.products._products import bare, cell_counts, meet, product, scan_cells

_DIMS = Dims((1,), (1,))


def ragged_product(x: jax.Array, q: QArray, group_sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Multiplies each row of x by its expert's weight.

    Args:
        x: [M, K] floating rows, those of one expert together.
        q: [E, K, N] quantized weight.
        group_sizes: [E] rows of each expert; rows beyond their sum give zeros.
        dtype: dtype of the result.

    Returns:
        [M, N].
    """
    expert = expert_of_rows(group_sizes, x.shape[0])
    if x.shape[0] < q.shape[0] and packed_dim(q) != 0:
        return _fetched_product(x, q, group_sizes, expert, dtype)
    x = ready_rows(x, q, expert)
    inputs = x if q.activation is None else round_rows(x, q, q.activation, expert)

    def one_cell(x: jax.Array | QArray, w: QArray, _: Dims) -> jax.Array:
        return _ragged_cell(x, w, group_sizes, expert)

    cells = cell_counts(inputs, q, _DIMS)[0]
    weight = bare(q)
    total = one_cell(inputs, weight, _DIMS) if cells == 1 else scan_cells(one_cell, inputs, weight, _DIMS, 0, cells)
    return total[:, : q.shape[2]].astype(dtype)  # cuts the padding of a weight that is packed along N


def _fetched_product(x: jax.Array, q: QArray, group_sizes: jax.Array, expert: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The ragged product of few rows: a batch of products, each with the matrix of its row's expert."""
    rows = jnp.arange(x.shape[0], dtype=group_sizes.dtype)
    total = product(x, take(q, expert, 0, "clip"), Dims((1,), (1,), (0,), (0,)), dtype)
    return jnp.where((rows < jnp.sum(group_sizes))[:, None], total, jnp.zeros((), dtype))


def ready_rows(x: jax.Array, q: QArray, expert: jax.Array) -> jax.Array:
    """Brings rows [M, K] to what the codes of their experts expect, as `prepare` does for other products."""
    if q.pre_scale is not None:
        x = x * _of_row(q.pre_scale, expert)[:, :, 0].astype(x.dtype)
    if q.perm is not None:
        x = jnp.take_along_axis(x, _of_row(q.perm, expert)[:, :, 0], axis=1, mode="clip")
    return pad_axis(x, -1, q.padded - q.shape[1]) if packed_dim(q) == 1 else x


def expert_of_rows(group_sizes: jax.Array, count: int) -> jax.Array:
    """The expert of each row, [count]; rows beyond the sum of sizes count to the last."""
    rows = jnp.arange(count, dtype=group_sizes.dtype)
    ends = jnp.cumsum(group_sizes)
    return jnp.minimum(jnp.searchsorted(ends, rows, side="right", method="compare_all"), group_sizes.shape[0] - 1)


def _of_row(grid: jax.Array, expert: jax.Array) -> jax.Array:
    """The slice of each row's expert; a grid that does not tell experts apart serves all rows."""
    return grid if grid.shape[0] == 1 else grid[expert]


def round_rows(x: jax.Array, q: QArray, spec: TensorSpec, expert: jax.Array) -> QArray:
    """The codes of ready rows: by each row's own range, or by the static scale of its expert."""
    if q.act_scale is None:
        return quantize_activation(x, _DIMS, spec)
    rows = jnp.broadcast_to(_of_row(q.act_scale, expert), (x.shape[0], 1, 1))
    zeros = q.act_zero_point
    if zeros is not None:
        zeros = jnp.broadcast_to(_of_row(zeros, expert), (x.shape[0], 1, 1))
    return quantize_activation(x, Dims((1,), (1,), (0,), (0,)), spec, rows, zeros)


def _ragged_cell(x: jax.Array | QArray, w: QArray, group_sizes: jax.Array, expert: jax.Array) -> jax.Array:
    """The scaled product where each expert's contracting axis is one cell: float32 [M, N]."""
    x_values, x_zero, w_values, w_zero, accumulator = meet(x, w)
    total = jax.lax.ragged_dot(x_values, w_values, group_sizes, preferred_element_type=accumulator)

    def columns(grid: jax.Array) -> jax.Array:
        return refine(_of_row(grid, expert)[:, 0], 1, w_values.shape[2])

    if w_zero is not None:
        total = total - columns(w_zero) * jnp.sum(x_values.astype(jnp.int32), axis=1, keepdims=True)
    if x_zero is not None:
        sums = jnp.sum(w_values.astype(jnp.int32), axis=1, keepdims=True)
        total = total - x_zero * columns(sums)
        if w_zero is not None:
            total = total + x_values.shape[1] * x_zero * columns(w_zero)
    total = total.astype(jnp.float32) * columns(w.scale).astype(jnp.float32)
    return total * x.scale.astype(jnp.float32) if isinstance(x, QArray) else total
