"""The number formats a weight or activation can be quantized to, and how their codes are packed in memory.

A *code* is the small number that is stored; `decode_codes` gives its value before scaling. Codes of fewer than
eight bits lie as one little-endian bit string along one axis: eight codes of b bits take b bytes. Signed codes are
stored offset by 2^(b-1), as compressed-tensors does, so that unpacking is a shift, a mask and one subtraction.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

# QLoRA's NormalFloat levels (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of N(0, 1) in [-1, 1].
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# OCP Microscaling E2M1 (specification v1.0, table 5): sign, two exponent bits, one mantissa bit.
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclasses.dataclass(frozen=True)
class QType:
    """One number format.

    Attributes:
        name: as written in a spec, for example `"int4"`.
        bits: bits a code takes in memory, scales not counted.
        kind: `"int"` (signed), `"uint"` (with a zero point), `"float"` (eight-bit float) or `"table"` (an index).
        qmin: least value of a decoded code.
        qmax: greatest value of a decoded code.
        levels: for tables, the value of each index.
    """

    name: str
    bits: int
    kind: str
    qmin: float
    qmax: float
    levels: tuple[float, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether several codes share a byte."""
        return self.bits < 8

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers that a product can accumulate exactly."""
        return self.kind in ("int", "uint")

    @property
    def offset(self) -> int:
        """What packing adds to a code to make it non-negative."""
        return 2 ** (self.bits - 1) if self.kind == "int" else 0

    @property
    def code_dtype(self) -> np.dtype:
        """The dtype of one unpacked code: int8 for signed, uint8 for unsigned and indices, int16, or the float8."""
        if self.kind == "float":
            return jnp.dtype(self.name)
        if self.bits > 8:
            return jnp.dtype(jnp.int16)
        return jnp.dtype(jnp.int8 if self.kind == "int" else jnp.uint8)


def _signed(bits: int) -> QType:
    return QType(f"int{bits}", bits, "int", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _unsigned(bits: int) -> QType:
    return QType(f"uint{bits}", bits, "uint", 0, 2**bits - 1)


QTYPES: dict[str, QType] = {
    qtype.name: qtype
    for qtype in (
        *(_signed(bits) for bits in range(2, 9)),
        _signed(16),
        *(_unsigned(bits) for bits in range(2, 9)),
        QType("float8_e4m3fn", 8, "float", -448.0, 448.0),
        QType("float8_e5m2", 8, "float", -57344.0, 57344.0),
        QType("nf4", 4, "table", -1.0, 1.0, NF4_LEVELS),
        QType("mxfp4", 4, "table", -6.0, 6.0, E2M1_LEVELS),
    )
}


def get_qtype(name: str) -> QType:
    """Looks a number format up by name.

    Args:
        name: one of `QTYPES`.

    Returns:
        The format.

    Raises:
        ValueError: the name is not known; the message lists those that are.

    >>> get_qtype("int4").qmin
    -8
    """
    if name not in QTYPES:
        raise ValueError(f"unknown qtype {name!r}; accepted: {', '.join(QTYPES)}")
    return QTYPES[name]


@functools.cache
def _period(bits: int) -> tuple[int, int, tuple[tuple[int, int, int], ...]]:
    """The least whole number of codes in a whole number of bytes, and which code lies in which byte.

    Returns:
        (codes, bytes, triples (code, byte, shift)); the code moves left by `shift` into its byte, right if negative.
    """
    codes, size = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    places = [(code, byte, bits * code - 8 * byte) for code in range(codes) for byte in range(size)]
    return codes, size, tuple(place for place in places if -bits < place[2] < 8)


def _gather_bits(source: jax.Array, axis: int, moves: list[list[tuple[int, int]]]) -> jax.Array:
    """Builds the uint8 elements along `axis` that are the bitwise or of shifted elements (index, shift) of `source`."""

    def shifted(index: int, by: int) -> jax.Array:
        element = jax.lax.index_in_dim(source, index, axis, keepdims=False)
        return element << jnp.uint8(by) if by >= 0 else element >> jnp.uint8(-by)

    return jnp.stack([functools.reduce(jnp.bitwise_or, itertools.starmap(shifted, move)) for move in moves], axis)


def pack_codes(codes: jax.Array, qtype: QType, axis: int) -> jax.Array:
    """Packs codes of fewer than eight bits into bytes along `axis`; wider codes come back as they are.

    Args:
        codes: unpacked codes of `qtype.code_dtype`; the length of `axis` must be a multiple of eight codes.
        qtype: the format of the codes.
        axis: the axis along which neighbours share bytes.

    Returns:
        uint8 with `axis` of length `n * bits / 8`, or `codes` unchanged when `qtype` is not packed.

    Raises:
        ValueError: the length of `axis` is not a multiple of eight.

    >>> int(pack_codes(jnp.arange(-4, 4, dtype=jnp.int8), get_qtype("int4"), 0)[0])
    84
    """
    if not qtype.packed:
        return codes
    axis = axis % codes.ndim
    length = codes.shape[axis]
    if length % 8:
        raise ValueError(f"pack_codes: axis {axis} holds {length} codes; a multiple of 8 is packed, pad first")
    lead, trail = codes.shape[:axis], codes.shape[axis + 1 :]
    count, size, places = _period(qtype.bits)
    unsigned = codes.astype(jnp.uint8) + jnp.uint8(qtype.offset)
    moves = [[(code, shift) for code, byte, shift in places if byte == target] for target in range(size)]
    packed = _gather_bits(unsigned.reshape(*lead, length // count, count, *trail), axis + 1, moves)
    return packed.reshape(*lead, length // 8 * qtype.bits, *trail)


def unpack_codes(packed: jax.Array, qtype: QType, axis: int) -> jax.Array:
    """Undoes `pack_codes`.

    Args:
        packed: what `pack_codes` gave.
        qtype: the format of the codes.
        axis: the packed axis.

    Returns:
        The codes in `qtype.code_dtype`.

    >>> codes = jnp.arange(-4, 4, dtype=jnp.int8)
    >>> unpack_codes(pack_codes(codes, get_qtype("int3"), 0), get_qtype("int3"), 0).tolist()
    [-4, -3, -2, -1, 0, 1, 2, 3]
    """
    if not qtype.packed:
        return packed
    axis = axis % packed.ndim
    lead, trail = packed.shape[:axis], packed.shape[axis + 1 :]
    count, size, places = _period(qtype.bits)
    bytes_ = packed.reshape(*lead, packed.shape[axis] // size, size, *trail)
    if size == 1:  # whole codes in every byte: one broadcast shift
        shifts = jnp.arange(0, 8, qtype.bits, dtype=jnp.uint8)
        codes = bytes_ >> jax.lax.expand_dims(shifts, [*range(axis + 1), *range(axis + 2, bytes_.ndim)])
    else:
        moves = [[(byte, -shift) for code, byte, shift in places if code == target] for target in range(count)]
        codes = _gather_bits(bytes_, axis + 1, moves)
    codes = (codes & jnp.uint8(2**qtype.bits - 1)).reshape(*lead, packed.shape[axis] * 8 // qtype.bits, *trail)
    return as_signed(codes - jnp.uint8(qtype.offset)) if qtype.kind == "int" else codes


def as_signed(codes: jax.Array) -> jax.Array:
    """Reads uint8 as int8, bit for bit.

    `astype` would do, but the CPU backend of jax 0.11.2 saturates that conversion where it fuses it into a product.

    >>> as_signed(jnp.asarray([255, 1], jnp.uint8)).tolist()
    [-1, 1]
    """
    return jax.lax.bitcast_convert_type(codes, jnp.int8)


def decode_codes(codes: jax.Array, qtype: QType, dtype: np.dtype | type = jnp.float32) -> jax.Array:
    """Gives the value of unpacked codes before zero point and scale.

    Args:
        codes: unpacked codes.
        qtype: their format.
        dtype: the floating dtype of the result.

    Returns:
        The values, of the shape of `codes`.

    >>> decode_codes(jnp.asarray([0, 15], jnp.uint8), get_qtype("nf4")).tolist()
    [-1.0, 1.0]
    """
    if qtype.kind == "table":
        return jnp.asarray(qtype.levels, dtype)[codes.astype(jnp.int32)]
    return codes.astype(dtype)


def encode_values(values: jax.Array, qtype: QType) -> jax.Array:
    """Rounds scaled values (zero point added) to the nearest code of the format.

    Args:
        values: float32 values in units of the scale.
        qtype: the format.

    Returns:
        Codes of `qtype.code_dtype`; ties go to the even integer, mantissa or index.

    >>> encode_values(jnp.asarray([0.5, 1.5, 99.0]), get_qtype("int4")).tolist()
    [0, 2, 7]
    """
    if qtype.kind == "table":
        first, bounds = _table_bounds(qtype)
        codes = jnp.full(values.shape, first, jnp.uint8)
        for bound, step in bounds:  # as many compares as levels, but they fuse: a search or a lookup would not
            codes += jnp.where(values > bound, jnp.uint8(step), jnp.uint8(0))
        return codes
    clipped = jnp.clip(values, qtype.qmin, qtype.qmax)
    return (clipped if qtype.kind == "float" else jnp.round(clipped)).astype(qtype.code_dtype)


@functools.cache
def _table_bounds(qtype: QType) -> tuple[int, tuple[tuple[np.float32, int], ...]]:
    """The code of the least level; for each next level the float32 above which it is nearest, and its code's step.

    Steps count modulo 256, because a sign bit makes codes fall while levels rise. A midpoint that float32 cannot hold
    is rounded down; one that it can belongs to the level of even index.
    """
    levels, index = np.unique(np.asarray(qtype.levels), return_index=True)  # -0.0 is 0.0's twin: one is enough
    bounds = []
    for middle, code, above in zip((levels[1:] + levels[:-1]) / 2, index[:-1], index[1:], strict=True):
        bound = np.float32(middle)
        if bound > middle or (bound == middle and above % 2 == 0):
            bound = np.nextafter(bound, np.float32(-np.inf))
        bounds.append((bound, int(above - code) % 256))
    return int(index[0]), tuple(bounds)
