"""Writes Hugging Face folders, float and quantized."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray
from jaxquant.interop import compressed_tensors_write, hf_awq, hf_gptq
from jaxquant.interop._module import Module, find_path, suffix_name
from jaxquant.interop._parts import join_outputs, unstack_leaf
from jaxquant.interop._safetensors import INDEX, SINGLE, Pending, write_file
from jaxquant.interop.names import table_of
from jaxquant.parameters._tree import named_leaves
from jaxquant.storage._companions import copy_companions

Format = Literal["float", "gptq", "gptq_v2", "awq", "compressed-tensors"]
FORMATS = Format.__args__
FILE_BYTES = 1 << 30  # of tensors in one safetensors file, unless a single module takes more


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
    write_folder(folder, named_leaves(params), config, format=format, modules=modules)


def write_folder(
    folder: str | os.PathLike[str],
    named: Iterable[tuple[str, Any]],
    config: dict[str, Any],
    *,
    format: Format,
    modules: tuple[Module, ...] | None = None,
    companions: pathlib.Path | None = None,
) -> None:
    """Writes (path, leaf) pairs as a Hugging Face folder; holds one file's worth of tensors in memory.

    Args:
        folder: see `save_huggingface`, as are the rest.
        named: the parameters; each may be read when its turn comes.
        config: the config.json.
        format: the format of quantized kernels.
        modules: the table.
        companions: the folder of tokenizer files to copy, or None.

    Raises:
        ValueError: see `save_huggingface`.
        NotImplementedError: see `save_huggingface`.
    """
    if format not in FORMATS:
        raise ValueError(f"save_huggingface: format {format!r}; accepted: {', '.join(FORMATS)}")
    table, folder = table_of(config, modules), pathlib.Path(folder).absolute()
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        files = _Files(staged)
        kernels: dict[str, QArray] = {}
        bodies: dict[str, dict[str, Any]] = {}
        float_linears: list[str] = []
        cache: list[np.ndarray] = []
        for module, kind, suffix, leaf in _whole_modules(_home(table, path, leaf) for path, leaf in named):
            if isinstance(leaf, QArray):
                encoded, bodies[module] = _encode(leaf, format, module)
                kernels[module] = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), leaf)
                files.add({f"{module}.{name}": tensor for name, tensor in encoded.items()})
            elif kind == "linear" and suffix == "weight":
                float_linears.append(module)
                files.add({f"{module}.weight": np.asarray(leaf).T})
            else:
                files.add({f"{module}.{suffix}": np.asarray(leaf)})
                cache += [np.asarray(leaf)] if kind == "scales" else []
        quantization = _quantization(format, kernels, bodies, float_linears, cache)
        files.finish()
        copy_companions(companions, staged)
        _write_json(staged / "config.json", config | quantization)
        _publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class _Files:
    """Safetensors files of a bounded size, and their index if there are several."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.placed: list[list[str]] = []
        self.nbytes = 0
        self._held: dict[str, np.ndarray] = {}

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        held = sum(tensor.nbytes for tensor in self._held.values())
        if self._held and held + sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            self._write()
        self._held |= tensors

    def finish(self) -> None:
        self._write()
        if len(self.placed) == 1:
            os.rename(self.folder / "0.safetensors", self.folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self.placed):
            file = f"model-{number + 1:05d}-of-{len(self.placed):05d}.safetensors"
            os.rename(self.folder / f"{number}.safetensors", self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        _write_json(self.folder / INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})

    def _write(self) -> None:
        layout = {name: Pending(tensor.dtype, tensor.shape) for name, tensor in self._held.items()}
        write_file(self.folder / f"{len(self.placed)}.safetensors", layout, self._held.items())
        self.placed.append(list(self._held))
        self.nbytes += sum(tensor.nbytes for tensor in self._held.values())
        self._held = {}


def _publish(staged: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves the files in, config.json last; in an existing folder they replace those of the model before."""
    if not folder.exists():
        os.rename(staged, folder)
        return
    for old in (*folder.glob("*.safetensors"), folder / INDEX):
        if not (staged / old.name).exists():
            old.unlink(missing_ok=True)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)


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
    if isinstance(leaf, OutlierArray):
        raise ValueError(
            f"{path}: no format of Hugging Face holds float channels beside codes; dequantize this weight, or quantize"
            " it without llm_int8 and salient"
        )
    module_path, _, name = path.rpartition("/")
    found = find_path(table, module_path)
    if found is None:
        raise ValueError(f"{path}: the table of this architecture has no such parameter")
    line, values = found
    piece = _Piece(suffix_name(line.kind, name), values.get("part"), tuple(line.parts or ()), leaf)
    if line.stack is None:
        return [line.hf.format(**values)], line.kind, piece
    return [line.hf.format(**values, **{line.stack: number}) for number in range(leaf.shape[0])], line.kind, piece


def _whole_modules(named: Iterable[tuple[list[str], str, _Piece]]) -> Iterator[tuple[str, str, str, Any]]:
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
    format: Format,
    kernels: dict[str, QArray],
    bodies: dict[str, dict[str, Any]],
    ignored: list[str],
    cache: list[np.ndarray],
) -> dict[str, Any]:
    if format == "float":
        return {}
    if not kernels:
        raise ValueError(f"save_huggingface: no quantized kernel to write as {format!r}; format='float' has none")
    if format == "awq":
        return {"quantization_config": hf_awq.to_json(kernels, ignored)}
    if format == "compressed-tensors":
        return {"quantization_config": compressed_tensors_write.to_json(bodies, ignored, cache)}
    return {"quantization_config": hf_gptq.to_json(kernels, hf_gptq.GPTQFormat(2 if format == "gptq_v2" else 1))}
