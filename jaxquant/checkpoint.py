"""`save` and `load`: checkpoints that describe themselves, restored with no template and no model.

A checkpoint is a folder that holds `manifest.json` (the tree, the specs, the versions; `storage/_manifest`) and
numbered arrays in orbax (`storage/_store`). The manifest names the shards it belongs with, and replacing it is what
makes a save count: a save that dies earlier leaves the old checkpoint as it was, or nothing.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.arrays._spec import QuantConfig
from jaxquant.storage._companions import FOLDER as COMPANIONS
from jaxquant.storage._companions import copy_companions
from jaxquant.storage._manifest import Manifest, build_tree, read_manifest
from jaxquant.storage._nodes import decode_tree, encode_tree
from jaxquant.storage._publish import check_target, publish, staging_folder
from jaxquant.storage._records import Record
from jaxquant.storage._store import Reader, Writer

Path = str | os.PathLike[str]


def save(path: Path, qparams: Any, *, config: QuantConfig | None = None, overwrite: bool = False) -> None:
    """Writes a parameter tree as a checkpoint, wholly or not at all.

    Memory above the parameters themselves: about 256 MiB or the largest array.

    Args:
        path: the checkpoint's folder on a local file system.
        qparams: the tree: dicts, FrozenDicts, lists, tuples, nnx states, partition boxes, None, arrays, QArrays.
        config: what it was quantized with, kept for the record.
        overwrite: replaces the checkpoint at `path`.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or what is there is no checkpoint.
        TypeError: a node, key or dtype that a checkpoint cannot hold; the message names the parameter.
        NotImplementedError: more than one JAX process.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save(f"{folder}/model", {"layers": ({"kernel": jnp.ones((2, 3), jnp.bfloat16)}, None)})
    >>> load(f"{folder}/model")["layers"][0]["kernel"].dtype
    dtype(bfloat16)
    """
    if jax.process_count() > 1:
        raise NotImplementedError("save: cannot save parameters spread over several JAX processes; gather them first")
    target = pathlib.Path(path).absolute()
    check_target(target, overwrite)
    write_tree(target, qparams, config)


def write_tree(
    target: pathlib.Path,
    qparams: Any,
    config: QuantConfig | None,
    huggingface: dict[str, Any] | None = None,
    companions: pathlib.Path | None = None,
) -> None:
    """Writes a tree beside `target` and publishes it there; what it died in the middle of is cleared first."""
    staged = staging_folder(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        writer = Writer(staged)
        tree = encode_tree(qparams, writer.put)
        writer.flush()
        manifest = Manifest(tree, tuple(writer.records), tuple(writer.shards), config, huggingface=huggingface)
        copy_companions(companions, staged / COMPANIONS)
        publish(staged, target, manifest)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load(path: Path, *, sharding: Any = None) -> Any:
    """Restores a checkpoint: the same tree types, static fields and bits, with no template.

    Args:
        path: a folder that `save` or `jaxquant convert` wrote.
        sharding: where the arrays go: None for the default device, a `jax.sharding.Sharding` for all of them, a
            function `(path, jax.ShapeDtypeStruct) -> Sharding | None` (a QArray's arrays are `.../qvalue`,
            `.../scale`, ...), or a tree prefix of the checkpoint's tree whose leaves are shardings or None.

    Returns:
        The tree. Arrays are JAX arrays; those of a dtype that JAX would narrow (int64, float64 without x64) stay NumPy.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no checkpoint, truncated, altered, of a newer format, or cannot be placed as asked.
    """
    folder = pathlib.Path(path).absolute()
    manifest = read_manifest(folder)
    place = _placement(manifest, sharding)
    reader = Reader(folder, manifest.shards, manifest.records)
    arrays = {number: place(number, array) for number, array in reader.read(range(len(manifest.records)))}
    return build_tree(folder, manifest, arrays.__getitem__)


def _placement(manifest: Manifest, sharding: Any) -> Callable[[int, np.ndarray], Any]:
    """Resolves the caller's sharding into a function of an array and its number."""
    wanted: dict[int, Any]
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        wanted = dict.fromkeys(range(len(manifest.records)), sharding)
    elif callable(sharding):
        wanted = {number: sharding(record.path, record.abstract) for number, record in enumerate(manifest.records)}
    else:
        numbers = decode_tree(manifest.tree, partial(_Number.of, manifest))
        prefix = jax.tree.map(_Wanted, sharding, is_leaf=lambda node: node is None)
        pairs = zip(jax.tree.leaves(numbers), jax.tree.leaves(jax.tree.broadcast(prefix, numbers)), strict=True)
        wanted = {leaf.number: chosen.sharding for leaf, chosen in pairs if isinstance(leaf, _Number)}

    def place(number: int, array: np.ndarray) -> Any:
        record = manifest.records[number]
        try:
            return _place(array, record, wanted.get(number))
        except (ValueError, TypeError) as error:
            where = f"{record.path} {list(record.shape)}"
            raise ValueError(f"{where}: cannot be placed as {wanted.get(number)}: {error}") from error

    return place


@dataclasses.dataclass(frozen=True)
class _Number:
    """A leaf that stands for an array while a tree of shardings is spread over the tree of arrays."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, manifest: Manifest, number: int) -> "_Number":
        record = manifest.records[number]
        return cls(number, record.shape, record.logical_dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A leaf that stands for a sharding, or for None, which by itself would be an empty tree."""

    sharding: jax.sharding.Sharding | None


def _place(array: np.ndarray, record: Record, sharding: jax.sharding.Sharding | None) -> Any:
    if record.key_impl is not None:
        array = jax.random.wrap_key_data(jnp.asarray(array), impl=record.key_impl)
    elif jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)
