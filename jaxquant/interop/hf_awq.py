"""AWQ checkpoints in AutoAWQ's GEMM form.

A linear layer [K inputs, N outputs] of 4 bits and G groups is `qweight` int32 [K, N / 8] and `qzeros` int32 [G, N / 8]
(unsigned codes packed along N, nibble k of a word being column 0, 2, 4, 6, 1, 3, 5, 7 of its eight) and `scales`
[G, N]. The weight is `scales * (code - zero)`; the activation scales of AWQ are folded into the layer before.
"""

from typing import Any

import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import get_qtype
from jaxquant.interop._linear import (
    FLOATS,
    Tensors,
    check_exportable,
    check_finite,
    check_surplus,
    common_group_size,
    expect,
    make_linear,
    unsigned_zero_points,
)
from jaxquant.interop._words import AWQ_ORDER, from_storage, pack_words, to_storage, unpack_words

SUFFIXES = ("qweight", "qzeros", "scales")


def check_config(config: dict[str, Any]) -> None:
    """Refuses other forms than GEMM with 4 bits.

    Args:
        config: the `quantization_config`.

    Raises:
        NotImplementedError: another version or number of bits.
    """
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise NotImplementedError(
            f"quantization_config: AWQ version {version!r} of {bits} bits; GEMM of 4 bits is read"
        )


def decode_linear(tensors: Tensors, dtype: np.dtype, where: str) -> QArray:
    """Makes a kernel of a layer's tensors, bit for bit.

    Args:
        tensors: `qweight`, `qzeros`, `scales`.
        dtype: the logical dtype.
        where: the layer's name, for errors.

    Returns:
        A uint4 QArray [K, N] with zero points.

    Raises:
        ValueError: tensors are missing or do not fit each other.
    """
    check_surplus(where, tensors, set(SUFFIXES))
    scales = check_finite(where, "scales", expect(where, tensors, "scales", FLOATS, (None, None)))
    groups, outputs = scales.shape
    if outputs % 8:
        raise ValueError(f"{where}.scales: {outputs} outputs are no multiple of 8")
    qweight = expect(where, tensors, "qweight", "int32", (None, outputs // 8))
    qzeros = expect(where, tensors, "qzeros", "int32", (groups, outputs // 8))
    inputs, qtype = qweight.shape[0], get_qtype("uint4")
    if inputs % groups:
        raise ValueError(f"{where}.scales: {groups} groups do not divide {inputs} inputs")
    codes, zeros = _unpack(qweight), _unpack(qzeros)
    return make_linear(where, to_storage(codes, qtype), scales, zeros, "uint4", (inputs, outputs), dtype)


def encode_linear(q: QArray, where: str) -> dict[str, np.ndarray]:
    """Makes the tensors of a kernel, bit for bit.

    Args:
        q: a kernel [K, N] of int4 or uint4, per channel or group, without input order.
        where: the parameter's path, for errors.

    Returns:
        `qweight`, `qzeros` and `scales` (in the scale's dtype).

    Raises:
        ValueError: the format cannot hold the kernel.
    """
    check_exportable(where, q, "AWQ", "int4 uint4")
    inputs, outputs = q.trailing
    if outputs % 8 or q.scale.shape[1] != outputs or q.padded != inputs:
        raise ValueError(
            f"{where}: AWQ needs outputs in eights and whole groups with a scale for each output; this kernel is"
            f" {inputs} x {outputs} with a grid {list(q.scale.shape)} over {q.padded} rows"
        )
    if q.perm is not None:
        raise ValueError(f"{where}: AWQ has no input order; export to gptq or compressed-tensors")
    codes = from_storage(np.asarray(q.qvalue), q.format, inputs)
    return {"qweight": _pack(codes), "qzeros": _pack(unsigned_zero_points(q)), "scales": np.asarray(q.scale)}


def to_json(kernels: dict[str, QArray], ignored: list[str]) -> dict[str, Any]:
    """Makes the `quantization_config` of a model's kernels.

    Args:
        kernels: by module.
        ignored: modules left in float.

    Returns:
        The JSON object.

    Raises:
        ValueError: the kernels have different groups.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": common_group_size("AWQ", kernels),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignored or None,
    }


def _unpack(words: np.ndarray) -> np.ndarray:
    nibbles = unpack_words(words, 4, words.shape[1] * 8, 1).reshape(len(words), -1, 8)
    return nibbles[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)


def _pack(codes: np.ndarray) -> np.ndarray:
    nibbles = codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER]
    return pack_words(nibbles.reshape(len(codes), -1), 4, 1)
