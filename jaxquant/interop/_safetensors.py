"""Safetensors files read by memory map and written as a stream, with every claim of a header checked.

The format: eight bytes of header length (little-endian), a JSON header naming dtype, shape and byte range of each
tensor, then the data. The library of that name has no NumPy dtype for float8, reads each tensor into memory and writes
from a whole dict; a conversion in bounded memory needs none of these limits.

References:
    https://github.com/huggingface/safetensors, README, section "Format".
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxquant.storage._json import read_json
from jaxquant.storage._mapped import forget_pages

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_BYTES = 1 << 22  # written at a time
HEADER_LIMIT = 32_000_000  # parsed, a hostile one takes some thirty times that; real ones take less than 10 MB
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: its safetensors file.
        dtype: its dtype.
        shape: its shape.
        begin: first byte in the file.
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, memory-mapped and read-only."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.file, np.uint8, "r", self.begin, (self.nbytes,))
        return raw.view(self.dtype).reshape(self.shape)


def open_folder(folder: str | os.PathLike[str]) -> dict[str, Stored]:
    """Lists the tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Args:
        folder: a Hugging Face model folder.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: the folder, or a file that the index names, is missing.
        ValueError: a header or the index is malformed; the message says where.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there; pickled weights are not read")
        return read_header(folder / SINGLE)
    weight_map = _weight_map(folder / INDEX)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing, though {INDEX} names it")
        held = read_header(folder / file)
        if twice := sorted(held.keys() & tensors.keys()):
            raise ValueError(f"{folder}: tensors that lie in two files: {', '.join(twice[:5])}")
        tensors |= held
    wrong = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    unlisted = sorted(tensors.keys() - weight_map.keys())
    if wrong or unlisted:
        raise ValueError(f"{folder / INDEX}: misplaces {wrong[:5]} and does not list {unlisted[:5]}")
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII):
            raise ValueError(f"{index}: {name!r} lies in {file!r}, which is no plain *.safetensors file name")
    return weight_map


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """Reads and checks the header of one file.

    Args:
        file: a safetensors file.

    Returns:
        Its tensors by name, all of which lie inside the file.

    Raises:
        ValueError: the file is truncated, its ranges overlap, leave gaps or contradict dtype and shape, or it claims a
            dtype or a shape that no tensor has.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: truncated: {size} bytes cannot hold a header of {length}")
        if length > HEADER_LIMIT:
            raise ValueError(f"{file}: a header of {length} bytes; at most {HEADER_LIMIT} are accepted")
        header = read_json(file, stream.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _parse_tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            raise ValueError(f"{file}: {name} begins at byte {tensor.begin}, the tensor before it ends at {end}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{file}: {'truncated' if size < end else 'too long'}: {size} bytes, its tensors end at {end}")
    return tensors


def _parse_tensor(file: pathlib.Path, name: str, entry: Any, data: int) -> Stored:
    where = f"{file}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: needs exactly dtype, shape and data_offsets, got {str(entry)[:100]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: dtype {str(dtype)[:40]!r}; accepted: {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{where}: shape {str(shape)[:80]}, data_offsets {str(offsets)[:80]}: no lists of sizes")
    if len(shape) > 32 or len(offsets) != 2:
        raise ValueError(f"{where}: shape of {len(shape)} dimensions, {len(offsets)} data_offsets")
    tensor = Stored(file, DTYPES[dtype], tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"{where}: {dtype}{shape} takes {tensor.nbytes} bytes, data_offsets span {offsets}")
    return tensor


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written: what the header needs to know before the data exist.

    Attributes:
        dtype: its dtype.
        shape: its shape.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(file: pathlib.Path, layout: Mapping[str, Pending], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a safetensors file, one tensor in memory at a time, and names it only when it is complete.

    Args:
        file: the target.
        layout: dtype and shape of every tensor, in the order they will come.
        tensors: the tensors in that order.

    Raises:
        ValueError: a tensor is not what the layout says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, pending in layout.items():
        span = [begin, begin + pending.nbytes]
        header[name] = {"dtype": _NAMES[pending.dtype], "shape": list(pending.shape), "data_offsets": span}
        begin = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, pending), (given, tensor) in zip(layout.items(), tensors, strict=True):
            if given != name or tensor.shape != pending.shape or tensor.dtype != pending.dtype:
                found = f"{given} {tensor.dtype}{list(tensor.shape)}"
                raise ValueError(f"{file}: expected {name} {pending.dtype}{list(pending.shape)}, got {found}")
            _write_tensor(stream, tensor)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def _write_tensor(stream: BinaryIO, tensor: np.ndarray) -> None:
    """Writes a tensor by blocks of rows: one that is turned, or lies in a mapped file, is never whole in memory."""
    rows = np.atleast_1d(tensor)
    count = max(1, BLOCK_BYTES * len(rows) // max(rows.nbytes, 1))
    for start in range(0, len(rows), count):
        stream.write(np.ascontiguousarray(rows[start : start + count]).reshape(-1).view(np.uint8).data)
    forget_pages(tensor)
