"""`allocate_bits`: a bit width for each weight, by what the model's output loses and what memory is left."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays._qarray import dequantize_array, quantize_array
from jaxquant.arrays._spec import PerGroup, QuantConfig, QuantSpec, Rule, TensorSpec
from jaxquant.calibration._calibrate import arguments_of
from jaxquant.calibration._distances import squared_change
from jaxquant.parameters._rules import Assignment, assign
from jaxquant.parameters._tree import map_named, named_leaves
from jaxquant.tracing._infer import infer_axes
from jaxquant.tracing._quantized import quantized

CHOICES = tuple(
    QuantSpec(TensorSpec(qtype, PerGroup(128), scale_dtype="bfloat16")) for qtype in ("int2", "int3", "int4", "int8")
)


@dataclasses.dataclass(frozen=True)
class Option:
    """One weight in one format.

    Attributes:
        spec: the format.
        bits: bits that the whole weight takes, scales counted.
        loss: change of the model's output when this weight alone is quantized so.
    """

    spec: QuantSpec
    bits: int
    loss: float


def allocate_bits(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    budget: float = 4.125,
    choices: Sequence[QuantSpec] = CHOICES,
    distance: Callable[[Any, Any], jax.Array] = squared_change,
) -> QuantConfig:
    """Chooses a format for each weight, so that the model's output changes least under a budget of bits a weight.

    Each weight is rounded to nearest alone, in each format, and the change of the model's output on the batches is
    measured: a forward pass for each weight, choice and batch, compiled once. Changes are taken to add up. Weights then
    begin with the cheapest format, and whatever step up saves most for each bit is taken next, until the budget is
    used: the optimum but for the last step's size.

    Args:
        apply_fn: the float model, called `apply_fn(params, batch)`, or `apply_fn(params, *batch)` for a tuple.
        params: its parameters, arrays; those that a default configuration quantizes take part.
        batches: calibration inputs of one shape; one or two of some thousand tokens are enough.
        budget: mean bits an element of the quantized weights, all they store counted.
        choices: formats to choose from; 2, 3, 4 and 8 bits in groups of 128 by default. Activations stay in float while
            measuring.
        distance: change of the output, `distance(float model's, changed model's)`: a scalar. For logits,
            `jq.logit_divergence`, their mean KL, is more telling than the default.

    Returns:
        A configuration with a rule for each weight; print it. `dataclasses.replace(config, algorithm=jq.gptq())` rounds
        by an algorithm.

    Raises:
        ValueError: a budget below the cheapest formats', no choices, batches or weights, a group that does not divide a
            weight (the message names it), an output change that is not finite.

    References:
        Shoham & Gersho 1988, IEEE TASSP 36(9) (bit allocation on the convex hull of rate and distortion).
        Yao et al. 2021, arXiv:2011.10680 (HAWQ-V3: one budget over the sensitivities of layers).

    >>> params = {"down": jnp.sin(jnp.arange(128.0)).reshape(128, 1), "up": jnp.cos(jnp.arange(128.0)).reshape(128, 1)}
    >>> apply_fn = lambda p, x: 100 * x @ p["up"] + x @ p["down"]
    >>> print(allocate_bits(apply_fn, params, [jnp.eye(128)], budget=6.2))
    down  int4 PerGroup(size=128)
    up    int8 PerGroup(size=128)
    """
    if not choices or not all(isinstance(spec, QuantSpec) for spec in choices):
        raise ValueError(f"allocate_bits: choices must be QuantSpecs, at least one; got {choices!r}")
    batches = list(batches)
    if not batches:
        raise ValueError("allocate_bits: batches is empty; give at least one calibration batch")
    axes = infer_axes(apply_fn, params, *arguments_of(batches[0]))
    assigned = assign(params, QuantConfig(choices[0]), axes)
    chosen = {path: each for path, each in assigned.items() if each.spec is not None}
    if not chosen:
        raise ValueError("allocate_bits: a default configuration quantizes none of these parameters")
    options = _measure(apply_fn, params, batches, chosen, tuple(choices), distance)
    elements = sum(math.prod(leaf.shape) for path, leaf in named_leaves(params) if path in chosen)
    specs = spend(options, budget, elements)
    return QuantConfig(rules=tuple(Rule(re.escape(path), spec, chosen[path].axis) for path, spec in specs.items()))


def _measure(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Sequence[Any],
    chosen: Mapping[str, Assignment],
    choices: tuple[QuantSpec, ...],
    distance: Callable[[Any, Any], jax.Array],
) -> dict[str, list[Option]]:
    """What each weight costs and loses in each format."""
    run, compare, leaves = quantized(apply_fn), jax.jit(distance), dict(named_leaves(params))
    costs = {(path, spec): _cost(path, leaves[path], spec, chosen[path].axis) for path in chosen for spec in choices}
    losses: dict[tuple[str, QuantSpec], jax.Array] = {key: jnp.float32(0) for key in costs}
    for batch in batches:
        reference = run(params, *arguments_of(batch))
        for path, spec in losses:
            rounded = _rounded(leaves[path], spec, chosen[path].axis)
            changed = map_named(lambda name, leaf, at=path, new=rounded: new if name == at else leaf, params)
            change = compare(reference, run(changed, *arguments_of(batch)))
            losses[path, spec] += change.astype(jnp.float32)
    options: dict[str, list[Option]] = {path: [] for path in chosen}
    for (path, spec), total in losses.items():
        loss = float(total) / len(batches)
        if not math.isfinite(loss):
            raise ValueError(f"{path}: quantized to {spec.weight.qtype} it changes the output by {loss}; NaN in it?")
        options[path].append(Option(spec, costs[path, spec], loss))
    return options


def _cost(path: str, leaf: Any, spec: QuantSpec, axis: tuple[int, ...]) -> int:
    """Bits of the whole weight in a format, found without computing it."""
    try:
        shape = jax.eval_shape(functools.partial(quantize_array, spec=spec, axis=axis), leaf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return 8 * shape.nbytes


@functools.partial(jax.jit, static_argnames=("spec", "axis"))
def _rounded(w: jax.Array, spec: QuantSpec, axis: tuple[int, ...]) -> jax.Array:
    return dequantize_array(quantize_array(w, spec, axis))


def spend(options: Mapping[str, Sequence[Option]], budget: float, elements: int) -> dict[str, QuantSpec]:
    """Chooses an option for each weight under a budget, step by step along the convex hulls of bits and loss.

    Args:
        options: the options of each weight.
        budget: bits an element.
        elements: of all weights together.

    Returns:
        A spec for each path.

    Raises:
        ValueError: the cheapest options cost more.
    """
    hulls = {path: convex_hull(each) for path, each in options.items()}
    cheapest = sum(hull[0].bits for hull in hulls.values())
    # 0.29 * 100 is 28.999999999999996: choices of exactly the budget's bits must not be lost to that rounding.
    left = budget * elements * (1 + 2**-50) - cheapest
    if not left >= 0:
        least = cheapest / elements
        raise ValueError(
            f"allocate_bits: budget={budget} bits a weight, and the cheapest choices take {least:.3f} with scales"
            " counted; raise the budget or add cheaper choices"
        )
    steps = sorted(
        (-_gain(before, after), path, i)
        for path, hull in hulls.items()
        for i, (before, after) in enumerate(itertools.pairwise(hull))
    )
    level = dict.fromkeys(hulls, 0)
    for _, path, i in steps:
        price = hulls[path][i + 1].bits - hulls[path][i].bits
        if level[path] == i and price <= left:
            level[path], left = i + 1, left - price
    return {path: hulls[path][i].spec for path, i in level.items()}


def convex_hull(options: Sequence[Option]) -> list[Option]:
    """The options worth their bits: from the cheapest on, each step saving less for a bit than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    return (before.loss - after.loss) / (after.bits - before.bits)
