"""The arguments of a call, split into arrays and what is static."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray
from jaxquant.parameters._tree import is_quantized, path_name

_ARRAYS = (QArray, OutlierArray, jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static in a call: the tree of arguments, its leaves that are no arrays, and the path of each array."""

    tree: Any
    static: tuple[tuple[int, Any], ...]
    paths: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str | None, ...]:
        """For each array its path in the first argument, or None for the arrays of others."""
        args, _ = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        first, static = set(jax.tree.leaves(args[0])), dict(self.static)
        places = [place for place in range(self.tree.num_leaves) if place not in static]
        return tuple(path if place in first else None for place, path in zip(places, self.paths, strict=True))

    def call(self, fn: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """Calls `fn` with arrays put back between the static leaves."""
        held, rest = dict(self.static), iter(arrays)
        leaves = [held[i] if i in held else next(rest) for i in range(self.tree.num_leaves)]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return fn(*args, **kwargs)


def split_arguments(args: tuple, kwargs: dict) -> tuple[Form, list]:
    """Splits a call into what jit may trace (a quantized weight as one array) and what is static (flags, strings)."""
    entries, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_quantized)
    dynamic = [isinstance(leaf, _ARRAYS) for _, leaf in entries]
    static = tuple((i, leaf) for i, ((_, leaf), flag) in enumerate(zip(entries, dynamic, strict=True)) if not flag)
    arrays = [leaf for (_, leaf), flag in zip(entries, dynamic, strict=True) if flag]
    paths = tuple(path_name(path[2:]) for (path, _), flag in zip(entries, dynamic, strict=True) if flag)
    return Form(tree, static, paths), arrays
