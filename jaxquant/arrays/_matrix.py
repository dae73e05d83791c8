"""The canonical matrix of a weight: contracting axes flattened to K, outputs to N, batches in front.

Algorithms are written once for a `[K, N]` float32 matrix. A weight of any rank goes there with `to_matrix`; codes,
scale grids, input factors and chosen rows come back with the functions named `..._from_matrix`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxquant.arrays._numerics import grid_shape, padded_length
from jaxquant.arrays._qarray import pad_axis
from jaxquant.arrays._spec import TensorSpec


@dataclasses.dataclass(frozen=True)
class MatrixForm:
    """How a weight lies as a matrix.

    Attributes:
        shape: the weight's shape.
        axis: its contracting axes, negative and ascending.
        batch_dims: how many leading dimensions are batches (scan stacks, experts) and not outputs.
        padded: length of `axis[-1]` once padded to whole groups.
    """

    shape: tuple[int, ...]
    axis: tuple[int, ...]
    batch_dims: int
    padded: int

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The weight's shape with `axis[-1]` padded."""
        last = len(self.shape) + self.axis[-1]
        return tuple(self.padded if dim == last else size for dim, size in enumerate(self.shape))

    @property
    def contracting(self) -> tuple[int, ...]:
        """The contracting dimensions, counted from the front."""
        return tuple(len(self.shape) + a for a in self.axis)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output dimensions, counted from the front."""
        return tuple(dim for dim in range(self.batch_dims, len(self.shape)) if dim not in self.contracting)

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings batches to the front and outputs to the back."""
        return (*range(self.batch_dims), *self.contracting, *self.outputs)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch dimensions."""
        return self.shape[: self.batch_dims]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(K, N), K padded to whole groups."""
        padded = self.padded_shape
        return math.prod(padded[d] for d in self.contracting), math.prod(padded[d] for d in self.outputs)


def matrix_form(shape: tuple[int, ...], axis: tuple[int, ...], batch_dims: int, spec: TensorSpec) -> MatrixForm:
    """Describes the matrix of a weight.

    Args:
        shape: the weight's shape.
        axis: contracting axes, negative and ascending.
        batch_dims: leading dimensions that are batches.
        spec: gives the groups that K is padded to.

    Returns:
        The form.

    Raises:
        ValueError: a batch dimension is contracted, or groups do not divide the axes.

    >>> matrix_form((4, 8, 16, 32), (-3, -2), 1, TensorSpec("int8")).matrix_shape
    (128, 32)
    """
    if not 0 <= batch_dims <= len(shape) + axis[0]:
        raise ValueError(
            f"batch_dims={batch_dims}: the first contracting axis {axis[0]} of shape {shape} lies before it"
        )
    padded = padded_length(shape, axis, spec.granularity) if spec.pad else shape[axis[-1]]
    form = MatrixForm(tuple(shape), tuple(axis), batch_dims, padded)
    grid_shape(form.padded_shape, axis, spec.granularity)
    return form


def to_matrix(w: jax.Array, form: MatrixForm) -> jax.Array:
    """Gives the float32 matrix of a weight.

    Args:
        w: the weight, of `form.shape`.
        form: how it lies.

    Returns:
        float32 [*batch, K, N], zeros where padded.

    >>> to_matrix(jnp.ones((8, 3)), matrix_form((8, 3), (-2,), 0, TensorSpec("int8"))).shape
    (8, 3)
    """
    padded = pad_axis(w.astype(jnp.float32), form.axis[-1], form.padded - form.shape[form.axis[-1]])
    return padded.transpose(form.order).reshape(*form.batch, *form.matrix_shape)


def from_matrix(matrix: jax.Array, form: MatrixForm) -> jax.Array:
    """Undoes `to_matrix` but for the padding.

    Args:
        matrix: [*batch, K, N] of any dtype.
        form: how the weight lies.

    Returns:
        Array of `form.padded_shape`.
    """
    return _from_order(matrix, form.padded_shape, form)


def grid_from_matrix(grid: jax.Array, form: MatrixForm, spec: TensorSpec) -> jax.Array:
    """Gives a matrix's scale grid the rank of the weight.

    Args:
        grid: [*batch, cells of K, cells of N].
        form: how the weight lies.
        spec: its granularity gave the cells.

    Returns:
        The grid as `QArray` holds it.
    """
    shape = grid_shape(form.padded_shape, form.axis, spec.granularity)
    columns = math.prod(shape[d] for d in form.outputs)
    spread = jnp.broadcast_to(grid, (*grid.shape[:-1], columns)) if grid.shape[-1] == 1 else grid
    return _from_order(spread, shape, form)


def _from_order(x: jax.Array, shape: tuple[int, ...], form: MatrixForm) -> jax.Array:
    back = sorted(range(len(shape)), key=form.order.__getitem__)
    return x.reshape([shape[dim] for dim in form.order]).transpose(back)


def rows_to_matrix(x: jax.Array, form: MatrixForm, axis: int) -> jax.Array:
    """Pads an axis of K logical input channels to the K of the matrix, with zeros.

    Args:
        x: array whose `axis` has the product of the logical contracting sizes.
        form: how the weight lies.
        axis: the channel axis, negative.

    Returns:
        The array with `axis` of length K.
    """
    missing = form.padded - form.shape[form.axis[-1]]
    if not missing:
        return x
    dim = x.ndim + axis
    sizes = [form.shape[d] for d in form.contracting]
    split = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
    return pad_axis(split, axis, missing).reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def rows_from_matrix(x: jax.Array, form: MatrixForm) -> jax.Array:
    """Gives per-channel factors the rank of the weight, as `QArray.pre_scale` has it.

    Args:
        x: [*batch, K].
        form: how the weight lies.

    Returns:
        Array of the weight's rank: its sizes on batch and contracting dimensions, 1 on outputs.
    """
    shape = [1 if dim in form.outputs else size for dim, size in enumerate(form.padded_shape)]
    full = _from_order(x, tuple(shape), form)
    return jax.lax.slice_in_dim(full, 0, form.shape[form.axis[-1]], axis=full.ndim + form.axis[-1])


def picked_from_matrix(x: jax.Array, form: MatrixForm) -> jax.Array:
    """Gives a choice of n rows, or their indices, the rank of the weight.

    Args:
        x: [*batch, n, N], or [*batch, n, 1].
        form: how the weight lies.

    Returns:
        Array of the weight's rank: n on the last contracting dimension, 1 on the others.
    """
    wide = x.shape[-1] > 1
    shape = [size if dim in form.outputs and wide else 1 for dim, size in enumerate(form.shape)]
    shape[: form.batch_dims] = form.batch
    shape[form.axis[-1]] = x.shape[-2]
    return _from_order(x, tuple(shape), form)


def scalars_from_matrix(x: jax.Array, form: MatrixForm) -> jax.Array:
    """Gives one number for each matrix the rank of the weight.

    Args:
        x: of the batch's shape.
        form: how the weight lies.

    Returns:
        Array of the weight's rank with 1 on all but the batch dimensions.
    """
    return x.reshape(*form.batch, *[1] * (len(form.shape) - form.batch_dims))
