"""The tree of a checkpoint: a parameter tree written as JSON, with numbers standing for its arrays.

Only types listed here are written or made again, so a manifest can name no class of its own choosing. A node is `null`
for None, or an object with one key that says what it is: `{"dict": [[key, node], ...]}`, `{"array": 3}`, and so on.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import QTYPES
from jaxquant.storage._chunks import Chunks
from jaxquant.storage._values import SEQUENCES, decode_value, encode_value, make

CONTAINERS = (QArray, OutlierArray)
_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "FrozenDict": FrozenDict, "nnx.State": nnx.State}
_BOXES = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}
_NNX_VARIABLES = (
    nnx.Param,
    nnx.BatchStat,
    nnx.Cache,
    nnx.Intermediate,
    nnx.Perturbation,
    nnx.LoRAParam,
    nnx.RngState,
    nnx.RngKey,
    nnx.RngCount,
    nnx.Variable,
)
ACCEPTED = (
    "arrays, Python numbers, None, dict, OrderedDict, FrozenDict, list, tuple, nnx.State of nnx variables,"
    " nn.Partitioned, nn.LogicallyPartitioned, QArray and OutlierArray"
)


def encode_tree(tree: Any, put: Callable[[str, Any], int], path: str = "") -> Any:
    """Writes a parameter tree as JSON values.

    Args:
        tree: any nesting of the accepted types.
        put: stores an array, given its path, and returns its number.
        path: where `tree` lies in the whole.

    Returns:
        The node.

    Raises:
        TypeError: a node or key of another type; the message names its path.

    >>> encode_tree({"a": (None, 2)}, lambda path, leaf: 0)
    {'dict': [['a', {'tuple': [None, {'scalar': 2}]}]]}
    """
    kind = type(tree)
    if tree is None:
        return None
    if kind in (bool, int, float):
        return {"scalar": encode_value(tree, path)}
    if isinstance(tree, np.ndarray | np.generic | jax.Array | Chunks):
        return {"array": put(path, tree)}
    for name, mapping in _MAPPINGS.items():
        if kind is mapping:
            pairs = tree.raw_mapping.items() if kind is nnx.State else tree.items()
            return {name: [[encode_key(key, path), encode_tree(node, put, join(path, key))] for key, node in pairs]}
    for name, sequence in SEQUENCES.items():
        if kind is sequence:
            return {name: [encode_tree(node, put, join(path, index)) for index, node in enumerate(tree)]}
    for name, box in _BOXES.items():
        if kind is box:
            fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.name != "value"}
            return {name: [encode_tree(tree.value, put, path), encode_value(fields, path)]}
    if kind in CONTAINERS:
        return {kind.__name__: _encode_container(tree, put, path)}
    if isinstance(tree, nnx.Variable):
        value = encode_tree(tree.get_raw_value(), put, path)
        return {"nnx.Variable": [_variable_name(kind, path), value, encode_value(tree.get_metadata(), path)]}
    raise TypeError(f"save: {path or 'the tree'} is a {kind.__module__}.{kind.__qualname__}; accepted are {ACCEPTED}")


def decode_tree(node: Any, get: Callable[[int], Any], path: str = "") -> Any:
    """Undoes `encode_tree`.

    Args:
        node: what `encode_tree` returned, through JSON or not.
        get: gives the array of a number, or anything with its shape and dtype.
        path: where `node` lies in the whole.

    Returns:
        The tree, of the same types.

    Raises:
        ValueError: the node is malformed, or of a kind this version does not know.

    >>> decode_tree({"dict": [[1, {"tuple": [None, {"array": 7}]}]]}, float)
    {1: (None, 7.0)}
    """
    if node is None:
        return None
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"{path}: a node of the tree must be null or an object of one key, got {str(node)[:80]!r}")
    ((kind, body),) = node.items()
    try:
        return _decode_node(kind, body, get, path)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: a malformed {kind!r} node: {str(body)[:80]!r} ({error})") from error


def _decode_node(kind: str, body: Any, get: Callable[[int], Any], path: str) -> Any:
    if kind == "scalar":
        return decode_value(body, path)
    if kind == "array":
        if type(body) is not int:
            raise TypeError("an array's number is an integer")
        return get(body)
    if kind in _MAPPINGS:
        pairs = [(decode_value(key, path), child) for key, child in body]
        return _MAPPINGS[kind]({key: decode_tree(child, get, join(path, key)) for key, child in pairs})
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode_tree(child, get, join(path, index)) for index, child in enumerate(body))
    if kind in _BOXES:
        value, fields = body
        return _BOXES[kind](decode_tree(value, get, path), **decode_value(fields, path))
    if kind == "nnx.Variable":
        name, value, metadata = body
        return _variable_type(name, path).from_metadata(decode_tree(value, get, path), decode_value(metadata, path))
    for container in CONTAINERS:
        if kind == container.__name__:
            leaves, static = body
            values = {name: decode_tree(child, get, join(path, name)) for name, child in leaves.items()}
            made = make(container, values | {name: decode_value(value, path) for name, value in static.items()}, path)
            if isinstance(made, QArray):
                check_qarray(path, made)
            return made
    raise ValueError(f"{path}: a node of unknown kind {kind!r}; this version knows {ACCEPTED}")


def replace_leaves(node: Any, fn: Callable[[str, Any], Any], path: str = "") -> Any:
    """Maps `fn(path, node)` over the arrays and containers of a tree's node; everything else is kept.

    >>> replace_leaves({"list": [{"array": 5}, None]}, lambda path, node: {"array": path})
    {'list': [{'array': '0'}, None]}
    """
    if node is None:
        return None
    ((kind, body),) = node.items()
    if kind in _MAPPINGS:
        pairs = [(key, join(path, decode_value(key, path)), child) for key, child in body]
        return {kind: [[key, replace_leaves(child, fn, at)] for key, at, child in pairs]}
    if kind in SEQUENCES:
        return {kind: [replace_leaves(child, fn, join(path, index)) for index, child in enumerate(body)]}
    if kind in _BOXES:
        return {kind: [replace_leaves(body[0], fn, path), body[1]]}
    if kind == "nnx.Variable":
        return {kind: [body[0], replace_leaves(body[1], fn, path), body[2]]}
    return node if kind == "scalar" else fn(path, node)


def _encode_container(container: Any, put: Callable[[str, Any], int], path: str) -> list[Any]:
    """Splits a container's fields into nodes (its pytree leaves) and plain values."""
    if isinstance(container, QArray):
        check_qarray(f"save: {path}", container)
    keyed = jax.tree_util.tree_flatten_with_path(container, is_leaf=lambda node: node is not container)[0]
    leaves = {key.name: node for (key,), node in keyed}
    names = [field.name for field in dataclasses.fields(container)]
    static = {name: encode_value(getattr(container, name), path) for name in names if name not in leaves}
    return [{name: encode_tree(node, put, join(path, name)) for name, node in leaves.items()}, static]


def join(path: str, key: Any) -> str:
    """Appends a key to a "/"-joined path.

    >>> join(join("", "layers"), 3)
    'layers/3'
    """
    return f"{path}/{key}" if path else str(key)


def encode_key(key: Any, path: str) -> Any:
    """Writes a mapping's key: text, integers, and tuples of them keep their type."""
    if type(key) in (str, int, bool) or (type(key) is tuple and all(type(part) in (str, int) for part in key)):
        return encode_value(key, path)
    raise TypeError(
        f"save: {path or 'the tree'} has a key {key!r} of type {type(key).__name__}; accepted are"
        " str, int, bool and tuples of str and int"
    )


def check_qarray(path: str, q: QArray) -> None:
    """Checks what `QArray` itself never checks: that its arrays fit its static fields.

    Args:
        path: its place in the tree.
        q: the array, or one that holds shapes and dtypes.

    Raises:
        ValueError: they do not fit.
    """
    if q.qtype not in QTYPES or not all(-len(q.trailing) <= axis < 0 for axis in q.axis) or not q.axis:
        raise ValueError(f"{path}: a QArray of qtype {q.qtype!r}, axis {q.axis}, trailing {q.trailing} is malformed")
    if q.layout != "plain":
        return
    if q.scale.ndim < len(q.trailing):
        raise ValueError(f"{path}: scale {list(q.scale.shape)} of a QArray {list(q.trailing)} has fewer dimensions")
    codes, padded = list(q.shape), list(q.shape)
    codes[q.axis[-1]] = -(-q.padded // 8) * q.format.bits if q.format.packed else q.padded
    padded[q.axis[-1]] = q.padded
    dtype = np.dtype(np.uint8) if q.format.packed else q.format.code_dtype
    if tuple(q.qvalue.shape) != tuple(codes) or q.qvalue.dtype != dtype:
        raise ValueError(f"{path}: {q!r} needs codes {dtype}{codes}, got {q.qvalue.dtype}{list(q.qvalue.shape)}")
    for name in ("scale", "zero_point", "pre_scale", "act_scale", "act_zero_point"):
        _check_grid(path, q, name, padded)
    _check_perm(path, q)


def _check_perm(path: str, q: QArray) -> None:
    """An input order has a place for each input, of the whole weight or of each index of another dimension."""
    if q.perm is None:
        return
    inputs, found = q.trailing[q.axis[-1]], f"{q.perm.dtype}{list(q.perm.shape)}"
    fits = q.perm.ndim == q.ndim and q.perm.shape[q.axis[-1]] == inputs
    if (
        not fits
        or q.perm.dtype != np.int32
        or any(n not in (1, size) for n, size in zip(q.perm.shape, q.shape, strict=True))
    ):
        raise ValueError(
            f"{path}: {q!r} has perm {found}; int32 with {inputs} places along axis {q.axis[-1]} is needed"
        )


def _check_grid(path: str, q: QArray, name: str, padded: list[int]) -> None:
    """Each dimension of a grid divides the weight's, padded or not."""
    grid = getattr(q, name)
    if grid is None:
        return
    sizes = zip(q.shape, padded, grid.shape, strict=False)
    fits = all(cells > 0 and (size == cells or whole % cells == 0) for size, whole, cells in sizes)
    if grid.ndim != q.ndim or not fits:
        raise ValueError(f"{path}: {q!r} has {name} {list(grid.shape)}, which does not divide {padded}")


def _variable_types() -> Iterable[tuple[str, type[nnx.Variable]]]:
    yield from ((cls.__name__, cls) for cls in _NNX_VARIABLES)
    yield from nnx.variablelib.VariableTypeCache.items()


def _variable_name(kind: type[nnx.Variable], path: str) -> str:
    for name, cls in _variable_types():
        if cls is kind:
            return name
    raise TypeError(
        f"save: {path} is a {kind.__qualname__}, a variable type of your own; name it with"
        f" flax.nnx.register_variable_name({kind.__name__!r}, {kind.__name__}), here and before loading"
    )


def _variable_type(name: str, path: str) -> type[nnx.Variable]:
    for known, cls in _variable_types():
        if known == name:
            return cls
    raise ValueError(f"{path}: nnx has no variable type {name!r}; import the module that registers it before loading")
