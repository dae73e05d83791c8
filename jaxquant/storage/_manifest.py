"""`manifest.json`: what a checkpoint says of itself."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from jaxquant.arrays._spec import QuantConfig
from jaxquant.storage._json import read_json
from jaxquant.storage._nodes import decode_tree
from jaxquant.storage._records import Record, Shard
from jaxquant.storage._values import decode_value, encode_value

FORMAT = "jaxquant checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SIZE_LIMIT = 1 << 28  # a few hundred bytes for each array, of which unstacked experts make a hundred thousand
_FIELDS = {"format", "format_version", "library_version", "config", "algorithm", "tree", "arrays", "shards"}
_OPTIONAL = {"huggingface"}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        tree: the tree's node (see `jaxquant.storage._nodes`).
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


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
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
    content = read_json(file, size_limit=SIZE_LIMIT)
    if content.get("format") != FORMAT:
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


def library_version() -> str:
    """The installed jaxquant's version."""
    try:
        return importlib.metadata.version("jaxquant")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def manifest_text(manifest: Manifest) -> str:
    """Writes a manifest as JSON; undone by `read_manifest`."""
    config = manifest.config
    algorithm = manifest.algorithm
    if config is not None and config.algorithm is not None:
        algorithm = getattr(config.algorithm, "name", type(config.algorithm).__name__)
        config = dataclasses.replace(config, algorithm=None)
    fields = {
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
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


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
