"""LLM.int8 and AWQ's salient channels: a few input channels stay in float, the rest is quantized.

Differs from the papers in:
1. Outlier channels are chosen once, from calibration, and not for each batch: the weight's float rows are then stored
   once and the integer product needs no gather of weights.
2. Their number is fixed by `capacity`, so that the container has a static shape. Channels below the threshold are not
   taken. Where more are above it than fit, all inputs of that weight stay in float and meet its integer codes; the
   report says so.
3. The rest may be rounded by any algorithm: `chain(salient(), gptq())`.

References:
    Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339.
    Lin et al. 2023, "AWQ", arXiv:2306.00978, section 3.1 (salient channels by mean magnitude of the activation).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxquant.algorithms._statistics import require, rescale_statistics
from jaxquant.algorithms._transform import Outliers, WeightState, WeightTransform, make_transform
from jaxquant.arrays._spec import QuantSpec


def llm_int8(*, threshold: float = 6.0, capacity: float = 0.01) -> WeightTransform:
    """Keeps input channels in float whose activations exceeded a threshold in calibration.

    Args:
        threshold: least greatest |x| of an outlier channel.
        capacity: the largest part of the channels that can be kept, in (0, 1]. A weight with more outliers than that
            keeps all of its inputs in float, and its codes.

    Returns:
        The transform; it needs channel maxima and does not round. For the paper's W8A8 use preset `w8a8`.

    Raises:
        ValueError: a threshold that is not positive or a capacity outside (0, 1].

    >>> sorted(llm_int8().needs)
    ['absmax']
    """
    if threshold <= 0:
        raise ValueError(f"llm_int8: threshold must be positive, got {threshold!r}")
    _check_part("llm_int8", "capacity", capacity)
    return make_transform(_apply_llm_int8, "llm_int8", {"absmax"}, threshold=threshold, capacity=capacity)


def salient(*, fraction: float = 0.01) -> WeightTransform:
    """Keeps the input channels of largest mean |x| in float.

    Args:
        fraction: the part of the channels kept, in (0, 1]; at least one is.

    Returns:
        The transform; it needs mean magnitudes and does not round.

    Raises:
        ValueError: a fraction outside (0, 1].

    >>> sorted(salient().needs)
    ['mean_abs']
    """
    _check_part("salient", "fraction", fraction)
    return make_transform(_apply_salient, "salient", {"mean_abs"}, fraction=fraction)


def _check_part(name: str, argument: str, part: float) -> None:
    if not 0 < part <= 1:
        raise ValueError(f"{name}: {argument} must lie in (0, 1], got {part!r}")


def _apply_llm_int8(state: WeightState, spec: QuantSpec, *, threshold: float, capacity: float) -> WeightState:
    absmax = require(state.stats, "absmax")
    places = math.ceil(capacity * absmax.shape[0])
    largest, index = jax.lax.top_k(absmax, places)
    taken = largest > threshold
    above = jnp.sum(absmax > threshold)
    report = {"outliers": jnp.sum(taken), "outliers_left": above - jnp.sum(taken)}
    return take_out(dataclasses.replace(state, report=state.report | report), index, taken)


def _apply_salient(state: WeightState, spec: QuantSpec, *, fraction: float) -> WeightState:
    activity = state.stats.mean_abs
    _, index = jax.lax.top_k(activity, math.ceil(fraction * activity.shape[0]))
    taken = jnp.ones(index.shape, bool)
    return take_out(dataclasses.replace(state, report=state.report | {"outliers": jnp.sum(taken)}), index, taken)


def take_out(state: WeightState, index: jax.Array, taken: jax.Array) -> WeightState:
    """Moves rows of a weight to its float part.

    Args:
        state: a weight without outliers so far.
        index: [n] int32 channels.
        taken: [n] bool: which of them.

    Returns:
        The state with these rows zero, and the statistics as if these channels were never active.

    Raises:
        ValueError: the state has outliers already.
    """
    if state.outliers is not None:
        raise ValueError("a chain may hold only one of llm_int8(...) and salient(...)")
    channels = state.weight.shape[0]
    place = jnp.where(taken, index, channels)
    rows = jnp.where(jnp.expand_dims(taken, 1), state.weight[index], 0.0)
    keep = jnp.ones(channels).at[place].set(0.0, mode="drop")
    return dataclasses.replace(
        state,
        weight=state.weight * jnp.expand_dims(keep, 1),
        stats=rescale_statistics(state.stats, keep),
        outliers=Outliers(place.astype(jnp.int32), rows),
    )
