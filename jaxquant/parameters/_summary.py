"""`summary`: what a quantized tree takes in memory."""

import dataclasses
from typing import Any

from jaxquant.parameters._tree import is_quantized, named_leaves


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """One parameter.

    Attributes:
        path: its "/"-joined path.
        shape: logical shape.
        format: qtype, or the dtype of a float leaf.
        bits: bits an element takes, scales counted.
        nbytes: bytes in memory.
        quantized: whether it is a quantized weight.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits: float
    nbytes: int
    quantized: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of the leaves of a parameter tree; `str()` prints it.

    Attributes:
        leaves: one row a parameter.
    """

    leaves: tuple[LeafSummary, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean bits an element of the quantized weights, everything they store counted; 0 when none is quantized."""
        rows = [row for row in self.leaves if row.quantized]
        elements = sum(8 * row.nbytes / row.bits for row in rows)
        return 8 * sum(row.nbytes for row in rows) / elements if rows else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tree."""
        return sum(row.nbytes for row in self.leaves)

    def __str__(self) -> str:
        """The table and the totals."""
        width = max((len(row.path) for row in self.leaves), default=4)
        lines = [f"{'path':<{width}}  {'format':<14} {'shape':<20} {'bits':>7} {'bytes':>13}"]
        for row in self.leaves:
            shape = "x".join(map(str, row.shape))
            lines.append(f"{row.path:<{width}}  {row.format:<14} {shape:<20} {row.bits:>7.3f} {row.nbytes:>13,}")
        lines.append(f"{self.bits_per_weight:.3f} bits a quantized weight; {self.nbytes:,} bytes in all")
        return "\n".join(lines)


def summary(qparams: Any) -> Summary:
    """Tabulates the parameters of a tree: format, shape, bits an element, bytes.

    Args:
        qparams: a tree of arrays and quantized weights.

    Returns:
        The rows; printing it shows a table with totals.

    >>> import jax.numpy as jnp
    >>> from jaxquant import QuantConfig, quantize
    >>> summary(quantize({"kernel": jnp.ones((256, 64))}, QuantConfig.preset("w4a16"))).bits_per_weight
    4.125
    """
    rows = []
    for path, leaf in named_leaves(qparams):
        if is_quantized(leaf):
            rows.append(LeafSummary(path, leaf.shape, leaf.qtype, leaf.bits, leaf.nbytes, True))
        else:
            rows.append(LeafSummary(path, leaf.shape, str(leaf.dtype), 8.0 * leaf.dtype.itemsize, leaf.nbytes, False))
    return Summary(tuple(rows))
