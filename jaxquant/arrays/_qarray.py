"""`QArray`: a quantized weight as a pytree."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxquant.arrays._numerics import decode_values, encode, find_scale, grid_shape, padded_length
from jaxquant.arrays._qtypes import QType, decode_codes, get_qtype, pack_codes, unpack_codes
from jaxquant.arrays._spec import QuantSpec, TensorSpec


@dataclasses.dataclass(frozen=True, eq=False)
class QArray:
    """A quantized weight: `w ~ pre_scale * (qvalue - zero_point) * scale`, kept as codes.

    The product it stands for is `y = ((x * pre_scale)[..., perm]) @ ((qvalue - zero_point) * scale)`.

    Invariants (checked by whoever builds one, never on unflatten): every leaf has the weight's rank and its leading
    dimensions in front, so `scan`, `vmap` and indexing of a stack slice all leaves alike; every leaf but `qvalue` is a
    grid (each dimension divides the padded weight's); codes of fewer than eight bits are packed along `axis[-1]`. There
    is no implicit conversion to a float array: that copy is what the library exists to avoid.

    Attributes:
        qvalue: codes; uint8 bytes along `axis[-1]` for packed formats, else `format.code_dtype`. In a kernel's layout,
            what that kernel packs, of another rank.
        scale: grid of scales, may be negative.
        zero_point: grid of uint8, or None. In a kernel's layout, what that kernel subtracts.
        pre_scale: factors of the activation (AWQ, SmoothQuant), of size 1 on every output dimension, or None.
        act_scale: static activation scale, of size 1 but on leading dimensions, or None for dynamic.
        act_zero_point: static activation zero point, alike, or None.
        perm: int32 input order (act-order with sorted groups), of size 1 on every output dimension, or None.
        qtype: the number format's name.
        axis: contracting axes, negative, the packed one last; ascending unless the weight was transposed.
        trailing: logical sizes of the dimensions from `axis[0]` on; earlier ones are read off the leaves.
        padded: length of `axis[-1]` in codes, padding to whole groups included.
        dtype: the logical dtype.
        activation: how the activation is quantized, or None for float.
        layout: `"plain"`, or the name of a kernel's packed layout.
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    pre_scale: jax.Array | None
    act_scale: jax.Array | None
    act_zero_point: jax.Array | None
    perm: jax.Array | None
    qtype: str
    axis: tuple[int, ...]
    trailing: tuple[int, ...]
    padded: int
    dtype: jnp.dtype
    activation: TensorSpec | None
    layout: str = "plain"

    @property
    def format(self) -> QType:
        """The number format looked up."""
        return get_qtype(self.qtype)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions, before the contracting axes."""
        return self.scale.shape[: self.scale.ndim - len(self.trailing)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical weight's shape."""
        return (*self.lead, *self.trailing)

    @property
    def ndim(self) -> int:
        """The logical weight's rank."""
        return self.scale.ndim

    @property
    def size(self) -> int:
        """Elements of the logical weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers really take."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits a logical element takes, scales and everything else counted."""
        return 8 * self.nbytes / max(self.size, 1)

    def __repr__(self) -> str:
        """Names format, shape and layout, not the numbers."""
        if not hasattr(self.scale, "shape"):  # a pytree of specs or axes in the form of a QArray
            return f"QArray({self.qtype}, qvalue={self.qvalue!r}, scale={self.scale!r})"
        activation = f", activation={self.activation.qtype}" if self.activation else ""
        scale = list(self.scale.shape)
        return f"QArray({self.qtype}{list(self.shape)}, axis={self.axis}, scale={scale}{activation}, {self.layout})"


jax.tree_util.register_dataclass(
    QArray,
    data_fields=["qvalue", "scale", "zero_point", "pre_scale", "act_scale", "act_zero_point", "perm"],
    meta_fields=["qtype", "axis", "trailing", "padded", "dtype", "activation", "layout"],
)


def codes_of(q: QArray) -> jax.Array:
    """The unpacked codes of a plain QArray, padding to groups included.

    Args:
        q: a QArray of plain layout.

    Returns:
        Codes of `q.format.code_dtype`, of the logical shape but for `axis[-1]`, which has length `q.padded`.

    Raises:
        ValueError: the layout is a kernel's.
    """
    if q.layout != "plain":
        raise ValueError(
            f"codes_of: layout {q.layout!r} is packed for a kernel; jq.pack_for(qparams, 'plain') unpacks it"
        )
    codes = unpack_codes(q.qvalue, q.format, q.axis[-1])
    return jax.lax.slice_in_dim(codes, 0, q.padded, axis=codes.ndim + q.axis[-1])


def pack_padded(codes: jax.Array, qtype: QType, axis: int) -> jax.Array:
    """Packs codes along a negative axis, filling the last byte group with zero codes."""
    missing = -codes.shape[axis] % 8 if qtype.packed else 0
    return pack_codes(pad_axis(codes, axis, missing), qtype, axis)


def pad_axis(x: jax.Array, axis: int, missing: int) -> jax.Array:
    """Appends `missing` zeros along a negative axis."""
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if dim == x.ndim + axis else 0) for dim in range(x.ndim)])


def quantize_array(w: jax.Array, spec: QuantSpec, axis: int | tuple[int, ...] = -2) -> QArray:
    """Quantizes one weight to the nearest codes.

    Args:
        w: floating array of at least one dimension.
        spec: how.
        axis: contracting axis or axes, negative.

    Returns:
        The quantized weight, plain layout.

    Raises:
        TypeError: `w` is not floating.
        ValueError: a group does not divide the axis and the spec does not pad, `w` has no elements, or `axis` is not
            made of distinct negative axes of `w`.

    >>> from jaxquant.arrays._spec import PRESETS
    >>> quantize_array(jnp.ones((256, 64)), PRESETS["w4a16"]).nbytes == 256 * 64 // 2 + 2 * 64 * 2
    True
    """
    axis = _checked_axis(w, axis)
    padded_w = _pad_weight(w.astype(jnp.float32), spec.weight, axis)
    scale, zero_point = find_scale(padded_w, grid_shape(padded_w.shape, axis, spec.weight.granularity), spec.weight)
    codes = encode(padded_w, scale, zero_point, spec.weight)
    return from_codes(codes, scale, zero_point, spec, axis, w.shape, w.dtype)


def _checked_axis(w: jax.Array, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(sorted(axis))
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"a weight of dtype {w.dtype} cannot be quantized; floating dtypes are accepted")
    if not axes or len(set(axes)) < len(axes) or not all(-w.ndim <= a < 0 for a in axes):
        raise ValueError(
            f"contracting axis {axis} of a weight of shape {w.shape}: distinct axes from -{w.ndim} to -1 are accepted"
        )
    if 0 in w.shape:
        raise ValueError(f"a weight of shape {w.shape} has no elements to quantize; leave it in float")
    return axes


def _pad_weight(w: jax.Array, spec: TensorSpec, axis: tuple[int, ...]) -> jax.Array:
    """Appends the zeros that fill the last group, if the spec asks for it."""
    missing = padded_length(w.shape, axis, spec.granularity) - w.shape[axis[-1]] if spec.pad else 0
    return pad_axis(w, axis[-1], missing)


def from_codes(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    spec: QuantSpec,
    axis: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    pre_scale: jax.Array | None = None,
    act_scale: jax.Array | None = None,
    act_zero_point: jax.Array | None = None,
    perm: jax.Array | None = None,
) -> QArray:
    """Packs codes that an algorithm has chosen into a QArray.

    Args:
        codes: unpacked codes of the (group-padded) weight.
        scale: scale grid.
        zero_point: zero point grid or None.
        spec: the spec they were chosen for.
        axis: contracting axes, negative and ascending.
        shape: the logical weight's shape.
        dtype: the logical weight's dtype.
        pre_scale: [*lead, *contracting dims] activation factors or None.
        act_scale: [*lead] static activation scale or None.
        act_zero_point: [*lead] static activation zero point or None.
        perm: [*lead, K] input order or None.

    Returns:
        The QArray.
    """

    def widen(leaf: jax.Array | None) -> jax.Array | None:
        return leaf if leaf is None or leaf.ndim == len(shape) else _to_rank(leaf, axis, tuple(shape))

    return QArray(
        qvalue=pack_padded(codes, spec.weight.format, axis[-1]),
        scale=scale,
        zero_point=zero_point,
        pre_scale=widen(pre_scale),
        act_scale=widen(act_scale),
        act_zero_point=widen(act_zero_point),
        perm=widen(perm),
        qtype=spec.weight.qtype,
        axis=axis,
        trailing=tuple(shape[axis[0] :]),
        padded=codes.shape[axis[-1]],
        dtype=jnp.dtype(dtype),
        activation=spec.activation,
    )


def _to_rank(leaf: jax.Array, axis: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Gives a leaf of [*lead, *contracting dims], or of [*lead] only, the weight's rank with ones in between."""
    lead = len(shape) + axis[0]
    held = [d for d in range(lead, len(shape)) if leaf.ndim > lead and d - len(shape) in axis]
    return leaf.reshape([shape[d] if d < lead or d in held else 1 for d in range(len(shape))])


def dequantize_array(q: QArray) -> jax.Array:
    """Gives the float weight that a QArray stands for, `pre_scale` and `perm` included.

    Args:
        q: a QArray of plain layout.

    Returns:
        Array of `q.shape` and `q.dtype`.

    >>> from jaxquant.arrays._spec import PRESETS
    >>> dequantize_array(quantize_array(jnp.zeros((128, 8)), PRESETS["w4a16"])).sum().item()
    0.0
    """
    return dequantize_codes(q, decode_codes(codes_of(q), q.format))


def dequantize_codes(q: QArray, codes: jax.Array) -> jax.Array:
    """Gives the float weight that other codes would stand for in a QArray, differentiable in them and in its scales.

    Args:
        q: a QArray of plain layout.
        codes: float32 values of codes in the place of its own, of the shape of `codes_of(q)`.

    Returns:
        Array of `q.shape` and `q.dtype`.

    >>> from jaxquant.arrays._spec import PRESETS
    >>> q = quantize_array(jnp.ones((128, 8)), PRESETS["w4a16"])
    >>> dequantize_codes(q, jnp.zeros((128, 8))).sum().item()
    0.0
    """
    values = decode_values(codes, q.scale, q.zero_point)
    values = jax.lax.slice_in_dim(values, 0, q.trailing[q.axis[-1]], axis=values.ndim + q.axis[-1])
    if q.perm is not None:  # the row at place i belongs to input perm[i]
        dim = values.ndim + q.axis[-1]
        values = jnp.take_along_axis(values, jnp.argsort(q.perm, axis=dim), axis=dim)
    if q.pre_scale is not None:
        values = values * q.pre_scale.astype(jnp.float32)
    return values.astype(q.dtype)
