"""`Leaf`: a parameter in a file, not read yet."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a checkpoint or folder.

    Attributes:
        path: its "/"-joined path.
        nbytes: what it takes in the files.
        abstract: shape and dtype of an array, or a quantized weight with these in place of its leaves; None where only
            reading it would tell.
        read: reads it: a NumPy array, memory-mapped where it can be, or a QArray of NumPy leaves.
        open: makes the leaf without reading it, its large arrays opened for reading slices; None where these are small
            or mapped.
    """

    path: str
    nbytes: int
    abstract: Any
    read: Callable[[], Any]
    open: Callable[[], Any] | None = None
