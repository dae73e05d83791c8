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
        read_slices: opens a large array that is not mapped, for reading `[..., start:stop]` of it; None for others.
    """

    path: str
    nbytes: int
    abstract: Any
    read: Callable[[], Any]
    read_slices: Callable[[], Any] | None = None
