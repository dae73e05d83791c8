"""Large arrays in orbax folders, read by slices: what the files hold is in memory once, not beside the whole array."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import tensorstore as ts


@dataclasses.dataclass(frozen=True)
class Chunks:
    """An array whose slices are read when asked for; its chunks stay in memory, decoded, as long as it does.

    Attributes:
        place: the file's folder and the array's name, for errors.
        store: the array in tensorstore.
        dtype: the dtype in use, of the size of the one it is stored in.
    """

    place: str
    store: ts.TensorStore
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.store.shape

    @property
    def ndim(self) -> int:
        """The array's rank."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The array's elements."""
        return math.prod(self.shape)

    def __getitem__(self, place: Any) -> np.ndarray:
        """Reads a slice into an array of its own; raises ValueError for files that are not what they claim to be."""
        try:
            return np.asarray(self.store[place].read(order="C").result()).view(self.dtype)
        except (ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"{self.place}: tensorstore cannot read it: {error}") from error


def open_chunks(folder: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Chunks:
    """Opens an array of an orbax checkpoint in tensorstore; orbax itself reads no slices without a sharding.

    Orbax keeps an array as zarr 2 or 3 at the path of its name, in a database of OCDBT or else in plain folders; that
    is its file format (of `ocp.type_handlers.get_json_tspec_read` also), and has held since its first release.

    Args:
        folder: the checkpoint.
        name: the array's, as its metadata have it: keys joined with dots.
        shape: what it must have.
        dtype: likewise.

    Raises:
        ValueError: there is no such array.
    """
    files = {"driver": "file", "path": f"{folder}/"}
    if (folder / "manifest.ocdbt").is_file():
        files = {"driver": "ocdbt", "base": files}
    cache = {"cache_pool": {"total_bytes_limit": 2 * math.prod(shape) * dtype.itemsize}}  # all of it, and bookkeeping
    try:
        spec = {"driver": "auto", "kvstore": {**files, "path": f"{files.get('path', '')}{name}/"}}
        store = ts.open(spec, open=True, read=True, context=ts.Context(cache)).result()
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{folder}: tensorstore cannot open {name!r}: {error}") from error
    if store.shape != shape or store.dtype.numpy_dtype != dtype:
        found = f"{store.dtype.name}{list(store.shape)}"
        raise ValueError(f"{folder}: {name!r} is {found} in its files, {dtype}{list(shape)} in the metadata")
    return Chunks(f"{folder}: {name!r}", store, dtype)
