"""Reads and writes Hugging Face folders: config.json and one or several safetensors files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder, Params
from jaxquant.interop import load_huggingface
from jaxquant.interop._module import find_path, suffix_name
from jaxquant.interop.names import table_of

_FLOATS = ("float32", "float16", "bfloat16")
_INDEX = "model.safetensors.index.json"


def load_hf(folder: str | pathlib.Path) -> tuple[DecoderConfig, Params]:
    """Reads a Hugging Face folder into a config and the parameter tree of `Decoder`.

    Kernels are transposed to [in, out]; every parameter is a NumPy array of the checkpoint's own dtype, or what
    `jaxquant.interop.load_huggingface` makes of it where the folder is quantized.

    Args:
        folder: holds config.json and model.safetensors, or several safetensors files and their index.

    Returns:
        The config and the nested dict of parameters.

    Raises:
        FileNotFoundError: config.json or a safetensors file is missing.
        NotImplementedError: the config asks for something `Decoder` has not, or for a format that is not read.
        ValueError: tensors missing from the files, surplus, of another shape or not float; all are listed.
    """
    folder = pathlib.Path(folder)
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = DecoderConfig.from_hf(hf)
    if hf.get("quantization_config") or (folder / "quantize_config.json").is_file():
        return config, load_huggingface(folder)[0]
    expected = {path: (_hf_names(config, path, leaf.shape), leaf.shape) for path, leaf in _shapes(config).items()}
    shapes = {name: (path, shape[-2:]) for path, (names, shape) in expected.items() for name in names}
    found, surplus = {}, []
    for name, tensor in _tensors(folder):
        if _derived(name, config):
            continue
        if name not in shapes:
            surplus.append(name)
            continue
        path, shape = shapes[name]
        found[name] = _to_flax(path, tensor)
        if found[name].shape != shape or str(tensor.dtype) not in _FLOATS:
            surplus.append(f"{name} ({tensor.dtype} {tensor.shape}, expected {'/'.join(path)} {shape} [in, out])")
    missing = [name for name in shapes if name not in found]
    if missing or surplus:
        raise ValueError(f"{folder}: does not fit {config.model_type}: missing {missing}, surplus or misfit {surplus}")
    flat = {path: _joined([found[name] for name in names], shape) for path, (names, shape) in expected.items()}
    return config, unflatten_dict(flat)


def save_hf(
    folder: str | pathlib.Path, params: Params, config: DecoderConfig, max_shard_bytes: int | None = None
) -> None:
    """Writes config.json and the parameters, in their dtype, as a Hugging Face folder.

    Args:
        folder: made if missing.
        params: the parameter tree of `Decoder`.
        config: its architecture.
        max_shard_bytes: split into several files of at most this much (a larger tensor gets a file of its own).
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        names = _hf_names(config, path, leaf.shape)
        parts = np.asarray(leaf).reshape(len(names), *leaf.shape[-2:])
        tensors |= {name: _to_hf(path, part) for name, part in zip(names, parts, strict=True)}
    dtype = str(next(iter(tensors.values())).dtype)
    text = json.dumps(config.to_hf() | {"torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    shards = _shard(tensors, max_shard_bytes)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shapes(config: DecoderConfig) -> dict[tuple[str, ...], Any]:
    return flatten_dict(jax.eval_shape(Decoder(config).init_params, jax.random.key(0)))


def _hf_names(config: DecoderConfig, path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """The tensors that hold a parameter: one, or one for each expert."""
    *modules, leaf = path
    found = find_path(table_of({"model_type": config.model_type}, None), "/".join(modules))
    if found is None:
        raise ValueError(f"{'/'.join(path)}: a {config.model_type} has no such parameter")
    line, values = found
    suffix = suffix_name(line.kind, leaf)
    if line.stack is None:
        return [f"{line.hf.format(**values)}.{suffix}"]
    return [f"{line.hf.format(**values, **{line.stack: number})}.{suffix}" for number in range(shape[0])]


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return parts[0] if parts[0].ndim == len(shape) else np.stack(parts)


def _to_flax(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.T) if path[-1] == "kernel" else tensor


_to_hf = _to_flax  # a transposition is its own inverse


def _derived(name: str, config: DecoderConfig) -> bool:
    """Says whether a stored tensor repeats what the config or another tensor already holds."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _tensors(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    index = folder / _INDEX
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file}: missing; a model folder holds model.safetensors or {_INDEX}")
        with safe_open(folder / file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, opened.get_tensor(name)


def _shard(tensors: dict[str, np.ndarray], max_bytes: int | None) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_bytes is not None and shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
