"""`OutlierArray`: a quantized weight of which a fixed number of input channels stay in float."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxquant._qarray import QArray, dequantize_array


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
        rows: float weights of the n channels, in the weight's dtype and rank: n on the last contracting dimension, 1 on
            other contracting ones.
        index: int32 channels of the flattened contracting axes, as `rows` with 1 on output dimensions. K marks a place
            not taken, whose row is zero.
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


jax.tree_util.register_dataclass(OutlierArray, data_fields=["base", "rows", "index"], meta_fields=[])


def split_activation(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the outlier channels out of an activation.

    Args:
        x: [..., K].
        index: [n] int32 channels; K marks a place not taken.

    Returns:
        ([..., K] with zeros at the outliers, [..., n] the outliers, zero where a place is not taken).

    >>> base, outliers = split_activation(jnp.asarray([1.0, 9.0, 2.0]), jnp.asarray([1, 3]))
    >>> base.tolist(), outliers.tolist()
    ([1.0, 0.0, 2.0], [9.0, 0.0])
    """
    outliers = jnp.take(x, index, axis=-1, mode="fill", fill_value=0)
    return x.at[..., index].set(0, mode="drop"), outliers


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
    rows = w.rows.transpose(order).reshape(math.prod(rest), count)
    index = jnp.broadcast_to(w.index, w.rows.shape).transpose(order).reshape(math.prod(rest), count)
    put = jax.vmap(lambda row, at, values: row.at[at].add(values, mode="drop"))(flat, index, rows)
    back = sorted(range(dense.ndim), key=[dense.ndim + a for a in order].__getitem__)
    return put.reshape([dense.shape[a] for a in order]).transpose(back)
