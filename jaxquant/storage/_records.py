"""What a checkpoint says of its arrays and of the folders that hold them, and the check that these are unaltered."""

import dataclasses
import math
import pathlib
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np

_CHECK_BYTES = 1 << 22
STORED_AS_IS = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored array.

    Attributes:
        path: its "/"-joined place in the tree.
        shape: its shape.
        dtype: the logical dtype's name.
        shard: the folder that holds it, or None for an array without elements.
        key_impl: for a typed random key, the name of its generator; its data are what is stored.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    shard: str | None
    key_impl: str | None = None

    @property
    def logical_dtype(self) -> np.dtype:
        """The dtype in use."""
        return np.dtype(self.dtype)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype in use; of a typed random key, those of its data."""
        return jax.ShapeDtypeStruct(self.shape, self.logical_dtype)

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype on disk."""
        return self.logical_dtype if self.dtype in STORED_AS_IS else np.dtype(np.uint8)

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "Record":
        """Makes a record of a manifest's fields, and refuses those that no array could have."""
        values: dict[str, Any] = {**fields, "shape": tuple(fields["shape"])}
        record = cls(**values)
        if any(type(size) is not int or size < 0 for size in record.shape):
            raise ValueError(f"{record.path}: no array has the shape {record.shape}")
        if (record.shard is None) != (0 in record.shape):
            raise ValueError(f"{record.path}: shape {record.shape} and shard {record.shard!r} contradict each other")
        if record.dtype not in STORED_AS_IS and not hasattr(ml_dtypes, record.dtype):
            raise ValueError(f"{record.path}: no array has the dtype {record.dtype!r}")
        return record

    @property
    def nbytes(self) -> int:
        """Bytes of the array as stored."""
        return math.prod(self.shape) * self.stored_dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """One orbax folder.

    Attributes:
        name: the folder's name.
        files: (size in bytes, CRC-32) by relative path.
    """

    name: str
    files: dict[str, tuple[int, int]]


def check_shard(folder: pathlib.Path, shard: Shard) -> None:
    """Compares a shard's files with the sizes and checksums taken when it was written."""
    if not re.fullmatch(r"arrays-[0-9a-f]+", shard.name):
        raise ValueError(f"{folder}: the manifest names a shard {shard.name!r}, which is none of ours")

    def check(file: str) -> str | None:
        path = folder / shard.name / file
        if ".." in pathlib.PurePosixPath(file).parts or pathlib.PurePosixPath(file).is_absolute():
            return f"{file}: lies outside the shard"
        if not path.is_file():
            return f"{shard.name}/{file}: missing"
        size, checksum = shard.files[file]
        if path.stat().st_size != size:
            return f"{shard.name}/{file}: {path.stat().st_size} bytes, {size} were written"
        return None if measure(path)[1] == checksum else f"{shard.name}/{file}: its checksum differs"

    with ThreadPoolExecutor() as pool:
        wrong = [problem for problem in pool.map(check, shard.files) if problem]
    if wrong:
        raise ValueError(f"{folder}: the checkpoint is truncated or altered: {'; '.join(wrong)}")


def measure(file: pathlib.Path) -> tuple[int, int]:
    """A file's size in bytes and CRC-32."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_CHECK_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum
