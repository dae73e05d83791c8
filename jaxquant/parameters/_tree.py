"""Parameter paths: one spelling for linen dicts, nnx states, dataclasses, tuples and lists."""

import difflib
from collections.abc import Callable
from typing import Any

import jax

from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray


def key_name(key: Any) -> str:
    """The text of one key of a pytree path.

    >>> key_name(jax.tree_util.DictKey("kernel")), key_name(jax.tree_util.SequenceKey(3))
    ('kernel', '3')
    """
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a pytree path with "/"; the trailing `value` of nnx variables and partition boxes is dropped.

    >>> path_name((jax.tree_util.DictKey("dense"), jax.tree_util.DictKey("kernel"), jax.tree_util.GetAttrKey("value")))
    'dense/kernel'
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("value", "raw_value"):
        path = path[:-1]
    return "/".join(map(key_name, path))


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a parameter tree is a quantized weight."""
    return isinstance(leaf, QArray | OutlierArray)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Lists (path, leaf) of a parameter tree; a quantized weight is one leaf.

    >>> named_leaves({"b": 2, "a": [1]})
    [('a/0', 1), ('b', 2)]
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    return [(path_name(path), leaf) for path, leaf in leaves]


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps `fn(path, leaf)` over a parameter tree; a quantized weight is one leaf.

    >>> map_named(lambda path, leaf: path, {"a": [1, 2]})
    {'a': ['a/0', 'a/1']}
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), tree, is_leaf=is_quantized)


def nearest_paths(pattern: str, paths: list[str], count: int = 5) -> list[str]:
    """The paths that look most like a pattern, for error messages.

    >>> nearest_paths("block/kernal", ["block/kernel", "norm/scale"], 1)
    ['block/kernel']
    """
    return difflib.get_close_matches(pattern, paths, n=count, cutoff=0.0)
