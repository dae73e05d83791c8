"""`inspect` and `diff`: what checkpoints hold, and how far two of them are apart, one leaf of each in memory."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxquant._slices import SLICE_BYTES, dequantized
from jaxquant._sources import open_source, read_leaf
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray
from jaxquant.checkpoint import Path
from jaxquant.interop import Module
from jaxquant.storage._chunks import Chunks
from jaxquant.storage._mapped import forget_pages
from jaxquant.storage._store import as_numbers


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """One parameter of a checkpoint.

    Attributes:
        path: its "/"-joined path.
        shape: logical shape.
        format: qtype of a quantized weight, dtype of another.
        group: elements of the last contracting axis that share a scale, or None.
        activation: qtype of its quantized activation, or None.
        bits: bits an element takes, everything counted.
        nbytes: bytes as stored here.
        layout: `"plain"` or a kernel's; empty for an array that is not quantized.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    group: int | None
    activation: str | None
    bits: float
    nbytes: int
    layout: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; `str()` prints a table.

    Attributes:
        kind: `"jaxquant"`, `"orbax"` or `"huggingface"`.
        leaves: its parameters.
        about: what it says of itself: versions, config, algorithm, quantization_config.
    """

    kind: str
    leaves: tuple[LeafInfo, ...]
    about: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def totals(self) -> str:
        """How many parameters there are, how many of them are quantized, and the bytes."""
        quantized = [leaf for leaf in self.leaves if leaf.layout]
        elements = sum(math.prod(leaf.shape) for leaf in quantized)
        bits = f" at {8 * sum(leaf.nbytes for leaf in quantized) / elements:.3f} bits" if elements else ""
        return f"{len(self.leaves)} parameters, {len(quantized)} quantized{bits}; {self.nbytes:,} bytes"

    def __str__(self) -> str:
        """The table, the totals and what it says of itself."""
        rows = [("path", "shape", "format", "group", "activation", "bits", "bytes", "layout")]
        for leaf in self.leaves:
            shape, group = "x".join(map(str, leaf.shape)), str(leaf.group or "")
            cells = (leaf.path, shape, leaf.format, group, leaf.activation or "")
            rows.append((*cells, f"{leaf.bits:.3f}", f"{leaf.nbytes:,}", leaf.layout))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.totals, *(f"{name}: {value}" for name, value in self.about.items())])


def inspect(path: Path, *, modules: tuple[Module, ...] | None = None) -> Inspection:
    """Tabulates a checkpoint: ours and orbax's from their metadata, quantized Hugging Face layers by reading them.

    Args:
        path: what `convert` reads.
        modules: for a Hugging Face folder, see `jaxquant.interop.plan_huggingface`.

    Returns:
        The table.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no checkpoint, or malformed.
    """
    source = open_source(path, modules=modules)
    rows = []
    for number, leaf in enumerate(source.leaves):
        rows.append(_describe(leaf.path, read_leaf(source, number) if leaf.abstract is None else leaf.abstract))
    about: dict[str, Any] = {"kind": source.kind}
    if source.manifest is not None:
        manifest = source.manifest
        about |= {
            "library_version": manifest.library_version,
            "algorithm": manifest.algorithm,
            "config": manifest.config,
        }
    if source.quantization is not None:
        about["quantization_config"] = source.quantization
    return Inspection(source.kind, tuple(rows), about)


def _describe(path: str, leaf: Any) -> LeafInfo:
    nbytes = sum(math.prod(part.shape) * _itemsize(part.dtype) for part in jax.tree.leaves(leaf))
    bits = 8 * nbytes / max(math.prod(leaf.shape), 1)
    base = leaf.base if isinstance(leaf, OutlierArray) else leaf
    if not isinstance(base, QArray):
        return LeafInfo(path, tuple(leaf.shape), str(leaf.dtype), None, None, bits, nbytes, "")
    cells = base.scale.shape[base.axis[-1]]
    group = base.padded // cells if cells > 1 else None
    activation = None if base.activation is None else base.activation.qtype
    return LeafInfo(path, tuple(leaf.shape), leaf.qtype, group, activation, bits, nbytes, base.layout)


def _itemsize(dtype: Any) -> int:
    return dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LeafDiff:
    """How far a parameter of B is from A's.

    Attributes:
        path: its path.
        sqnr: signal to quantization noise in dB, 10 log10(sum a^2 / sum (a - b)^2); inf where they are equal.
        max_error: greatest |a - b|.
        note: why it could not be compared, or empty.
    """

    path: str
    sqnr: float
    max_error: float
    note: str = ""


def diff(a: Path, b: Path, *, modules: tuple[Module, ...] | None = None) -> Iterator[LeafDiff]:
    """Compares two checkpoints parameter by parameter, quantized weights by the values they stand for.

    Args:
        a: the reference; what `convert` reads.
        b: the other.
        modules: for Hugging Face folders, see `jaxquant.interop.plan_huggingface`.

    Yields:
        A row for each parameter of either.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: one is no checkpoint, or malformed.
    """
    ours, theirs = open_source(a, modules=modules), open_source(b, modules=modules)
    numbers = {leaf.path: number for number, leaf in enumerate(theirs.leaves)}
    for number, leaf in enumerate(ours.leaves):
        if leaf.path not in numbers:
            yield LeafDiff(leaf.path, math.nan, math.nan, f"only in {a}")
            continue
        pair = read_leaf(ours, number, opened=True), read_leaf(theirs, numbers.pop(leaf.path), opened=True)
        yield _compare(leaf.path, *pair)
    for path in numbers:
        yield LeafDiff(path, math.nan, math.nan, f"only in {b}")


def _compare(path: str, a: Any, b: Any) -> LeafDiff:
    if tuple(a.shape) != tuple(b.shape):
        return LeafDiff(path, math.nan, math.nan, f"shapes {list(a.shape)} and {list(b.shape)}")
    a, b = _values(a), _values(b)
    power = noise = greatest = 0.0
    for place in _slices(a.shape, 4 * a.size):
        signal, other = (np.asarray(values[place]).astype(np.float32) for values in (a, b))
        error = signal - other
        power += float(np.sum(np.square(signal), dtype=np.float64))
        noise += float(np.sum(np.square(error), dtype=np.float64))
        greatest = max(greatest, float(np.abs(error).max(initial=0.0)))
        forget_pages(a)
        forget_pages(b)
    if noise == 0:
        return LeafDiff(path, math.inf, 0.0)
    return LeafDiff(path, 10 * math.log10(power / noise) if power else -math.inf, greatest)


def _values(leaf: Any) -> Any:
    """The numbers of a leaf: what codes stand for; an array that is only opened as it is."""
    if isinstance(leaf, Chunks):
        return leaf
    if isinstance(leaf, QArray | OutlierArray):
        return dequantized(jax.tree.map(lambda part: part[...] if isinstance(part, Chunks) else part, leaf))
    return as_numbers(leaf)[0]


def _slices(shape: tuple[int, ...], nbytes: int) -> Iterator[Any]:
    """Indices that cut an array into slices along its longest dimension."""
    dim = int(np.argmax(shape)) if shape else 0
    width = max(1, shape[dim] * SLICE_BYTES // max(nbytes, 1)) if shape else 1
    for start in range(0, shape[dim] if shape else 1, width):
        yield (*[slice(None)] * dim, slice(start, min(start + width, shape[dim]))) if shape else ()
