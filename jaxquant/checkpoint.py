"""`save` and `load`: checkpoints that describe themselves, restored with no template and no model.

A checkpoint is a folder that holds `manifest.json` (the tree, the specs, the versions; `_manifest`) and numbered arrays
in orbax (`_store`). The manifest names the shards it belongs with, and replacing it is what makes a save count: a save
that dies earlier leaves the old checkpoint as it was, or nothing.
"""

import dataclasses
import importlib.metadata
import json
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
from jaxquant.storage._manifest import decode_tree, decode_value, encode_tree, encode_value
from jaxquant.storage._store import Reader, Record, Shard, Writer

FORMAT = "jaxquant checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_FIELDS = {"format", "format_version", "library_version", "config", "algorithm", "tree", "arrays", "shards"}
_OPTIONAL = {"huggingface"}

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        tree: the tree's node (see `jaxquant.storage._manifest`).
        records: what each numbered array is and where.
        shards: the orbax folders, with the sizes and checksums of their files.
        config: what the parameters were quantized with, its algorithm left out, or None.
        algorithm: the name of the config's algorithm, or None.
        library_version: of the jaxquant that wrote it.
        huggingface: the config.json of the model it was converted from, or None.
    """

    tree: Any
    records: tuple[Record, ...]
    shards: tuple[Shard, ...]
    config: QuantConfig | None = None
    algorithm: str | None = None
    library_version: str = ""
    huggingface: dict[str, Any] | None = None


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


def read_manifest(path: Path) -> Manifest:
    """Reads what a checkpoint says of itself, without its arrays.

    Args:
        path: the checkpoint's folder.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no checkpoint, a malformed one, or one of a newer format.
    """
    folder = pathlib.Path(path)
    file = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint")
    if not file.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, so this is no jaxquant checkpoint, or its save never finished")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no readable JSON, the file is truncated or altered ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file}: written by another program; a jaxquant checkpoint says format {FORMAT!r}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {version!r} by jaxquant {content.get('library_version')}; this"
            f" jaxquant {library_version()} reads version {FORMAT_VERSION}: upgrade it"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: malformed: {error!r}") from error


def build_tree(folder: pathlib.Path, manifest: Manifest, get: Callable[[int], Any]) -> Any:
    """Makes the tree of a manifest, its arrays given by number."""
    try:
        return decode_tree(manifest.tree, get)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST}: malformed tree: {error}") from error


def check_target(target: pathlib.Path, overwrite: bool) -> None:
    """Refuses to write over what is there, unless asked to and it is a checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target}: exists; pass overwrite=True to replace it")
    if not (target / MANIFEST).is_file():
        raise FileExistsError(f"{target}: exists and is no checkpoint; overwrite=True replaces checkpoints only")


def staging_folder(target: pathlib.Path) -> pathlib.Path:
    """Where a checkpoint is written before it counts: beside its target, hidden."""
    return target.with_name(f".{target.name}.partial")


def publish(staged: pathlib.Path, target: pathlib.Path, manifest: Manifest) -> None:
    """Makes a staged store the checkpoint at `target` in one atomic step.

    Args:
        staged: holds the manifest's shards.
        target: absent or empty, or an old checkpoint, which stays whole until the new manifest takes its place.
        manifest: the new checkpoint's.
    """
    _write_synced(staged / MANIFEST, json.dumps(_unparse(manifest), separators=(",", ":"), allow_nan=False))
    if not (target / MANIFEST).exists():
        os.rename(staged, target)
    else:
        names = {shard.name for shard in manifest.shards}
        for name in names:
            os.rename(staged / name, target / name)
        shutil.rmtree(target / COMPANIONS, ignore_errors=True)
        if (staged / COMPANIONS).exists():
            os.rename(staged / COMPANIONS, target / COMPANIONS)
        os.replace(staged / MANIFEST, target / MANIFEST)
        for old in target.glob("arrays-*"):
            if old.name not in names:
                shutil.rmtree(old)
    _sync_folder(target.parent)


def library_version() -> str:
    """The installed jaxquant's version."""
    try:
        return importlib.metadata.version("jaxquant")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


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


def _unparse(manifest: Manifest) -> dict[str, Any]:
    config = manifest.config
    algorithm = manifest.algorithm
    if config is not None and config.algorithm is not None:
        algorithm = getattr(config.algorithm, "name", type(config.algorithm).__name__)
        config = dataclasses.replace(config, algorithm=None)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        "config": encode_value(config, "config"),
        "algorithm": algorithm,
        "huggingface": manifest.huggingface,
        "tree": manifest.tree,
        "arrays": [dataclasses.asdict(record) for record in manifest.records],
        "shards": {shard.name: shard.files for shard in manifest.shards},
    }


def _parse(content: dict[str, Any]) -> Manifest:
    if unknown := set(content) - _FIELDS - _OPTIONAL:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    shards = tuple(
        Shard(name, {file: (int(size), int(checksum)) for file, (size, checksum) in files.items()})
        for name, files in content["shards"].items()
    )
    return Manifest(
        content["tree"],
        tuple(Record.parse(fields) for fields in content["arrays"]),
        shards,
        decode_value(content["config"], "config"),
        content["algorithm"],
        content["library_version"],
        content.get("huggingface"),
    )


def _write_synced(file: pathlib.Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
