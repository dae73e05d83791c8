"""Numbered arrays in orbax: written in shards as they come, checked against their sizes and checksums when read.

A store is a folder of orbax checkpoints, its shards. A record says for each array its logical dtype and shape and the
shard that holds it; formats that not every reader knows (float8, sub-byte integers) are stored as plain bytes.
"""

import dataclasses
import functools
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxquant.storage._chunks import Chunks, open_chunks
from jaxquant.storage._mapped import contiguous, spill
from jaxquant.storage._records import STORED_AS_IS, Record, Shard, check_shard, measure

SHARD_BYTES = 1 << 28  # arrays are gathered up to this before they are written: the memory that saving takes


class Writer:
    """Gathers arrays and writes them as shards into a folder; memory is one shard and the array at hand."""

    def __init__(self, folder: pathlib.Path, records: Iterable[Record] = (), shards: Iterable[Shard] = ()):
        """Starts with what was written before.

        Args:
            folder: an existing folder; shards are made in it.
            records: of the arrays that are there already.
            shards: that are there already.
        """
        self.folder = folder
        self.records = list(records)
        self.shards = list(shards)
        self._pending: dict[str, np.ndarray] = {}
        self._name = _shard_name()

    def put(self, path: str, leaf: Any) -> int:
        """Takes an array.

        Args:
            path: its place in the tree.
            leaf: a NumPy or JAX array, memory-mapped or not; a typed random key array; what `Reader.open` gives.

        Returns:
            Its number.

        Raises:
            TypeError: a dtype that holds no numbers.
        """
        array, key_impl = (spill(self.folder, leaf), None) if isinstance(leaf, Chunks) else as_numbers(leaf)
        stored = _to_stored(array, path)
        if self._pending and stored.nbytes + self.pending_bytes > SHARD_BYTES:
            self.flush()
        number = len(self.records)
        self.records.append(Record(path, array.shape, array.dtype.name, self._name if array.size else None, key_impl))
        if array.size:
            self._pending[str(number)] = stored
        return number

    @property
    def pending_bytes(self) -> int:
        """Bytes gathered and not yet written."""
        return sum(array.nbytes for array in self._pending.values())

    def flush(self) -> None:
        """Writes what was gathered as one shard."""
        if (write := self.detach()) is not None:
            self.shards.append(write())

    def detach(self) -> Callable[[], Shard] | None:
        """Hands over what was gathered.

        Returns:
            A function that writes it as one shard, on any thread, for the caller to list; None if there is nothing.
        """
        if not self._pending:
            return None
        write = functools.partial(_write_shard, self.folder / self._name, self._pending)
        self._pending, self._name = {}, _shard_name()
        return write


def as_numbers(leaf: Any) -> tuple[np.ndarray, str | None]:
    """An array as NumPy has it; of a typed random key its data, and the name of its generator."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf))
    return np.asarray(leaf), None


def _write_shard(target: pathlib.Path, arrays: dict[str, np.ndarray]) -> Shard:
    # Weights hardly compress (bfloat16 to 0.78, codes not at all), and compressing is slower than a disk.
    # The arrays are ours until they are written, so that orbax need not copy them.
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    known = ((np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler()))
    handlers = ocp.type_handlers.create_type_handler_registry(*known)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(target.absolute(), args=ocp.args.PyTreeSave(arrays))
    files = sorted(file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda file: measure(target / file), files)
        return Shard(target.name, dict(zip(files, sums, strict=True)))


class Reader:
    """Reads arrays of a store by number; the first use of a shard checks its files."""

    def __init__(self, folder: pathlib.Path, shards: Iterable[Shard], records: Sequence[Record]):
        """Reads nothing yet.

        Args:
            folder: the store.
            shards: those that exist.
            records: what each number is.
        """
        self.folder = folder
        self.records = records
        self._shards = {shard.name: shard for shard in shards}
        self._checked: set[str] = set()

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Reads arrays shard by shard.

        Args:
            numbers: which.

        Yields:
            (number, array of the logical dtype) in the order of shards.

        Raises:
            ValueError: a shard is missing, truncated or altered, or holds something else than its record says.
        """
        wanted: dict[str | None, list[int]] = {}
        for number in numbers:
            wanted.setdefault(self.records[number].shard, []).append(number)
        for number in wanted.pop(None, []):
            yield number, np.zeros(self.records[number].shape, self.records[number].logical_dtype)
        for name, held in wanted.items():
            folder = self._checked_shard(name, self.records[held[0]].path)
            loaded = _restore(folder, [(number, self.records[number]) for number in held])
            for number in held:
                yield number, _from_stored(loaded.pop(str(number)), self.records[number])

    def open(self, number: int) -> Chunks:
        """Opens an array for reading slices; raises what `read` does."""
        record = self.records[number]
        folder = self._checked_shard(record.shard, record.path)
        opened = open_chunks(folder, str(number), record.shape, record.stored_dtype)
        return dataclasses.replace(opened, dtype=record.logical_dtype)

    def _checked_shard(self, name: str | None, path: str) -> pathlib.Path:
        """The folder of the shard said to hold the array at `path`, checked when it is first used."""
        if name not in self._shards:
            raise ValueError(f"{self.folder}: the manifest lists no shard {name!r}, said to hold {path}")
        if name not in self._checked:
            check_shard(self.folder, self._shards[name])
            self._checked.add(name)
        return self.folder / name


def _shard_name() -> str:
    return f"arrays-{uuid.uuid4().hex[:12]}"


def _restore(target: pathlib.Path, held: list[tuple[int, Record]]) -> dict[str, np.ndarray]:
    item = {str(number): jax.ShapeDtypeStruct(record.shape, record.stored_dtype) for number, record in held}
    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in item}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        request = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        return checkpointer.restore(target.absolute(), args=request)


def _to_stored(array: np.ndarray, path: str) -> np.ndarray:
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise TypeError(f"save: {path} is an array of dtype {array.dtype}; numbers are accepted")
    if array.dtype.name not in STORED_AS_IS:
        if array.dtype.itemsize != 1:
            raise TypeError(f"save: {path} is an array of dtype {array.dtype}; accepted are the dtypes of jax.numpy")
        array = np.ascontiguousarray(array).view(np.uint8).reshape(array.shape)
    return contiguous(array.astype(array.dtype.newbyteorder("="), copy=False))


def _from_stored(stored: np.ndarray, record: Record) -> np.ndarray:
    if stored.shape != record.shape or stored.dtype != record.stored_dtype:
        raise ValueError(
            f"{record.path}: the shard holds {stored.dtype}{list(stored.shape)}, the manifest says"
            f" {record.stored_dtype}{list(record.shape)}"
        )
    return stored if record.dtype in STORED_AS_IS else stored.view(record.logical_dtype)
