"""GPTQ checkpoints as AutoGPTQ, GPTQModel and Hugging Face transformers keep them.

A linear layer [K inputs, N outputs] of b bits and G groups is `qweight` int32 [K b / 32, N] (unsigned codes packed
along K, low bits first), `qzeros` int32 [G, N b / 32] (packed along N), `scales` [G, N] and `g_idx` int32 [K], the
group of each input. Version 1 (`checkpoint_format: gptq`) stores every zero point less one; version 2 (`gptq_v2`)
as it is. The weight is `scales[g_idx] * (code - zero)`.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.interop._linear import (
    FLOATS,
    Tensors,
    check_exportable,
    check_finite,
    check_surplus,
    common_group_size,
    expect,
    group_index,
    input_order,
    integer_type,
    make_linear,
    unsigned_zero_points,
)
from jaxquant.interop._words import (
    fit,
    from_storage,
    pack_words,
    storage_to_words,
    to_storage,
    unpack_words,
    words_to_storage,
)

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
QTYPES = " ".join(f"{sign}{bits}" for bits in BITS for sign in ("int", "uint"))


@dataclasses.dataclass(frozen=True)
class GPTQFormat:
    """Which form of the format.

    Attributes:
        version: 1, which every reader knows, or 2, which can hold a zero point of 0.
    """

    version: int = 1

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "GPTQFormat":
        """Reads a `quantization_config`.

        Raises:
            NotImplementedError: a checkpoint_format other than gptq and gptq_v2.
        """
        name = config.get("checkpoint_format") or config.get("format") or "gptq"
        if name not in ("gptq", "gptq_v2"):
            raise NotImplementedError(f"quantization_config: checkpoint_format {name!r}; gptq and gptq_v2 are read")
        if config.get("pack_dtype", "int32") != "int32":
            raise NotImplementedError(f"quantization_config: pack_dtype {config['pack_dtype']!r}; int32 is read")
        return cls(2 if name == "gptq_v2" else 1)


def decode_linear(tensors: Tensors, form: GPTQFormat, dtype: np.dtype, where: str) -> QArray:
    """Makes a kernel of a layer's tensors, bit for bit; bits and groups are read off their shapes.

    Args:
        tensors: `qweight`, `qzeros`, `scales`, and `g_idx` if there is one.
        form: the version.
        dtype: the logical dtype.
        where: the layer's name, for errors.

    Returns:
        A QArray [K, N]: a signed format where all zero points are 2^(b-1), else unsigned with zero points; inputs in
        act-order get a `perm`.

    Raises:
        ValueError: tensors are missing or do not fit each other.
    """
    check_surplus(where, tensors, set(SUFFIXES))
    scales = check_finite(where, "scales", expect(where, tensors, "scales", FLOATS, (None, None)))
    groups, outputs = scales.shape
    qzeros = expect(where, tensors, "qzeros", "int32", (groups, None))
    bits = qzeros.shape[1] * 32 // outputs
    if bits not in BITS or qzeros.shape[1] * 32 != bits * outputs:
        raise ValueError(f"{where}.qzeros: {list(qzeros.shape)} for {outputs} outputs is none of {BITS} bits")
    qweight = expect(where, tensors, "qweight", "int32", (None, outputs))
    inputs = qweight.shape[0] * 32 // bits
    if qweight.shape[0] * 32 != inputs * bits:
        raise ValueError(f"{where}.qweight: {qweight.shape[0]} words hold no whole number of {bits}-bit codes")
    size = -(-inputs // groups)
    if (groups - 1) * size >= inputs:
        raise ValueError(f"{where}.scales: {groups} groups for {inputs} inputs")
    g_idx = expect(where, tensors, "g_idx", "int32", (inputs,)) if "g_idx" in tensors else None
    perm = None if g_idx is None else input_order(where, g_idx, groups)
    qtype, zero_point = integer_type(bits, _zero_points(qzeros, bits, outputs, form.version))
    if perm is None and groups * size == inputs:
        qvalue = words_to_storage(qweight, qtype, inputs, 0)
    else:
        codes = unpack_words(qweight, bits, inputs, 0)
        qvalue = to_storage(fit(codes if perm is None else codes[perm], groups * size, 0), qtype)
    shape = (inputs, outputs)
    return make_linear(where, qvalue, scales, zero_point, qtype.name, shape, dtype, padded=groups * size, perm=perm)


def encode_linear(q: QArray, form: GPTQFormat, where: str) -> dict[str, np.ndarray]:
    """Makes the tensors of a kernel, bit for bit.

    Args:
        q: a kernel [K, N] of 2, 3, 4 or 8 integer bits, per channel or group.
        form: the version.
        where: the parameter's path, for errors.

    Returns:
        `qweight`, `qzeros`, `scales` (in the scale's dtype) and `g_idx`.

    Raises:
        ValueError: the format cannot hold the kernel.
    """
    check_exportable(where, q, "GPTQ", QTYPES)
    bits, (inputs, outputs) = q.format.bits, q.trailing
    if inputs * bits % 32 or outputs * bits % 32:
        raise ValueError(f"{where}: GPTQ packs whole words: {inputs} x {outputs} is no multiple of {32 // bits or 1}")
    if q.scale.shape[1] != outputs:
        raise ValueError(f"{where}: GPTQ has a scale for each output, this kernel a grid {list(q.scale.shape)}")
    zeros = unsigned_zero_points(q)
    if form.version == 1 and (zeros == 0).any():
        raise ValueError(
            f"{where}: version 1 of the format stores zero points less one and cannot hold 0, which this kernel has;"
            " write gptq_v2"
        )
    qvalue = np.asarray(q.qvalue)
    if q.perm is None:
        qweight = storage_to_words(fit_rows(qvalue, q), q.format, inputs, 0)
    else:
        codes = np.empty((inputs, outputs), np.uint8)
        codes[np.asarray(q.perm)[:, 0]] = from_storage(qvalue, q.format, inputs)
        qweight = pack_words(codes, bits, 0)
    stored = zeros - np.uint8(1 if form.version == 1 else 0)
    g_idx = group_index(q)
    return {"qweight": qweight, "qzeros": pack_words(stored, bits, 1), "scales": np.asarray(q.scale), "g_idx": g_idx}


def fit_rows(qvalue: np.ndarray, q: QArray) -> np.ndarray:
    """Cuts the padding to whole groups off a plain QArray's codes."""
    rows = -(-q.trailing[0] // 8) * q.format.bits if q.format.packed else q.trailing[0]
    return fit(qvalue, rows, 0)


def _zero_points(qzeros: np.ndarray, bits: int, outputs: int, version: int) -> np.ndarray:
    """[G, N] uint8.

    A version 1 writer takes one from whole words, so that a zero point of 0 borrows from the field above it. Three bits
    have no whole fields in a word; there one is taken from each field.
    """
    if version == 1 and bits != 3:
        ones = np.uint32(sum(1 << place for place in range(0, 32, bits)))
        qzeros = (np.ascontiguousarray(qzeros).view(np.uint32) + ones).view(np.int32)
    zeros = unpack_words(qzeros, bits, outputs, 1)
    return (zeros + np.uint8(1)) & np.uint8(7) if version == 1 and bits == 3 else zeros


def to_json(kernels: dict[str, QArray], form: GPTQFormat) -> dict[str, Any]:
    """Makes the `quantization_config` of a model's kernels.

    Args:
        kernels: by module.
        form: the version.

    Returns:
        The JSON object.

    Raises:
        ValueError: the kernels have different bits or groups.
    """
    bits = {q.format.bits for q in kernels.values()}
    if len(bits) != 1:
        raise ValueError(f"GPTQ: one number of bits for all kernels; there are {sorted(bits)}")
    name = "gptq" if form.version == 1 else "gptq_v2"
    return {
        "bits": bits.pop(),
        "group_size": common_group_size("GPTQ", kernels),
        "desc_act": any(q.perm is not None for q in kernels.values()),
        "sym": all(q.zero_point is None for q in kernels.values()),
        "lm_head": "lm_head" in kernels,
        "quant_method": "gptq",
        "checkpoint_format": name,
        "format": name,
        "pack_dtype": "int32",
    }
