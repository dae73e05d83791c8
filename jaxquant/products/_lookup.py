"""Rows of a quantized weight, dequantized alone."""

import jax
import jax.numpy as jnp

from jaxquant.arrays import _views
from jaxquant.arrays._numerics import expand_grid
from jaxquant.arrays._outliers import OutlierArray, dequantize_weight, view_weight
from jaxquant.arrays._packing import Quantized, plain
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import decode_codes
from jaxquant.arrays._views import packed_dim


def take(q: Quantized, indices: jax.Array, axis: int = 0, mode: str | jax.lax.GatherScatterMode = "fill") -> jax.Array:
    """Looks rows of a quantized weight up, and dequantizes those only.

    Args:
        q: for example an embedding [V, D].
        indices: integers of any shape; negative ones count from the end.
        axis: the dimension they index.
        mode: what out-of-range indices give: `"fill"` (NaN) or `"clip"`.

    Returns:
        Floating array of `q.dtype`, the dimensions of `indices` in place of `axis`.

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
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
