"""Which parameter is quantized how: rules and conventions applied to the leaves of a tree."""

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp

from jaxquant._spec import QuantConfig, QuantSpec, Rule
from jaxquant._tree import is_quantized, named_leaves, nearest_paths


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What the configuration decided for one parameter.

    Attributes:
        spec: how to quantize it, or None to leave it in float.
        axis: its contracting axes, negative and ascending; empty when left.
        reason: in words, which rule or convention decided.
    """

    spec: QuantSpec | None
    axis: tuple[int, ...]
    reason: str


def assign(params: Any, config: QuantConfig, axes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Assignment]:
    """Decides every leaf of a parameter tree.

    Args:
        params: the tree.
        config: the order.
        axes: contracting axes by path, as traced from the model; Flax's naming conventions serve where it is silent.

    Returns:
        An assignment for each path, in the tree's order.

    Raises:
        ValueError: the tree is empty, or a rule matches nothing or names a leaf that cannot be quantized.
        TypeError: a rule names a leaf that is no array.
        TypeError: a leaf is no array.
    """
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(
            "quantize: the parameter tree has no leaves; pass the parameters themselves, for example"
            " variables['params']"
        )
    _check_rules(config.rules, [path for path, _ in leaves])
    return {path: _assign_leaf(path, leaf, config, axes or {}) for path, leaf in leaves}


def _check_rules(rules: tuple[Rule, ...], paths: list[str]) -> None:
    for rule in rules:
        if not any(rule.matches(path) for path in paths):
            near = ", ".join(nearest_paths(rule.pattern, paths))
            raise ValueError(
                f"rule {rule.pattern!r} matches no parameter; the nearest paths are: {near}"
                " (patterns match the whole path)"
            )


def _assign_leaf(path: str, leaf: Any, config: QuantConfig, axes: dict[str, tuple[int, ...]]) -> Assignment:
    left = Assignment(None, (), "")
    if is_quantized(leaf):
        return dataclasses.replace(left, reason="already quantized")
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"{path}: expected an array, got {type(leaf).__name__}; a parameter tree holds arrays only")
    rule = next((rule for rule in config.rules if rule.matches(path)), None)
    if rule is not None and rule.spec is None:
        return dataclasses.replace(left, reason=f"rule {rule.pattern!r} leaves it")
    if rule is not None:
        _check_leaf(path, leaf, rule)
        axis = rule.axes or axes.get(path) or conventional_axis(path, tuple(leaf.shape))
        return Assignment(rule.spec, axis, f"rule {rule.pattern!r}")
    if not _is_array(leaf):
        return dataclasses.replace(left, reason=f"a {type(leaf).__name__}, not an array")
    floating, shape = jnp.issubdtype(leaf.dtype, jnp.floating), tuple(leaf.shape)
    if not floating:
        return dataclasses.replace(left, reason=f"dtype {leaf.dtype} is not floating")
    if len(shape) < 2:
        return dataclasses.replace(left, reason=f"{len(shape)} dimensions: vectors stay in float")
    skip = next((pattern for pattern in config.skip if re.fullmatch(pattern, path)), None)
    if skip is not None:
        return dataclasses.replace(left, reason=f"left by default ({skip!r})")
    if config.default is None:
        return dataclasses.replace(left, reason="no rule speaks of it")
    axis = axes.get(path) or conventional_axis(path, shape)
    if math.prod(shape[a] for a in axis) == 1:
        return dataclasses.replace(left, reason=f"contracting axes {axis} of one element: no matrix")
    return Assignment(config.default, axis, "default")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _check_leaf(path: str, leaf: Any, rule: Rule) -> None:
    """Raises where a rule asks to quantize what cannot be."""
    asks, remedy = f"{path}: rule {rule.pattern!r} asks to quantize", "leave it with Rule(pattern, None) placed before"
    if not _is_array(leaf):
        raise TypeError(f"{asks} a {type(leaf).__name__}; arrays are accepted: {remedy}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{asks} a leaf of dtype {leaf.dtype}; floating dtypes are accepted: {remedy}")
    if not leaf.shape:
        raise ValueError(f"{asks} a scalar; arrays of one dimension or more are accepted: {remedy}")
    if rule.axes and rule.axes[0] < -len(leaf.shape):
        raise ValueError(
            f"{asks} along axis {rule.axes}, which shape {tuple(leaf.shape)} does not have; give axes from"
            f" -{len(leaf.shape)} to -1"
        )


def conventional_axis(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Guesses the contracting axes of a weight from Flax's names, where no traced program tells.

    Flax's attention projects with `query/kernel` [D, H, Dh] and `out/kernel` [H, Dh, D]; convolutions have a `kernel`
    [*window, in, out]; Equinox's and PyTorch's `weight` is [out, in]; everything else contracts its last axis but one
    (`Dense` [in, out], also under a scan stack).
    A wrong guess costs accuracy or speed, never correctness: products divide by whatever grid the weight has.

    >>> conventional_axis("attention/out/kernel", (8, 64, 512))
    (-3, -2)
    """
    if len(shape) == 1:
        return (-1,)
    names = path.split("/")
    parent = names[-2] if len(names) > 1 else ""
    if names[-1] == "kernel" and len(shape) >= 3:
        if parent in ("query", "key", "value"):
            return (-3,)
        if parent == "out":
            return (-3, -2)
        if len(shape) >= 4:
            return tuple(range(-len(shape), -1))
    if names[-1] in ("embedding", "weight"):
        return (-1,)
    return (-2,)
