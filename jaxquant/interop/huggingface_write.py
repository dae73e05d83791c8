"""Writes Hugging Face folders, float and quantized."""

import dataclasses
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from jaxquant._qarray import QArray
from jaxquant._tree import named_leaves
from jaxquant.interop import compressed_tensors_write, hf_awq, hf_gptq
from jaxquant.interop._parts import join_outputs, unstack_leaf
from jaxquant.interop._safetensors import INDEX, SINGLE, Pending, write_file
from jaxquant.interop.names import Module, find_path, suffix_name, table_of

Format = Literal["float", "gptq", "gptq_v2", "awq", "compressed-tensors"]
FORMATS = Format.__args__


def save_huggingface(
    folder: str | os.PathLike[str],
    params: Any,
    config: dict[str, Any],
    *,
    format: Format,
    modules: tuple[Module, ...] | None = None,
) -> None:
    """Writes a tree of parameters as a Hugging Face folder, quantized weights bit for bit.

    Args:
        folder: made if missing; files in it of the same names are replaced.
        params: nested dicts of arrays and QArrays, named as the table says.
        config: the config.json, which gets the `quantization_config`.
        format: `"float"`, `"gptq"`, `"gptq_v2"`, `"awq"` or `"compressed-tensors"`.
        modules: how the modules are called there; None takes the table of the config's `model_type`.

    Raises:
        ValueError: a parameter that the format cannot hold or the table does not name; nothing is written.
        NotImplementedError: the architecture is not known.
    """
    if format not in FORMATS:
        raise ValueError(f"save_huggingface: format {format!r}; accepted: {', '.join(FORMATS)}")
    table, folder = table_of(config, modules), pathlib.Path(folder)
    named = [_home(table, path, leaf) for path, leaf in named_leaves(params)]
    kernels: dict[str, QArray] = {}
    bodies: dict[str, dict[str, Any]] = {}
    float_linears: list[str] = []
    tensors: dict[str, np.ndarray] = {}
    for module, kind, suffix, leaf in _whole_modules(named):
        if isinstance(leaf, QArray):
            kernels[module] = leaf
            encoded, body = _encode(leaf, format, module)
            bodies[module] = body
            tensors |= {f"{module}.{name}": tensor for name, tensor in encoded.items()}
            continue
        array = np.asarray(leaf)
        if kind == "linear" and suffix == "weight":
            float_linears.append(module)
            array = array.T
        tensors[f"{module}.{suffix}"] = array
    quantization = _quantization(format, kernels, bodies, float_linears)
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: Pending(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(folder / SINGLE, layout, tensors.items())
    (folder / INDEX).unlink(missing_ok=True)
    _write_json(folder / "config.json", config | quantization)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A leaf on its way into a module: which part of a fused one it is."""

    suffix: str
    part: str | None
    parts: tuple[str, ...]
    leaf: Any


def _home(table: tuple[Module, ...], path: str, leaf: Any) -> tuple[list[str], str, _Piece]:
    """The modules that a parameter goes to: one, or as many as a stack has."""
    module_path, _, name = path.rpartition("/")
    found = find_path(table, module_path)
    if found is None:
        raise ValueError(f"{path}: the table of this architecture has no such parameter")
    line, values = found
    piece = _Piece(suffix_name(line.kind, name), values.get("part"), tuple(line.parts or ()), leaf)
    if line.stack is None:
        return [line.hf.format(**values)], line.kind, piece
    return [line.hf.format(**values, **{line.stack: number}) for number in range(leaf.shape[0])], line.kind, piece


def _whole_modules(named: list[tuple[list[str], str, _Piece]]) -> Iterator[tuple[str, str, str, Any]]:
    """(module, kind, suffix, leaf) with stacks undone and the parts of fused modules joined."""
    fused: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(dict)
    order: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for modules, kind, piece in named:
        leaves = [piece.leaf] if len(modules) == 1 and piece.leaf.ndim < 3 else unstack_leaf(piece.leaf)
        for module, leaf in zip(modules, leaves, strict=True):
            if piece.part is None:
                yield module, kind, piece.suffix, leaf
            else:
                fused[module, kind, piece.suffix][piece.part] = leaf
                order[module, kind, piece.suffix] = piece.parts
    for key, parts in fused.items():
        if missing := [part for part in order[key] if part not in parts]:
            raise ValueError(f"{key[0]}: its parts {', '.join(missing)} are missing")
        yield *key, join_outputs(key[0], [parts[part] for part in order[key]])


def _encode(q: QArray, format: Format, module: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if format in ("gptq", "gptq_v2"):
        return hf_gptq.encode_linear(q, hf_gptq.GPTQFormat(2 if format == "gptq_v2" else 1), module), {}
    if format == "awq":
        return hf_awq.encode_linear(q, module), {}
    if format == "compressed-tensors":
        return compressed_tensors_write.encode_linear(q, module)
    raise ValueError(f"{module}: {q!r} cannot be written as 'float'; dequantize the parameters first")


def _quantization(
    format: Format, kernels: dict[str, QArray], bodies: dict[str, dict[str, Any]], ignored: list[str]
) -> dict[str, Any]:
    if format == "float":
        return {}
    if not kernels:
        raise ValueError(f"save_huggingface: no quantized kernel to write as {format!r}; format='float' has none")
    if format == "awq":
        return {"quantization_config": hf_awq.to_json(kernels, ignored)}
    if format == "compressed-tensors":
        return {"quantization_config": compressed_tensors_write.to_json(bodies, ignored)}
    return {"quantization_config": hf_gptq.to_json(kernels, hf_gptq.GPTQFormat(2 if format == "gptq_v2" else 1))}
