"""Which weights a kernel takes, and their way into its layout and back."""

import dataclasses
import math
from typing import overload

import jax.numpy as jnp

from jaxquant._kernels import fragments_support, pack_fragments, pack_int8, unpack_fragments, unpack_int8
from jaxquant.arrays import _packed
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._packed import INT4_CODES_LAYOUT, INT4_LAYOUT, INT8_LAYOUT, KERNEL_FORMATS, LOW_BIT_LAYOUT
from jaxquant.arrays._qarray import QArray, codes_of, pack_padded
from jaxquant.arrays._spec import PerGroup, TensorSpec

Quantized = QArray | OutlierArray


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
    return fragments_refusal(q, jnp.dtype(jnp.bfloat16))


def fragments_refusal(q: QArray, x_dtype: jnp.dtype) -> str | None:
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
