"""`qwix.QArray`, both ways, without importing qwix.

A `qwix.QArray` is (qvalue, scale, zero_point, qtype) with codes unpacked: `w ~ (qvalue - zero_point) * scale`, scales
being a grid as ours. It has no packing, contracting axis, activation scale or input order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays._qarray import QArray, codes_of, from_codes
from jaxquant.arrays._qtypes import QTYPES
from jaxquant.arrays._spec import QuantSpec, TensorSpec

ACCEPTED = tuple(name for name, qtype in QTYPES.items() if qtype.bits <= 8 and qtype.kind != "uint" and name != "mxfp4")


def from_qwix(array: Any, axis: int | tuple[int, ...] = -2, *, dtype: Any = None) -> QArray:
    """Converts a `qwix.QArray`, code for code.

    Args:
        array: anything with its fields `qvalue`, `scale`, `zero_point` and `qtype`.
        axis: the weight's contracting axis or axes, negative; qwix does not record them.
        dtype: the logical dtype; None takes the scale's.

    Returns:
        The QArray. With a zero point, signed codes become unsigned ones and both move by 2^(b-1).

    Raises:
        ValueError: a format without a counterpart.
    """
    name = str(array.qtype) if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
    if name not in QTYPES:
        raise ValueError(f"from_qwix: qtype {name!r}; accepted: {', '.join(QTYPES)}")
    axes = (axis,) if isinstance(axis, int) else tuple(sorted(axis))
    codes, zero_point, qtype = jnp.asarray(array.qvalue), array.zero_point, QTYPES[name]
    if zero_point is not None and qtype.kind == "int":
        codes = (codes.astype(jnp.int16) + qtype.offset).astype(jnp.uint8)
        zero_point = (jnp.asarray(zero_point).astype(jnp.int16) + qtype.offset).astype(jnp.uint8)
        qtype = QTYPES[f"u{name}"]
    elif zero_point is not None:
        zero_point = jnp.asarray(zero_point).astype(jnp.uint8)
    spec = QuantSpec(TensorSpec(qtype.name))
    logical = array.scale.dtype if dtype is None else jnp.dtype(dtype)
    return from_codes(codes.astype(qtype.code_dtype), array.scale, zero_point, spec, axes, codes.shape, logical)


def to_qwix(q: QArray, make: Callable[..., Any]) -> Any:
    """Converts to a `qwix.QArray`, code for code.

    Args:
        q: a QArray of plain layout without padding, pre_scale, input order or static activation.
        make: the class `qwix.QArray`, or anything called alike.

    Returns:
        What `make(qvalue=..., scale=..., zero_point=..., qtype=...)` returns. Unsigned codes become signed ones.

    Raises:
        ValueError: qwix has no place for something this array has.

    >>> import types
    >>> from jaxquant.arrays._qarray import quantize_array
    >>> q = quantize_array(jnp.eye(16), QuantSpec(TensorSpec("uint4")))
    >>> to_qwix(q, types.SimpleNamespace).qvalue.dtype
    dtype(int4)
    """
    extra = {"pre_scale": q.pre_scale, "act_scale": q.act_scale, "perm": q.perm}
    held = [name for name, leaf in extra.items() if leaf is not None]
    if held or q.padded != q.trailing[q.axis[-1]]:
        raise ValueError(f"to_qwix: {q!r} has {', '.join(held) or 'padding'}, for which qwix has no place")
    codes, zero_point, name = codes_of(q), q.zero_point, q.qtype
    if q.format.kind == "uint":
        name, offset = name[1:], 2 ** (q.format.bits - 1)
        codes = _less(codes, offset)
        zero_point = None if zero_point is None else _less(zero_point, offset)
    if name not in ACCEPTED:
        raise ValueError(f"to_qwix: qtype {q.qtype!r}; accepted: {', '.join(ACCEPTED)} and the unsigned integers")
    storage = jnp.dtype({"nf4": "uint4"}.get(name, name if hasattr(jnp, name) else "int8"))
    zero_point = None if zero_point is None else zero_point.astype(storage)
    return make(qvalue=codes.astype(storage), scale=q.scale, zero_point=zero_point, qtype=name)


def _less(codes: jax.Array, offset: int) -> jax.Array:
    return (codes.astype(jnp.int16) - offset).astype(jnp.int8)
