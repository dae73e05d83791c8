"""`LazyArray`: a parameter that is loaded when it is needed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """Stands in a parameter tree for an array that is loaded when first used and freed after.

    Attributes:
        shape: the array's shape.
        dtype: its dtype.
        load: gives the array, as NumPy or JAX has it; called whenever it is needed, perhaps more than once. For a stack
            of layers return a memory-mapped array, of which one layer at a time is read.

    >>> import numpy as np
    >>> LazyArray((2, 3), jnp.dtype("float32"), lambda: np.ones((2, 3), np.float32)).size
    6
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    load: Callable[[], Any]

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def load_leaf(leaf: Any) -> Any:
    """A leaf as an array; a lazy one is loaded."""
    return leaf.load() if isinstance(leaf, LazyArray) else leaf
