"""`OutlierArray`: a quantized weight of which a fixed number of input channels stay in float."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays import _views
from jaxquant.arrays._qarray import QArray, dequantize_array
from jaxquant.arrays._views import Unrepresentable


@dataclasses.dataclass(frozen=True, eq=False)
class OutlierArray:
    """A quantized weight beside float rows for its outlier input channels (LLM.int8, AWQ's salient channels).

    The product it stands for, with x flattened over its contracting axes and index over its own, is

        x_base, x_outliers = split_activation(x, index)
        y = x_base @ base + x_outliers @ rows

    The base's rows are zero for these channels, and `x_base` is zero there, so that an outlier does not stretch a
    token's activation scale.

    Attributes:
        base: the quantized weight.
        rows: float weights of the n channels, in the weight's dtype and rank: n on the dimension `axis[-1]`, 1 on other
            contracting ones. They multiply the activation as it comes, without the base's `pre_scale`.
        index: int32 channels of the contracting axes, flattened in the order of `axis`; shaped as `rows` with 1 on
            output dimensions. K marks a place not taken, whose row is zero.
    """

    base: QArray
    rows: jax.Array
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical weight's shape."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The logical weight's rank."""
        return self.base.ndim

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions, before the contracting axes."""
        return self.base.lead

    @property
    def trailing(self) -> tuple[int, ...]:
        """The dimensions after `lead`."""
        return self.base.trailing

    @property
    def axis(self) -> tuple[int, ...]:
        """Contracting axes, negative."""
        return self.base.axis

    @property
    def qtype(self) -> str:
        """What a table calls the format."""
        return f"{self.base.qtype}+outliers"

    @property
    def dtype(self) -> jnp.dtype:
        """The logical dtype."""
        return self.base.dtype

    @property
    def size(self) -> int:
        """Elements of the logical weight."""
        return self.base.size

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers really take."""
        return self.base.nbytes + self.rows.nbytes + self.index.nbytes

    @property
    def bits(self) -> float:
        """Bits a logical element takes, everything counted."""
        return 8 * self.nbytes / max(self.size, 1)

    def __repr__(self) -> str:
        """Names the base and how many channels are in float, not the numbers."""
        if not hasattr(self.rows, "shape"):  # a pytree of specs or axes in the form of an OutlierArray
            return f"OutlierArray({self.base!r}, rows={self.rows!r}, index={self.index!r})"
        return f"OutlierArray({self.base!r}, {self.rows.shape[self.axis[-1]]} channels in {self.rows.dtype})"


jax.tree_util.register_dataclass(OutlierArray, data_fields=["base", "rows", "index"], meta_fields=[])


def split_activation(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the outlier channels out of an activation.

    Args:
        x: [..., K].
        index: [..., n] int32 channels, leading dimensions equal to those of x, 1 or absent; K marks a place not taken.

    Returns:
        ([..., K] with zeros at the outliers, [..., n] the outliers, zero where a place is not taken).

    >>> base, outliers = split_activation(jnp.asarray([1.0, 9.0, 2.0]), jnp.asarray([1, 3]))
    >>> base.tolist(), outliers.tolist()
    ([1.0, 0.0, 2.0], [9.0, 0.0])
    """
    index = jax.lax.expand_dims(index, range(x.ndim - index.ndim))
    outliers = jnp.take_along_axis(x, index, axis=-1, mode="fill", fill_value=0)
    taken = jnp.zeros((*index.shape[:-1], x.shape[-1]), bool)
    taken = jnp.put_along_axis(taken, index, True, axis=-1, inplace=False, mode="drop")
    return jnp.where(taken, jnp.zeros((), x.dtype), x), outliers


def dequantize_outliers(w: OutlierArray) -> jax.Array:
    """Gives the float weight that an OutlierArray stands for.

    Args:
        w: an OutlierArray of a plain base.

    Returns:
        Array of `w.shape` and `w.dtype`.
    """
    dense, axis = dequantize_array(w.base), w.base.axis
    others = [dim - dense.ndim for dim in range(dense.ndim) if dim - dense.ndim not in axis]
    order = (*others, *axis)
    rest, count = [dense.shape[a] for a in others], w.rows.shape[axis[-1]]
    flat = dense.transpose(order).reshape(math.prod(rest), -1)

    def pick(picked: jax.Array) -> jax.Array:
        spread = [count if a == axis[-1] else 1 if a in axis else dense.shape[a] for a in order]
        return jnp.broadcast_to(picked.transpose(order), spread).reshape(math.prod(rest), count)

    put = jax.vmap(lambda row, at, values: row.at[at].add(values, mode="drop"))(flat, pick(w.index), pick(w.rows))
    back = sorted(range(dense.ndim), key=[dense.ndim + a for a in order].__getitem__)
    return put.reshape([dense.shape[a] for a in order]).transpose(back)


def dequantize_weight(w: QArray | OutlierArray) -> jax.Array:
    """Gives the float weight that a quantized one of either form stands for."""
    return dequantize_outliers(w) if isinstance(w, OutlierArray) else dequantize_array(w)


def view_weight(w: QArray | OutlierArray, view: Callable[[QArray], QArray | list[QArray]]) -> Any:
    """Applies a view of QArrays (see `_views`) to a quantized weight of either form.

    Args:
        w: the weight.
        view: gives the transposed, reshaped, sliced or gathered QArray, or several parts of it.

    Returns:
        What `view` gives, in the form of `w`.

    Raises:
        Unrepresentable: the view has no quantized form, or it cuts or mixes the channels that outliers are counted in.
    """
    return _view_outliers(w, view) if isinstance(w, OutlierArray) else view(w)


def _view_outliers(w: OutlierArray, view: Callable[[QArray], QArray | list[QArray]]) -> Any:
    """Views the base, and every outlier row beside it: a row is a grid of one cell along the contracting axes."""
    made = view(w.base)
    bases = made if isinstance(made, list) else [made]
    for base in bases:
        _check_channels(w.base, base)

    def view_row(row: jax.Array, channel: jax.Array) -> list[tuple]:
        grids = view(dataclasses.replace(w.base, act_scale=row, act_zero_point=channel))
        return [(q.act_scale, q.act_zero_point) for q in (grids if isinstance(grids, list) else [grids])]

    def lay(base: QArray, rows: jax.Array, index: jax.Array) -> OutlierArray:
        rows, index = (jnp.swapaxes(part, 0, base.axis[-1])[0] for part in (rows, index))
        return OutlierArray(base, rows.astype(base.dtype), index)

    split = [jnp.expand_dims(jnp.moveaxis(part, w.axis[-1], 0), w.axis[-1]) for part in (w.rows, w.index)]
    parts = [lay(base, *grids) for base, grids in zip(bases, jax.vmap(view_row)(*split), strict=True)]
    return parts if isinstance(made, list) else parts[0]


def _check_channels(before: QArray, after: QArray) -> None:
    """Raises unless the contracting axes flatten to the same channels as before."""

    def sizes(q: QArray) -> list[int]:
        return [q.shape[a] for a in q.axis if q.shape[a] > 1]

    merged = math.prod(sizes(before)) == math.prod(sizes(after)) and all(
        list(q.axis) == sorted(q.axis) for q in (before, after)
    )
    if sizes(before) != sizes(after) and not merged:
        raise Unrepresentable("it cuts or mixes the channels that its outliers are counted in")


def multiply_weight(w: QArray | OutlierArray, factor: jax.Array) -> QArray | OutlierArray:
    """Multiplies a quantized weight of either form by a scalar."""
    if not isinstance(w, OutlierArray):
        return _views.multiply(w, factor)
    rows = (w.rows.astype(jnp.float32) * jnp.asarray(factor, jnp.float32)).astype(w.rows.dtype)
    return OutlierArray(_views.multiply(w.base, factor), rows, w.index)
