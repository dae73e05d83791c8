"""The contract of an algorithm: a pure function from one weight's state to the next.

A `WeightTransform` sees one matrix `[K, N]` (contracting axes flattened to K, outputs to N, in float32) with the
statistics of the inputs that meet it. It may rescale input channels (`pre_scale`), narrow ranges (`clip`), move
channels to float (`outliers`), change the weight itself, or round it (`codes`). `chain` threads several; whatever is
not rounded in the end is rounded to nearest. Everything is jitted with transform and spec static, and vmapped over
scan stacks and experts, so a transform has no data-dependent shapes and no host code.

Weights that share an input (q, k and v; gate and up) may be concatenated along N: they then share Hessian, Cholesky
factor and `pre_scale`, as they must for a kernel that reads its input once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.algorithms._statistics import Statistics, rescale_statistics
from jaxquant.arrays._numerics import find_range, grid_shape, range_to_scale, search_shrink
from jaxquant.arrays._spec import QuantSpec, TensorSpec


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Input channels kept in float.

    Attributes:
        index: [n] int32 channels; K marks a place not taken.
        rows: [n, N] their float32 weights, zero in places not taken.
    """

    index: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class WeightState:
    """One weight on its way to codes.

    Attributes:
        weight: [K, N] float32, what the codes are to stand for (in units of the scaled inputs).
        stats: statistics of the scaled inputs.
        pre_scale: [K] factor of the inputs so far, or None.
        clip: grid of factors in (0, 1] that narrow the range of each cell, or None.
        outliers: channels taken out of `weight`, or None.
        codes: [K, N] unpacked codes once rounded, or None.
        scale: scale grid [cells of K, cells of N], with `codes`.
        zero_point: grid of zero points, with `codes` of an asymmetric spec.
        report: scalars that a user wants to see (damping used, dead columns, errors).
    """

    weight: jax.Array
    stats: Statistics
    pre_scale: jax.Array | None = None
    clip: jax.Array | None = None
    outliers: Outliers | None = None
    codes: jax.Array | None = None
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    report: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


for _container in (Outliers, WeightState):
    jax.tree_util.register_dataclass(
        _container, data_fields=[field.name for field in dataclasses.fields(_container)], meta_fields=[]
    )


@dataclasses.dataclass(frozen=True)
class BlockTuning:
    """How the rounded weights of a block are trained together on the block's outputs.

    Attributes:
        cuts: places at which one array carries all that follows, up to which a block reaches.
        steps: gradient steps, each on one calibration batch.
        learning_rate: of the first step; it falls linearly to zero.
        optimizer: `"sign"` or `"adam"`.
        strength: the part of its inputs' deviation that a block makes up for.
        held_out: how many batches, the last ones, choose the state that is kept and train nothing.
    """

    cuts: int
    steps: int
    learning_rate: float
    optimizer: str
    strength: float
    held_out: int


@dataclasses.dataclass(frozen=True)
class WeightTransform:
    """An algorithm as a value: equal arguments give equal transforms, so nothing compiles twice.

    Attributes:
        name: as printed in reports.
        needs: the statistics it reads, names out of `jaxquant.algorithms._statistics.NEEDS`.
        rule: pure function `(state, spec, **options) -> state`; of module level, or itself hashable.
        options: the rule's keyword arguments.
        tuning: what happens once all weights of a block are rounded, or None.
        prefers: fields of a weight's `TensorSpec`, with the values that won with this algorithm on held-out
            calibration sequences; presets take them.

    >>> chain().needs
    frozenset()
    """

    name: str
    needs: frozenset[str]
    rule: Callable[..., WeightState] = dataclasses.field(repr=False)
    options: tuple[tuple[str, Any], ...] = ()
    tuning: BlockTuning | None = None
    prefers: tuple[tuple[str, str], ...] = ()

    def apply(self, state: WeightState, spec: QuantSpec) -> WeightState:
        """Takes one weight a step further.

        Args:
            state: the weight so far.
            spec: how it is to be quantized.

        Returns:
            The next state.
        """
        return self.rule(state, spec, **dict(self.options))


def make_transform(
    rule: Callable[..., WeightState],
    name: str,
    needs: set[str],
    prefers: tuple[tuple[str, str], ...] = (),
    **options: Any,
) -> WeightTransform:
    """Joins a rule and its options to a transform."""
    return WeightTransform(name, frozenset(needs), rule, tuple(sorted(options.items())), prefers=prefers)


def chain(*transforms: WeightTransform) -> WeightTransform:
    """Applies transforms one after the other, with one calibration for all.

    Args:
        transforms: in order; each sees the statistics as those before it have rescaled them. Only the last may round.

    Returns:
        Their composition; of nothing, the transform that changes nothing.

    Raises:
        ValueError: learned rounding on a block's outputs that is not the last.

    >>> from jaxquant.algorithms.gptq import gptq
    >>> from jaxquant.algorithms.smoothquant import smoothquant
    >>> chain(smoothquant(alpha=0.5), gptq()).name
    'smoothquant + gptq'
    """
    name = " + ".join(transform.name for transform in transforms)
    needs = frozenset(need for transform in transforms for need in transform.needs)
    early = [transform.name for transform in transforms[:-1] if transform.tuning is not None]
    if early:
        raise ValueError(f"chain: {early[0]} trains on the outputs of a block of rounded weights, so it comes last")
    tuning = transforms[-1].tuning if transforms else None
    prefers = {field: value for transform in transforms for field, value in transform.prefers}
    return WeightTransform(name, needs, _apply_chain, (("transforms", transforms),), tuning, tuple(prefers.items()))


def _apply_chain(state: WeightState, spec: QuantSpec, *, transforms: tuple[WeightTransform, ...]) -> WeightState:
    for transform in transforms:
        state = transform.apply(state, spec)
    return state


def rescale_inputs(state: WeightState, factor: jax.Array) -> WeightState:
    """Multiplies the inputs by positive factors and divides the weight's rows by them; the product stays.

    Args:
        state: a weight not yet rounded.
        factor: [K] float32.

    Returns:
        The state in the new units.
    """
    return dataclasses.replace(
        state,
        weight=state.weight / jax.lax.expand_dims(factor, [1]),
        stats=rescale_statistics(state.stats, factor),
        pre_scale=factor if state.pre_scale is None else state.pre_scale * factor,
    )


def matrix_grid(shape: tuple[int, ...], spec: TensorSpec) -> tuple[int, int]:
    """The scale grid (cells of K, cells of N) of a [K, N] matrix.

    >>> matrix_grid((256, 8), TensorSpec("int8"))
    (1, 8)
    """
    rows, columns = grid_shape((shape[0], shape[1]), (-2,), spec.granularity)
    return rows, columns


def find_cells(
    w: jax.Array,
    grid: tuple[int, int],
    spec: TensorSpec,
    clip: jax.Array | None = None,
    importance: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Finds scale and zero point of each grid cell by the spec's range method.

    Args:
        w: [k, N] float32, the whole matrix or some whole cells of it.
        grid: cells of `w`.
        spec: its `range` and `grid` decide.
        clip: factors that narrow each range, or None.
        importance: [k] weight of each row's squared error in a range search; None takes the reference |error|^2.4.

    Returns:
        (scale, zero point or None), grids.
    """
    low, high = find_range(w, grid, spec)
    if clip is not None:
        low, high = low * clip, high * clip
    if spec.range == "mse":
        if importance is None:
            shrink = search_shrink(w, low, high, spec)
        else:
            shrink = search_shrink(w, low, high, spec, jax.lax.expand_dims(importance, [1]), norm=2.0, at_once=8)
        low, high = low * shrink, high * shrink
    return range_to_scale(low, high, spec)


def output_error(hessian: jax.Array, deviation: jax.Array) -> jax.Array:
    """The squared error of the layer's output in closed form: ||X D||^2 = trace(D^T X^T X D).

    Args:
        hessian: [K, K] sum of x^T x.
        deviation: [K, N] difference D of two weights.

    Returns:
        float32 scalar.

    >>> output_error(jnp.eye(2), jnp.ones((2, 3))).item()
    6.0
    """
    return jnp.sum(deviation * (hessian @ deviation))
