"""Which parameter is quantized how: rules and conventions applied to the leaves of a tree."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxquant.arrays._spec import QuantConfig, QuantSpec, Rule
from jaxquant.parameters._tree import is_quantized, named_leaves, nearest_paths

MAX_WINDOW = 16  # of a convolution not known by its name


# Below this many elements a sum is no matrix product worth quantizing: depthwise kernels, mixing vectors.
LEAST_CONTRACTION = 16
NO_RULE = "no rule speaks of it"


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


def assign(
    params: Any, config: QuantConfig, axes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Assignment]:
    """Decides every leaf of a parameter tree.

    Args:
        params: the tree.
        config: the order.
        axes: contracting axes by path, as traced from the model; Flax's naming conventions serve where it is silent.

    Returns:
        An assignment for each path, in the tree's order.

    Raises:
        ValueError: the tree is empty, or a rule matches nothing or names a leaf that cannot be quantized.
        TypeError: a leaf is no array, or the configuration no `QuantConfig`.
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: a QuantConfig is accepted, got {config!r}; QuantConfig.preset('w4a16') makes one")
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(
            "quantize: the parameter tree has no leaves; pass the parameters themselves, for example"
            " variables['params']"
        )
    _check_rules(config.rules, [path for path, _ in leaves])
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves if _is_array(leaf)}

    def axis_of(path: str) -> tuple[int, ...]:
        return (axes or {}).get(path) or conventional_axis(path, shapes[path], shapes)

    return {path: _assign_leaf(path, leaf, config, axis_of) for path, leaf in leaves}


def _check_rules(rules: tuple[Rule, ...], paths: list[str]) -> None:
    for rule in rules:
        if not any(rule.matches(path) for path in paths):
            near = ", ".join(nearest_paths(rule.pattern, paths))
            raise ValueError(
                f"rule {rule.pattern!r} matches no parameter; the nearest paths are: {near}"
                " (patterns match the whole path)"
            )


def _assign_leaf(path: str, leaf: Any, config: QuantConfig, axis_of: Callable[[str], tuple[int, ...]]) -> Assignment:
    left = Assignment(None, (), "")
    if is_quantized(leaf):
        return dataclasses.replace(left, reason="already quantized")
    rule = next((rule for rule in config.rules if rule.matches(path)), None)
    if rule is not None and rule.spec is None:
        return dataclasses.replace(left, reason=f"rule {rule.pattern!r} leaves it")
    if not _is_array(leaf):
        raise TypeError(f"{path}: arrays are accepted, got {type(leaf).__name__}; leave it with Rule({path!r}, None)")
    if rule is not None:
        _check_leaf(path, leaf, rule)
        return Assignment(rule.spec, rule.axes or axis_of(path), f"rule {rule.pattern!r}")
    floating, shape = jnp.issubdtype(leaf.dtype, jnp.floating), tuple(leaf.shape)
    if not floating:
        return dataclasses.replace(left, reason=f"dtype {leaf.dtype} is not floating")
    if len(shape) < 2:
        return dataclasses.replace(left, reason=f"a {'vector' if shape else 'scalar'} stays in float")
    skip = next((pattern for pattern in config.skip if re.fullmatch(pattern, path)), None)
    if skip is not None:
        return dataclasses.replace(left, reason=f"left by default ({skip!r})")
    if config.default is None:
        return dataclasses.replace(left, reason=NO_RULE)
    axis = axis_of(path)
    if (length := math.prod(shape[a] for a in axis)) < LEAST_CONTRACTION:
        return dataclasses.replace(left, reason=f"sums over {length} elements only: scales would outweigh codes")
    return Assignment(config.default, axis, "default")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _check_leaf(path: str, leaf: Any, rule: Rule) -> None:
    """Raises where a rule asks to quantize what cannot be."""
    asks, remedy = f"{path}: rule {rule.pattern!r} asks to quantize", "leave it with Rule(pattern, None) placed before"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{asks} a leaf of dtype {leaf.dtype}; floating dtypes are accepted: {remedy}")
    if not leaf.shape:
        raise ValueError(f"{asks} a scalar; arrays of one dimension or more are accepted: {remedy}")
    if rule.axes and rule.axes[0] < -len(leaf.shape):
        raise ValueError(
            f"{asks} along axis {rule.axes}, which shape {tuple(leaf.shape)} does not have; give axes from"
            f" -{len(leaf.shape)} to -1"
        )


def conventional_axis(path: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Guesses the contracting axes of a weight from Flax's names, where no traced program tells.

    Flax's attention projects with `query/kernel` [D, H, Dh] and `out/kernel` [H, Dh, D]: it is known by H and Dh being
    the same in both, which a scan stack of plain matrices is not. Convolutions, known by their name or a small square
    window, have a `kernel` [*window, in, out]; embeddings are [V, D], Equinox's and PyTorch's `weight` is [out, in];
    everything else contracts its last axis but one (`Dense` [in, out], also under a scan stack).
    A wrong guess costs accuracy or speed, never correctness: products divide by whatever grid the weight has.

    Args:
        path: the weight's path.
        shape: its shape, of at least one dimension.
        shapes: shapes of all parameters by path.

    Returns:
        Contracting axes, negative and ascending.

    >>> shapes = {"attn/query/kernel": (512, 8, 64), "attn/out/kernel": (8, 64, 512)}
    >>> conventional_axis("attn/out/kernel", (8, 64, 512), shapes)
    (-3, -2)
    """
    *_, parent, name = ["", *path.split("/")]
    if len(shape) == 1 or name in ("embedding", "weight"):
        return (-1,)
    if name != "kernel":
        return (-2,)
    if parent in ("query", "key", "value", "out") and _projects_heads(path, shapes):
        return (-3, -2) if parent == "out" else (-3,)
    square = len(shape) == 4 and shape[0] == shape[1] <= MAX_WINDOW
    if "conv" in parent.lower() or square:
        return tuple(range(-len(shape), -1))
    return (-2,)


def _projects_heads(path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the attention that `path` belongs to keeps its heads as an axis of their own."""
    module = path.split("/")[:-2]
    query, out = (shapes.get("/".join([*module, projection, "kernel"]), ()) for projection in ("query", "out"))
    return len(query) >= 3 and query[-2:] == out[-3:-1]
