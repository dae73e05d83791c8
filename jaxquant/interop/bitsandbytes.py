"""Checkpoints of bitsandbytes, read only: NF4 of QLoRA and the int8 of LLM.int8().

NF4: `weight` uint8 [N K / 2, 1], codes of the flattened [N, K] weight, the first of two in the high nibble;
`weight.absmax` float32, one a block of 64 neighbours; `weight.quant_state.bitsandbytes__nf4`, a JSON text. With nested
quantization absmax is uint8 into `weight.nested_quant_map`, times `weight.nested_absmax` a block of 256, plus an
offset. int8: `weight` int8 [N, K] and `SCB` float32 [N]; the weight is `weight * SCB / 127`.
"""

import pathlib
from typing import Any

import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import NF4_LEVELS
from jaxquant.interop._linear import Tensors, check_finite, check_surplus, expect, make_linear
from jaxquant.interop._words import fit, pack_bytes
from jaxquant.storage._json import read_json

STATE = "weight.quant_state.bitsandbytes__nf4"
SUFFIXES = (
    *(STATE, "weight.quant_state.bitsandbytes__fp4", "weight.nested_quant_map", "weight.nested_absmax"),
    *("weight.quant_map", "weight.absmax", "weight_format", "SCB", "weight"),
)


def decode_linear(tensors: Tensors, dtype: np.dtype, where: str) -> QArray:
    """Makes a kernel of a layer's tensors; codes are kept bit for bit.

    Args:
        tensors: the layer's.
        dtype: the logical dtype.
        where: the layer's name, for errors.

    Returns:
        A QArray [K, N], nf4 in groups of 64 or int8 per channel.

    Raises:
        ValueError: tensors are missing or do not fit each other.
        NotImplementedError: the fp4 table, or blocks that cross rows.
    """
    check_surplus(where, tensors, set(SUFFIXES))
    if "SCB" in tensors:
        weight = expect(where, tensors, "weight", "int8", (None, None))
        channel = check_finite(where, "SCB", expect(where, tensors, "SCB", "float32", (weight.shape[0],)))
        scale = (channel / np.float32(127)).reshape(1, -1)
        return make_linear(where, np.ascontiguousarray(weight.T), scale, None, "int8", weight.shape[::-1], dtype)
    if STATE not in tensors:
        raise NotImplementedError(
            f"{where}: of bitsandbytes nf4 and int8 are read; there are {', '.join(sorted(tensors))}"
        )
    text = expect(where, tensors, STATE, "uint8", (None,)).tobytes()
    state = read_json(pathlib.Path(f"{where}.{STATE}"), text)
    outputs, inputs, block = _geometry(state, where)
    packed = expect(where, tensors, "weight", "uint8", (outputs * inputs // 2, 1)).reshape(outputs, inputs // 2)
    levels = expect(where, tensors, "weight.quant_map", "float32", (16,))
    if not np.array_equal(levels, np.array(NF4_LEVELS, np.float32)):
        raise ValueError(f"{where}.weight.quant_map: not the levels of nf4")
    nibbles = np.stack([packed >> 4, packed & 15], -1).reshape(outputs, inputs)
    qvalue = fit(pack_bytes(nibbles.T, 4, 0), -(-inputs // 8) * 4, 0)
    absmax = _absmax(tensors, state, outputs * inputs // block, where)
    scale = np.ascontiguousarray(absmax.reshape(outputs, inputs // block).T)
    return make_linear(where, qvalue, scale, None, "nf4", (inputs, outputs), dtype)


def _geometry(state: dict[str, Any], where: str) -> tuple[int, int, int]:
    shape, block, kind = state.get("shape"), state.get("blocksize"), state.get("quant_type")
    sizes = [*shape, block] if isinstance(shape, list) else []
    if len(sizes) != 3 or not all(type(size) is int and 0 < size < 2**40 for size in sizes) or kind != "nf4":
        raise ValueError(f"{where}.{STATE}: shape {shape}, blocksize {block}, quant_type {kind!r} is malformed")
    outputs, inputs, block = sizes
    if inputs % block or inputs % 2:
        raise NotImplementedError(f"{where}: blocks of {block} cross the rows of {inputs} inputs")
    return outputs, inputs, block


def _absmax(tensors: Tensors, state: dict[str, Any], count: int, where: str) -> np.ndarray:
    if "weight.nested_absmax" not in tensors:
        return check_finite(where, "weight.absmax", expect(where, tensors, "weight.absmax", "float32", (count,)))
    codes = expect(where, tensors, "weight.absmax", "uint8", (count,))
    levels = expect(where, tensors, "weight.nested_quant_map", "float32", (256,))
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, int | float):
        raise ValueError(f"{where}.{STATE}: nested_blocksize {size!r}, nested_offset {offset!r} are malformed")
    outer = expect(where, tensors, "weight.nested_absmax", "float32", (-(-count // size),))
    absmax = levels[codes] * np.repeat(outer, size)[:count] + np.float32(offset)
    return check_finite(where, "weight.absmax", absmax)
