"""Where parameters come from: our checkpoints, orbax checkpoints and Hugging Face folders, leaf by leaf."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxquant.arrays._spec import QuantConfig
from jaxquant.interop import Module, plan_huggingface
from jaxquant.interop.huggingface import insert
from jaxquant.storage._chunks import open_chunks
from jaxquant.storage._companions import FOLDER as COMPANIONS
from jaxquant.storage._leaf import Leaf
from jaxquant.storage._manifest import MANIFEST, Manifest, read_manifest
from jaxquant.storage._nodes import decode_tree, encode_key, replace_leaves
from jaxquant.storage._store import Reader

_STUMBLES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, AssertionError)
BYTES_OF_A_BYTE = 1 << 15  # more than zstd makes of any; a claimed shape beyond that is no array in these files
AHEAD_BYTES = 1 << 26  # opening an orbax folder takes as long as reading this much of small leaves


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters in files, laid out but not read.

    Attributes:
        kind: `"jaxquant"`, `"orbax"` or `"huggingface"`.
        tree: the tree's node (see `jaxquant.storage._nodes`), with `{"leaf": number}` for each leaf.
        leaves: the leaves by number.
        fingerprint: changes when the files do.
        manifest: of a jaxquant checkpoint.
        huggingface: the config.json that belongs to the parameters, if known.
        quantization: its `quantization_config`.
        companions: the folder of the tokenizer files that belong to them, if there is one.
    """

    kind: str
    tree: Any
    leaves: tuple[Leaf, ...]
    fingerprint: str
    manifest: Manifest | None = None
    huggingface: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    companions: pathlib.Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves in the files."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def config(self) -> QuantConfig | None:
        """What the parameters were quantized with, if known."""
        return None if self.manifest is None else self.manifest.config


def open_source(path: str | os.PathLike[str], *, modules: tuple[Module, ...] | None = None) -> Source:
    """Finds out what a folder is and lays out its parameters.

    Args:
        path: a jaxquant checkpoint, an orbax checkpoint of one tree (a manager's step has it in `default`), or a
            Hugging Face folder.
        modules: for a Hugging Face folder, see `jaxquant.interop.plan_huggingface`.

    Returns:
        The source.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is none of these, or malformed.
    """
    folder = pathlib.Path(path).absolute()
    if not folder.is_dir():
        hint = "; it is a file, name its folder" if folder.exists() else ""
        raise FileNotFoundError(f"{folder}: no such folder{hint}")
    if (folder / MANIFEST).is_file():
        return _open_ours(folder)
    if (folder / "config.json").is_file():
        plan = plan_huggingface(folder, modules=modules)
        tree: dict[str, Any] = {}
        for number, leaf in enumerate(plan.leaves):
            insert(tree, leaf.path, number)
        mark = _fingerprint(folder, "*.safetensors", "*.json", paths=[leaf.path for leaf in plan.leaves])
        return Source("huggingface", _skeleton(tree), plan.leaves, mark, None, plan.config, plan.quantization, folder)
    for candidate in (folder, folder / "default"):
        if (candidate / "_METADATA").is_file():
            return _open_orbax(candidate)
    steps = sorted(child.name for child in folder.iterdir() if (child / "default" / "_METADATA").is_file())
    hint = f"; it holds the steps {', '.join(steps)}: name one of them" if steps else ""
    raise ValueError(f"{folder}: neither a jaxquant nor an orbax checkpoint nor a Hugging Face folder{hint}")


def read_leaf(source: Source, number: int, *, opened: bool = False) -> Any:
    """Reads a leaf, and names it in what goes wrong.

    Args:
        source: where from.
        number: which.
        opened: large arrays that are not mapped need not be read, only opened.

    Returns:
        The leaf.

    Raises:
        ValueError: the files are not what they claim to be.
    """
    leaf = source.leaves[number]
    try:
        return leaf.open() if opened and leaf.open is not None else leaf.read()
    except ValueError as error:
        raise ValueError(f"{leaf.path}: {error}") from error


class _Ahead:
    """Reads leaves that are asked for in order several at a time; it holds `AHEAD_BYTES` of them, or one."""

    def __init__(self, read: Callable[[Sequence[int]], dict[int, Any]]):
        """Takes the function that reads leaves by their numbers; their sizes come when they are known."""
        self.sizes: list[int] = []
        self._read = read
        self._held: dict[int, Any] = {}
        self._next = 0

    def take(self, number: int) -> Any:
        if number not in self._held:
            self._held.clear()
            self._held = self._read(self._together(number))
        self._next = number + 1
        return self._held.pop(number)

    def _together(self, number: int) -> Sequence[int]:
        if number != self._next:
            return [number]
        ends = np.cumsum(self.sizes[number:])
        return range(number, number + max(1, int(np.searchsorted(ends, AHEAD_BYTES, "right"))))


def _open_ours(folder: pathlib.Path) -> Source:
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest.shards, manifest.records)
    leaves: list[Leaf] = []
    places: list[tuple[str, Any, list[int]]] = []
    ahead = _Ahead(lambda numbers: _read_ours(reader, {number: places[number] for number in numbers}))

    def add(path: str, node: Any) -> Any:
        numbers: list[int] = []

        def note(number: int) -> jax.ShapeDtypeStruct:
            numbers.append(number)
            return manifest.records[number].abstract

        abstract = decode_tree(node, note, path)
        ahead.sizes.append(sum(manifest.records[number].nbytes for number in numbers))
        places.append((path, node, numbers))
        opened = functools.partial(_open_node, reader, *places[-1]) if ahead.sizes[-1] > AHEAD_BYTES else None
        leaves.append(Leaf(path, ahead.sizes[-1], abstract, functools.partial(ahead.take, len(leaves)), opened))
        return {"leaf": len(leaves) - 1}

    tree = replace_leaves(manifest.tree, add)
    mark, companions = _fingerprint(folder, MANIFEST), folder / COMPANIONS
    return Source("jaxquant", tree, tuple(leaves), mark, manifest, manifest.huggingface, companions=companions)


def _open_node(reader: Reader, path: str, node: Any, numbers: list[int]) -> Any:
    """A leaf of ours whose large arrays are opened; the others are read."""
    records = reader.records
    large = [n for n in numbers if records[n].nbytes > AHEAD_BYTES and records[n].key_impl is None]
    arrays: dict[int, Any] = dict(reader.read([number for number in numbers if number not in large]))
    arrays |= {number: reader.open(number) for number in large}
    return decode_tree(node, arrays.__getitem__, path)


def _read_ours(reader: Reader, places: dict[int, tuple[str, Any, list[int]]]) -> dict[int, Any]:
    arrays: dict[int, Any] = dict(reader.read([number for _, _, numbers in places.values() for number in numbers]))
    for number in arrays:
        if (impl := reader.records[number].key_impl) is not None:
            arrays[number] = jax.random.wrap_key_data(arrays[number], impl=impl)
    return {leaf: decode_tree(node, arrays.__getitem__, path) for leaf, (path, node, _) in places.items()}


def _open_orbax(folder: pathlib.Path) -> Source:
    metadata = _use_orbax(folder, lambda checkpointer: checkpointer.metadata(folder).item_metadata)
    if metadata is None or metadata.tree is None:
        raise ValueError(f"{folder}: orbax finds no tree in it")
    held, structure = jax.tree.flatten(metadata.tree, is_leaf=_is_metadata)
    tree = _unbox(jax.tree.unflatten(structure, range(len(held))))
    ahead = _Ahead(functools.partial(_read_orbax, folder, held, structure))
    leaves = []
    for leaf, (place, number) in zip(held, jax.tree_util.tree_flatten_with_path(tree)[0], strict=True):
        path = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in place)
        if path.startswith("/"):  # tensorstore refuses ".." itself
            raise ValueError(f"{folder}: the parameter {path!r} would lie outside of it")
        if not _is_metadata(leaf):
            raise ValueError(f"{folder}: {path!r} is no array but {leaf!r}"[:300])
        abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        ahead.sizes.append(abstract.size * np.dtype(leaf.dtype).itemsize)
        large = ahead.sizes[-1] > AHEAD_BYTES
        opened = functools.partial(open_chunks, folder, leaf.name, abstract.shape, abstract.dtype) if large else None
        leaves.append(Leaf(path, ahead.sizes[-1], abstract, functools.partial(ahead.take, number), opened))
    claimed, held_bytes = sum(ahead.sizes), sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if claimed > BYTES_OF_A_BYTE * held_bytes:
        raise ValueError(f"{folder}: claims arrays of {claimed} bytes in files of {held_bytes}")
    return Source("orbax", _skeleton(tree), tuple(leaves), _fingerprint(folder, "*", "*/*", "*/*/*"))


def _read_orbax(
    folder: pathlib.Path, held: Sequence[Any], structure: Any, numbers: Sequence[int]
) -> dict[int, np.ndarray]:
    """Restores some of the leaves; orbax passes over placeholders."""
    item: list[Any] = [ocp.PLACEHOLDER] * len(held)
    for number in numbers:
        item[number] = jax.ShapeDtypeStruct(held[number].shape, held[number].dtype)
    args = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(held)
    request = ocp.args.PyTreeRestore(
        item=jax.tree.unflatten(structure, item), restore_args=jax.tree.unflatten(structure, args)
    )
    restored = jax.tree.leaves(_use_orbax(folder, lambda checkpointer: checkpointer.restore(folder, args=request)))
    return {number: restored[number] for number in numbers}


def _use_orbax(folder: pathlib.Path, use: Callable[[ocp.Checkpointer], Any]) -> Any:
    """Has orbax read; what it stumbles over in malformed files becomes an error that names the folder."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return use(checkpointer)
    except _STUMBLES as error:
        raise ValueError(f"{folder}: orbax cannot read it: {error!r}") from error


def _is_metadata(node: Any) -> bool:
    return hasattr(node, "shape")


def _unbox(tree: Any) -> Any:
    """Takes numbered leaves out of their boxes: orbax stores a variable of nnx or linen as `{"value": array}`."""
    if isinstance(tree, dict):
        return {key: _unbox(_opened(child)) for key, child in tree.items()}
    return type(tree)(_unbox(_opened(child)) for child in tree) if isinstance(tree, list | tuple) else tree


def _opened(node: Any) -> Any:
    boxed = isinstance(node, dict) and node.keys() == {"value"} and isinstance(node["value"], int)
    return node["value"] if boxed else node


def _skeleton(tree: Any) -> Any:
    """The node of nested dicts and lists with numbers at the leaves."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {"dict": [[encode_key(key, ""), _skeleton(child)] for key, child in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_skeleton(child) for child in tree]}
    return {"leaf": tree}


def _fingerprint(folder: pathlib.Path, *patterns: str, paths: Sequence[str] = ()) -> str:
    """Changes when a file of the folder does, or the paths of what is in them."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    marks = [f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([str(folder), *marks, *paths]).encode()).hexdigest()
