"""Writes kernels in the compressed-tensors format; `compressed_tensors` reads them and has the layouts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._spec import PerGroup, PerTensor, PerToken
from jaxquant.interop._linear import check_exportable, group_index
from jaxquant.interop._words import from_storage, pack_words, storage_to_words

QTYPES = " ".join([*(f"{sign}{bits}" for bits in range(2, 9) for sign in ("int", "uint")), "float8_e4m3fn"])
VERSION = "0.20.0"  # of the library whose layouts are written


def encode_linear(q: QArray, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Makes the tensors of a kernel, bit for bit, and the scheme that describes them.

    Args:
        q: a kernel [K, N] of 2 to 8 integer bits or float8_e4m3fn.
        where: the parameter's path, for errors.

    Returns:
        (the tensors, the config group's body without targets).

    Raises:
        ValueError: the format cannot hold the kernel.
    """
    check_exportable(where, q, "compressed-tensors", QTYPES)
    inputs, outputs = q.trailing
    scale, block = _collapse(q, where)
    zero_point = None if q.zero_point is None else np.asarray(q.zero_point)
    tensors = {"weight_scale": np.ascontiguousarray(scale.reshape(1) if scale.size == 1 else scale.T)}
    qvalue = np.asarray(q.qvalue)
    if q.format.kind == "float":
        form = "float-quantized"
        tensors["weight"] = np.ascontiguousarray(qvalue[:inputs].T)
    else:
        codes = None
        if q.perm is not None:
            codes = np.empty((inputs, outputs), np.uint8)
            codes[np.asarray(q.perm)[:, 0]] = from_storage(qvalue, q.format, inputs)
            tensors["weight_g_idx"] = group_index(q)
        form = "int-quantized" if q.format.bits == 8 and q.activation is not None else "pack-quantized"
        tensors |= (_encode_int if form == "int-quantized" else _encode_packed)(q, qvalue, codes, zero_point)
    if q.act_scale is not None:
        tensors["input_scale"] = np.asarray(q.act_scale).reshape(1)
    if q.act_zero_point is not None:
        tensors["input_zero_point"] = (np.asarray(q.act_zero_point).reshape(1) ^ np.uint8(128)).view(np.int8)
    weights, inputs = _weight_json(q, scale, block), _input_json(q, where)
    return tensors, {"weights": weights, "input_activations": inputs, "format": form}


def _encode_int(
    q: QArray, qvalue: np.ndarray, codes: np.ndarray | None, zero_point: np.ndarray | None
) -> dict[str, Any]:
    codes = from_storage(qvalue, q.format, q.padded) if codes is None else codes
    tensors = {"weight": np.ascontiguousarray((codes[: q.trailing[0]].T ^ np.uint8(128)).view(np.int8))}
    if zero_point is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray((zero_point.T ^ np.uint8(128)).view(np.int8))
    return tensors


def _encode_packed(
    q: QArray, qvalue: np.ndarray, codes: np.ndarray | None, zero_point: np.ndarray | None
) -> dict[str, Any]:
    bits, inputs = q.format.bits, q.trailing[0]
    words = storage_to_words(qvalue, q.format, inputs, 1) if codes is None else pack_words(codes.T, bits, 1)
    tensors = {"weight_packed": words, "weight_shape": np.array(q.trailing[::-1], np.int64)}
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_words(zero_point.T, bits, 0)
    return tensors


def to_json(groups: dict[str, dict[str, Any]], ignored: list[str], cache: Sequence[np.ndarray] = ()) -> dict[str, Any]:
    """Makes the `quantization_config` of a model.

    Args:
        groups: by module, what `encode_linear` returned.
        ignored: linear modules left in float.
        cache: scales of a float8 key and value cache: one element, or one a head.

    Returns:
        The JSON object; layers quantized alike form a group.
    """
    kinds: list[tuple[dict[str, Any], list[str]]] = []
    for module, body in groups.items():
        for known, modules in kinds:
            if known == body:
                modules.append(module)
                break
        else:
            kinds.append((body, [module]))
    forms = {body["format"] for body, _ in kinds}
    named = [(body, ["Linear"] if len(kinds) == 1 else modules) for body, modules in kinds]
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": targets, **body, "output_activations": None}
            for number, (body, targets) in enumerate(named)
        },
        "ignore": ignored,
        "kv_cache_scheme": _cache_json(cache),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _cache_json(scales: Sequence[np.ndarray]) -> dict[str, Any] | None:
    if not scales:
        return None
    strategy = "tensor" if all(scale.size == 1 for scale in scales) else "attn_head"
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}


def _collapse(q: QArray, where: str) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Undoes `_to_grid`: (scales [G, N'], block [rows of N, columns of K] or None)."""
    scale, (inputs, outputs) = np.asarray(q.scale), q.trailing
    rows = q.padded // scale.shape[0]
    if scale.shape[1] not in (1, outputs):
        return scale, (outputs // scale.shape[1], rows)
    repeated = np.repeat(scale[:, ::rows], rows, 1)[:, :outputs]
    if q.format.kind == "float" and scale.shape[0] > 1 and (scale == repeated).all():
        return scale[:, ::rows], (rows, rows)
    if q.padded != inputs:
        raise ValueError(f"{where}: {inputs} inputs padded to {q.padded}; compressed-tensors needs whole groups")
    return scale, None


def _weight_json(q: QArray, scale: np.ndarray, block: tuple[int, int] | None) -> dict[str, Any]:
    groups = scale.shape[0]
    strategy = "block" if block else "group" if groups > 1 else "tensor" if scale.size == 1 else "channel"
    return {
        "num_bits": q.format.bits,
        "type": "float" if q.format.kind == "float" else "int",
        "symmetric": q.zero_point is None,
        "strategy": strategy,
        "group_size": q.padded // groups if strategy == "group" else None,
        "block_structure": list(block) if block else None,
        "dynamic": False,
        "actorder": "group" if q.perm is not None else None,
    }


def _input_json(q: QArray, where: str) -> dict[str, Any] | None:
    spec = q.activation
    if spec is None:
        return None
    if spec.static != (q.act_scale is not None):
        raise ValueError(f"{where}: activation.static is {spec.static}, and act_scale is {q.act_scale}")
    strategy = {PerToken: "token", PerTensor: "tensor", PerGroup: "group"}[type(spec.granularity)]
    return {
        "num_bits": 8,
        "type": "float" if spec.format.kind == "float" else "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": spec.granularity.size if isinstance(spec.granularity, PerGroup) else None,
        "block_structure": None,
        "dynamic": not spec.static,
        "actorder": None,
    }
