"""Reads Hugging Face folders, float and quantized: planned from their headers, read leaf by leaf."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.interop import bitsandbytes, compressed_tensors, hf_awq, hf_gptq
from jaxquant.interop._linear import FLOATS, Tensors
from jaxquant.interop._module import Config, Module, count_outputs, find_module, leaf_name
from jaxquant.interop._parts import cut_outputs, stack_leaves
from jaxquant.interop._safetensors import Stored, open_folder
from jaxquant.interop.names import DERIVED, is_tied, missing_modules, table_of
from jaxquant.storage._json import read_json
from jaxquant.storage._leaf import Leaf
from jaxquant.storage._mapped import contiguous

LISTED = 1000  # missing modules in a message; a config may claim any number of layers
_LOGICAL = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_SUFFIXES = sorted(
    {*hf_gptq.SUFFIXES, *hf_awq.SUFFIXES, *compressed_tensors.SUFFIXES, *bitsandbytes.SUFFIXES}, key=len, reverse=True
)
_QUANTIZED = {"qweight", "weight_packed", "weight_scale", "SCB", "weight.absmax"}  # one of these marks a layer


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder laid out as our parameters.

    Attributes:
        config: its config.json, without the quantization.
        quantization: the `quantization_config`, or None for float weights.
        leaves: its parameters.
    """

    config: dict[str, Any]
    quantization: dict[str, Any] | None
    leaves: tuple[Leaf, ...]


Decode = Callable[[Tensors, str], QArray]


def plan_huggingface(folder: str | os.PathLike[str], *, modules: tuple[Module, ...] | None = None) -> Folder:
    """Lays a Hugging Face folder out as parameters, reading headers only.

    Args:
        folder: holds config.json and safetensors: float, GPTQ, AWQ, compressed-tensors or bitsandbytes.
        modules: how its modules are called here; None takes the table of its `model_type`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed, or modules are missing or surplus; all are listed.
        NotImplementedError: the architecture or the format is not read.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json")
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None)
    if quantization is None and (folder / "quantize_config.json").is_file():
        quantization = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
    table = table_of(config, modules)
    by_module: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in open_folder(folder).items():
        if not DERIVED.fullmatch(name):
            module, suffix = _split(name)
            by_module[module][suffix] = stored
    if is_tied(config):
        by_module.pop("lm_head", None)
    found = {module: find_module(table, module) for module in by_module}
    unknown = [module for module, line in found.items() if line is None]
    surplus = sorted(f"{module}.{suffix}" for module in unknown for suffix in by_module[module])
    known = {module: line for module, line in found.items() if line is not None}
    missing = list(itertools.islice(missing_modules(table, list(known.values()), config), LISTED))
    if missing or surplus:
        hint = "; a head that is the embedding has tie_word_embeddings: true" if missing == ["lm_head"] else ""
        raise ValueError(
            f"{folder}: does not fit {config.get('model_type')}: missing {missing}, surplus {surplus}{hint}"
        )
    decode = _decoder(config, quantization)
    leaves = [
        leaf
        for module, (line, values) in known.items()
        for leaf in _module_leaves(module, line, values, by_module[module], config, decode)
    ]
    return Folder(config, quantization, tuple(_stacked(leaves)))


def load_huggingface(
    folder: str | os.PathLike[str], *, modules: tuple[Module, ...] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a Hugging Face folder into a tree of parameters, quantized weights bit for bit.

    Args:
        folder: see `plan_huggingface`.
        modules: see `plan_huggingface`.

    Returns:
        (nested dict of NumPy arrays, memory-mapped where stored as used, and QArrays; config.json without the
        quantization).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed, or modules are missing or surplus.
        NotImplementedError: the architecture or the format is not read.
    """
    plan = plan_huggingface(folder, modules=modules)
    tree: dict[str, Any] = {}
    for leaf in plan.leaves:
        insert(tree, leaf.path, leaf.read())
    return tree, plan.config


def insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf at a "/"-joined path of nested dicts.

    Raises:
        ValueError: there is a parameter at the path, or one before or beyond it.

    >>> tree = {}
    >>> insert(tree, "a/b", 1)
    >>> tree
    {'a': {'b': 1}}
    """
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{path}: the table of names has a parameter at a part of this path")
    if last in tree:
        raise ValueError(f"{path}: the table of names has another parameter at this path, or beyond it")
    tree[last] = leaf


def _split(name: str) -> tuple[str, str]:
    """Splits a tensor's name into module and suffix; the suffixes of some formats hold dots."""
    for suffix in _SUFFIXES:
        if name.endswith("." + suffix):
            return name[: -len(suffix) - 1], suffix
    module, _, suffix = name.rpartition(".")
    return module, suffix


def _decoder(config: dict[str, Any], quantization: dict[str, Any] | None) -> Decode:
    """The function that makes a kernel of a quantized layer's tensors."""
    dtype = np.dtype(_LOGICAL.get(str(config.get("dtype") or config.get("torch_dtype")), np.float32))
    if quantization is None:
        return lambda tensors, where: _refuse(where)
    method = quantization.get("quant_method")
    if method == "gptq":
        form = hf_gptq.GPTQFormat.from_json(quantization)
        return lambda tensors, where: hf_gptq.decode_linear(tensors, form, dtype, where)
    if method == "awq":
        hf_awq.check_config(quantization)
        return lambda tensors, where: hf_awq.decode_linear(tensors, dtype, where)
    if method == "compressed-tensors":
        schemes = compressed_tensors.parse_config(quantization)
        return lambda tensors, where: compressed_tensors.decode_linear(
            tensors, compressed_tensors.scheme_of(schemes, where), dtype, where
        )
    if method == "bitsandbytes":
        return lambda tensors, where: bitsandbytes.decode_linear(tensors, dtype, where)
    raise NotImplementedError(
        f"quantization_config: quant_method {method!r}; gptq, awq, compressed-tensors and bitsandbytes are read"
    )


def _refuse(where: str) -> QArray:
    raise ValueError(f"{where}: tensors of a quantized layer, but config.json has no quantization_config")


def _module_leaves(
    module: str, line: Module, values: dict[str, str], stored: dict[str, Stored], config: dict[str, Any], decode: Decode
) -> Iterator[tuple[Module, int, Leaf]]:
    """The leaves of one module, with its line and its place in a stack; parts of a fused module are leaves apart."""
    quantized = line.kind == "linear" and bool(_QUANTIZED & stored.keys())
    plain = {suffix: tensor for suffix, tensor in stored.items() if suffix == "bias" or not quantized}
    coded = {suffix: tensor for suffix, tensor in stored.items() if suffix not in plain}
    place = int(values[line.stack]) if line.stack else -1
    path = line.path.format(**values, part="{part}")
    whole = [_float_leaf(module, line, path, suffix, tensor) for suffix, tensor in plain.items()]
    if coded:
        nbytes = sum(tensor.nbytes for tensor in coded.values())
        read = lambda: decode({suffix: tensor.read() for suffix, tensor in coded.items()}, module)  # noqa: E731
        whole.append(Leaf(f"{path}/kernel", nbytes, None, read))
    for leaf in whole:
        for part in [leaf] if line.parts is None else _cut(module, leaf, line.parts, config):
            yield line, place, part


def _float_leaf(module: str, line: Module, path: str, suffix: str, tensor: Stored) -> Leaf:
    path = f"{path}/{leaf_name(line.kind, suffix)}"
    if tensor.dtype.name not in FLOATS.split():
        found = f"{module}.{suffix}: {tensor.dtype}{list(tensor.shape)}"
        raise ValueError(f"{found}; a float parameter is {FLOATS.replace(' ', ', ')}")
    if line.kind == "linear" and suffix == "weight":
        turned = jax.ShapeDtypeStruct(tensor.shape[::-1], tensor.dtype)
        return Leaf(path, tensor.nbytes, turned, lambda: tensor.read().T)
    return Leaf(path, tensor.nbytes, jax.ShapeDtypeStruct(tensor.shape, tensor.dtype), tensor.read)


def _cut(module: str, leaf: Leaf, parts: Mapping[str, str], config: Config) -> Iterator[Leaf]:
    """The parts of a leaf of a fused module; `leaf.path` has a place for their names."""
    sizes = [count_outputs(size, config) for size in parts.values()]
    ends = list(itertools.accumulate(sizes))
    held = leaf.abstract
    if held is not None and (not held.shape or held.shape[-1] != ends[-1]):
        raise ValueError(f"{module}: {list(held.shape)} [in, out], where its parts take {sizes} outputs")
    for part, start, stop in zip(parts, [0, *ends], ends, strict=False):
        abstract = None if held is None else jax.ShapeDtypeStruct((*held.shape[:-1], stop - start), held.dtype)
        read = functools.partial(_read_part, module, leaf, start, stop, ends[-1])
        yield Leaf(leaf.path.format(part=part), leaf.nbytes // len(parts), abstract, read)


def _read_part(module: str, leaf: Leaf, start: int, stop: int, outputs: int) -> Any:
    whole = leaf.read()
    if whole.shape[-1] != outputs:
        raise ValueError(f"{module}: {whole.shape[-1]} outputs, where its parts take {outputs}")
    return cut_outputs(module, whole, start, stop)


def _stacked(leaves: list[tuple[Module, int, Leaf]]) -> Iterator[Leaf]:
    """Joins the leaves of stacked modules, which have the same path."""
    by_path: dict[str, list[tuple[int, Leaf]]] = defaultdict(list)
    for _, place, leaf in leaves:
        by_path[leaf.path].append((place, leaf))
    for path, held in by_path.items():
        held.sort(key=lambda item: item[0])
        places, parts = [place for place, _ in held], [leaf for _, leaf in held]
        if places == [-1]:
            yield parts[0]
            continue
        if -1 in places:
            raise ValueError(f"{path}: the table of names sends {len(places)} tensors there")
        if places != list(range(len(places))):
            raise ValueError(f"{path}: its parts are numbered {places}")
        first = parts[0].abstract
        abstract = None if first is None else jax.ShapeDtypeStruct((len(parts), *first.shape), first.dtype)
        yield Leaf(path, sum(leaf.nbytes for leaf in parts), abstract, functools.partial(_read_stack, path, parts))


def _read_stack(path: str, parts: list[Leaf]) -> Any:
    """Reads the parts of a stack: float ones into their places, one at a time."""
    kinds = {None if part.abstract is None else (part.abstract.shape, part.abstract.dtype) for part in parts}
    first = parts[0].abstract
    if len(kinds) > 1 or first is None:
        return stack_leaves(path, [part.read() for part in parts])
    stacked = np.empty((len(parts), *first.shape), first.dtype)
    for place, part in enumerate(parts):
        stacked[place] = contiguous(part.read())
    return stacked
