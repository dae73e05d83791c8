"""Codes in int32 words and in the bytes of a `QArray`, in NumPy.

Both are one little-endian bit string along an axis, so where whole words are filled, one is the other's bytes moved.
"""

import numpy as np

from jaxquant.arrays._qtypes import QType

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k of a word of AWQ's holds column AWQ_ORDER[k] of its eight


def unpack_words(words: np.ndarray, bits: int, count: int, axis: int) -> np.ndarray:
    """Takes codes out of int32 words packed densely, low bits first.

    Args:
        words: int32.
        bits: bits a code.
        count: codes along `axis`.
        axis: the packed axis.

    Returns:
        uint8 codes, `count` along `axis`.

    >>> unpack_words(np.array([0x76543210], np.int32), 4, 8, 0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return unpack_bytes(words_to_bytes(words, axis), bits, count, axis)


def pack_words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Undoes `unpack_words`; the last word is filled with zero bits.

    >>> hex(pack_words(np.arange(8, dtype=np.uint8), 4, 0)[0])
    '0x76543210'
    """
    packed = pack_bytes(codes, bits, axis)
    return bytes_to_words(fit(packed, -(-packed.shape[axis] // 4) * 4, axis), axis)


def words_to_bytes(words: np.ndarray, axis: int) -> np.ndarray:
    """Splits int32 words into their bytes along an axis, low byte first."""
    last = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype("<i4", copy=False)
    return np.moveaxis(last.view(np.uint8), -1, axis)


def bytes_to_words(packed: np.ndarray, axis: int) -> np.ndarray:
    """Undoes `words_to_bytes`; the axis must hold whole words."""
    last = np.ascontiguousarray(np.moveaxis(packed, axis, -1))
    return np.ascontiguousarray(np.moveaxis(last.view("<i4"), -1, axis))


def fit(packed: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Cuts an axis to a length, or fills it up with zeros."""
    held = packed.shape[axis]
    if held >= length:
        return packed.take(np.arange(length), axis) if held > length else packed
    return np.pad(packed, [(0, length - held if dim == axis % packed.ndim else 0) for dim in range(packed.ndim)])


def unpack_bytes(packed: np.ndarray, bits: int, count: int, axis: int) -> np.ndarray:
    """Takes codes out of bytes packed densely, low bits first.

    Args:
        packed: uint8.
        bits: bits a code, at most 8.
        count: codes along `axis`.
        axis: the packed axis.

    Returns:
        uint8 codes.

    >>> unpack_bytes(np.array([0b10_001_000, 0b0], np.uint8), 3, 3, 0).tolist()
    [0, 1, 2]
    """
    last = np.ascontiguousarray(np.moveaxis(packed, axis, -1))
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (last[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(*last.shape[:-1], -1)[..., :count]
    else:
        flags = np.unpackbits(last, axis=-1, count=count * bits, bitorder="little")
        flags = flags.reshape(*last.shape[:-1], count, bits)
        codes = np.packbits(flags, axis=-1, bitorder="little")[..., 0]
    return np.moveaxis(codes, -1, axis)


def pack_bytes(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Undoes `unpack_bytes`; the last byte is filled with zero bits."""
    last = np.ascontiguousarray(np.moveaxis(codes, axis, -1)).astype(np.uint8, copy=False)
    if 8 % bits == 0:
        last = fit(last, -(-last.shape[-1] * bits // 8) * (8 // bits), -1)
        parts = last.reshape(*last.shape[:-1], -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
        packed = np.bitwise_or.reduce(parts, axis=-1)
    else:
        flags = np.unpackbits(last[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(flags.reshape(*last.shape[:-1], -1), axis=-1, bitorder="little")
    return np.moveaxis(packed, -1, axis)


def to_storage(codes: np.ndarray, qtype: QType) -> np.ndarray:
    """The `qvalue` [K', N] of unsigned codes [K, N]: packed along K where the format is, else of its code dtype.

    Args:
        codes: uint8, offset by 2^(b-1) where the format is signed.
        qtype: the format.

    Returns:
        What `QArray.qvalue` holds.
    """
    if qtype.packed:
        return fit(pack_bytes(codes, qtype.bits, 0), -(-codes.shape[0] // 8) * qtype.bits, 0)
    return (codes ^ np.uint8(qtype.offset)).view(qtype.code_dtype)  # the offset of 8 bits is the sign bit


def from_storage(qvalue: np.ndarray, qtype: QType, count: int) -> np.ndarray:
    """Undoes `to_storage`: unsigned codes [K, N]."""
    if qtype.packed:
        return unpack_bytes(qvalue, qtype.bits, count, 0)
    return qvalue.view(np.uint8) ^ np.uint8(qtype.offset)


def words_to_storage(words: np.ndarray, qtype: QType, count: int, axis: int) -> np.ndarray:
    """The `qvalue` [K', N] of words that hold the unsigned codes packed along K, which is their `axis`.

    Args:
        words: int32, [W, N] with axis 0 or [N, W] with axis 1.
        qtype: an integer format of at most 8 bits.
        count: K.
        axis: where K lies.

    Returns:
        What `QArray.qvalue` holds.
    """
    along = words_to_bytes(words, axis)
    along = np.ascontiguousarray(along if axis == 0 else along.T)
    if not qtype.packed:
        return (along[:count] ^ np.uint8(qtype.offset)).view(qtype.code_dtype)
    return fit(along, -(-count // 8) * qtype.bits, 0)


def storage_to_words(qvalue: np.ndarray, qtype: QType, count: int, axis: int) -> np.ndarray:
    """Undoes `words_to_storage`; bits beyond the last code are zero."""
    if count % 32:
        codes = from_storage(qvalue, qtype, count)
        return pack_words(codes if axis == 0 else codes.T, qtype.bits, axis)
    packed = qvalue if qtype.packed else qvalue.view(np.uint8) ^ np.uint8(qtype.offset)
    return bytes_to_words(packed if axis == 0 else packed.T, axis)
