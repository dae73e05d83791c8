"""Arrays that lie in memory-mapped files: made, turned into row order, and their memory given back."""

import math
import mmap
import pathlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxquant.storage._chunks import Chunks

_BLOCK = 128  # columns turned at a time: what a cache holds of them
_PAD_BYTES = 64  # between them: at a distance of a power of two they would share a few places of the cache
_RUN = 16 * _BLOCK  # columns after which the pages read are given back
_THREADS = 2  # while one waits for the disk, the other copies
_SPILL_BYTES = 1 << 22  # of chunks copied to a file at a time


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in row order.

    Args:
        array: of any layout; a matrix that lies in a file by columns, as kernels of other libraries do, is turned by
            blocks, several at a time, and holds no more of the file's memory than these take.

    Returns:
        The array itself where it is in row order already, else a copy.

    >>> contiguous(np.ones((2, 3)).T).flags.c_contiguous
    True
    """
    if array.ndim != 2 or not array.T.flags.c_contiguous or array.dtype.kind == "c":
        return np.ascontiguousarray(array).reshape(array.shape)
    plain = array.view(f"u{array.dtype.itemsize}")  # NumPy copies its own types faster than bfloat16
    turned = np.empty(plain.shape, plain.dtype)

    rows, columns = plain.shape

    def turn(first: int) -> None:
        block = np.empty((_BLOCK, rows + _PAD_BYTES // plain.itemsize), plain.dtype)[:, :rows]
        for start in range(first, min(first + _RUN, columns), _BLOCK):
            held = block[: columns - start]
            held[...] = plain.T[start : start + _BLOCK]
            turned[:, start : start + _BLOCK] = held.T
        forget_pages(array)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(turn, range(0, columns, _RUN)))
    return turned.view(array.dtype)


def mapping_of(array: Any) -> mmap.mmap | None:
    """The mapped file that an array lies in, or None for one in memory."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def forget_pages(array: Any) -> None:
    """Gives back the memory that reading a mapped file has taken; what is read again comes from the file again."""
    if (mapping := mapping_of(array)) is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def mapped_array(folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Makes an array in a file without a name: after `forget_pages` it is there, and takes no memory.

    Args:
        folder: on the disk that is to hold it.
        shape: with no dimension of zero.
        dtype: the array's dtype.

    Returns:
        An array of zeros.

    >>> array = mapped_array(pathlib.Path(tempfile.gettempdir()), (2, 3), np.dtype(np.float32))
    >>> array[1] = 7
    >>> forget_pages(array)
    >>> array.sum().item()
    21.0
    """
    nbytes = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(nbytes)
        return np.ndarray(shape, dtype, buffer=mmap.mmap(file.fileno(), nbytes))


def spill(folder: pathlib.Path, chunks: Chunks) -> np.ndarray:
    """Copies an array that is read by slices into a mapped file: it is never in memory beside its chunks."""
    array = mapped_array(folder, chunks.shape, chunks.dtype)
    rows = max(1, _SPILL_BYTES * chunks.shape[0] // array.nbytes)
    for start in range(0, chunks.shape[0], rows):
        block = slice(start, min(start + rows, chunks.shape[0]))  # tensorstore wants no more than there is
        array[block] = chunks[block]
        forget_pages(array)
    return array
