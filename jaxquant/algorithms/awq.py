"""AWQ: input channels with large activations are scaled up before rounding, and their inputs down.

Differs from the paper in:
1. The loss of a candidate is the layer's squared output error in closed form, trace(D^T H D), over all calibration
   tokens; the reference code runs a batch of tokens through the parent block. `objective` takes any other function.
2. The factor stays with the weight as `pre_scale` instead of being folded into the operator before it, so that no
   knowledge of the model's topology is needed and every product can be scaled.
3. `duo_scaling` divides by the weight's own mean magnitude, as AutoAWQ and llm-compressor do: s = x^r / w^(1-r).
4. The unscaled weight is a candidate too, so the result never loses to round-to-nearest.
5. The clipping search scores each group by its own block of H instead of by 512 tokens, and leaves the weight as it is:
   a later algorithm in the chain sees the narrowed range, not clipped weights.

Symbols: s [K] the factor a weight row is multiplied by (`pre_scale` is 1 / s), r the exponent searched over.

References:
    Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    arXiv:2306.00978; reference code mit-han-lab/llm-awq.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.algorithms._factor import diagonal_blocks
from jaxquant.algorithms._statistics import require
from jaxquant.algorithms._transform import (
    WeightState,
    WeightTransform,
    find_cells,
    make_transform,
    matrix_grid,
    output_error,
    rescale_inputs,
)
from jaxquant.arrays._numerics import decode, encode, expand_grid
from jaxquant.arrays._spec import QuantSpec, TensorSpec

STEPS = 20  # exponents r = 0, 1/20, ..., 19/20
CLIP_STEPS = 10  # ranges of 1, 0.95, ..., 0.55 times the full one
CLIP_STEP = 0.05
BATCH = 4  # candidates evaluated at once: more costs memory only

Objective = Callable[[jax.Array, WeightState], jax.Array]


def awq(*, duo_scaling: bool = True, clip: bool = True, objective: Objective | None = None) -> WeightTransform:
    """Scales input channels by a searched power of their mean magnitude, and narrows ranges where that helps.

    Args:
        duo_scaling: also divide by the weight rows' mean magnitude.
        clip: search a narrower range for each scale cell afterwards.
        objective: `(rounded weight [K, N] in units of the unscaled inputs, state) -> scalar` to be lowered; None is the
            layer's output error.

    Returns:
        The transform; it needs mean magnitudes and the Hessian, and does not round.

    >>> sorted(awq().needs)
    ['hessian', 'mean_abs']
    """
    return make_transform(
        _apply_awq, "awq", {"mean_abs", "hessian"}, duo_scaling=duo_scaling, clip=clip, objective=objective
    )


def _apply_awq(
    state: WeightState, spec: QuantSpec, *, duo_scaling: bool, clip: bool, objective: Objective | None
) -> WeightState:
    grid = matrix_grid(state.weight.shape, spec.weight)
    loss = objective if objective is not None else _layer_error
    candidates = _candidates(state, grid, duo_scaling)

    def score(factor):
        rows = jax.lax.expand_dims(factor, [1])
        return loss(_round_to_nearest(state.weight * rows, grid, spec.weight) / rows, state)

    losses = jax.lax.map(score, candidates, batch_size=BATCH)
    best = jnp.argmin(losses)
    scaled = rescale_inputs(state, 1 / candidates[best])
    if clip:
        scaled = dataclasses.replace(scaled, clip=_search_clip(scaled, grid, spec.weight))
    exponent = jnp.where(best == 0, 0.0, (best.astype(jnp.float32) - 1) / STEPS)
    return dataclasses.replace(scaled, report=state.report | {"awq_exponent": exponent})


def _layer_error(rounded: jax.Array, state: WeightState) -> jax.Array:
    return output_error(require(state.stats, "hessian"), rounded - state.weight)


def _candidates(state: WeightState, grid: tuple[int, int], duo_scaling: bool) -> jax.Array:
    """[1 + STEPS, K] factors; the first is 1."""
    activity = jax.lax.expand_dims(state.stats.mean_abs, [0])
    exponent = jax.lax.expand_dims(jnp.arange(STEPS, dtype=jnp.float32) / STEPS, [1])
    factors = activity**exponent
    if duo_scaling:
        magnitude = jax.lax.expand_dims(_row_magnitude(state.weight, grid), [0])
        factors = factors / (magnitude ** (1 - exponent) + 1e-4)
    factors = jnp.maximum(factors, 1e-4)
    largest, least = jnp.max(factors, 1, keepdims=True), jnp.min(factors, 1, keepdims=True)
    factors = factors / jnp.sqrt(largest * least)
    return jnp.concatenate([jnp.ones_like(activity), factors])


def _row_magnitude(weight: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[K] mean over the outputs of |w| as a part of its cell's largest."""
    magnitude = jnp.abs(weight)
    cells = magnitude.reshape(grid[0], -1, grid[1], weight.shape[1] // grid[1])
    largest = jnp.max(cells, axis=(1, 3))
    return jnp.mean(magnitude / (expand_grid(largest, weight.shape) + 1e-6), axis=1)


def _round_to_nearest(
    weight: jax.Array, grid: tuple[int, int], spec: TensorSpec, clip: jax.Array | None = None
) -> jax.Array:
    if spec.range == "mse":  # its search would cost eighty times the rest and is what `clip` does better
        spec = dataclasses.replace(spec, range="absmax")
    scale, zero_point = find_cells(weight, grid, spec, clip)
    return decode(encode(weight, scale, zero_point, spec), scale, zero_point, spec)


def _search_clip(state: WeightState, grid: tuple[int, int], spec: TensorSpec) -> jax.Array:
    """Finds for each cell the range whose rounding errors the cell's own block of H weighs least."""
    size = state.weight.shape[0] // grid[0]
    own = diagonal_blocks(require(state.stats, "hessian"), size)

    def try_clip(best, step):
        clip, least = best
        factor = jnp.full(grid, 1.0) - CLIP_STEP * step.astype(jnp.float32)
        deviation = _round_to_nearest(state.weight, grid, spec, factor) - state.weight
        split = deviation.reshape(grid[0], size, -1)
        errors = jnp.sum(split * jnp.einsum("gst,gtn->gsn", own, split), axis=1)
        errors = jnp.sum(errors.reshape(*grid, -1), axis=2)
        better = errors < least
        return (jnp.where(better, factor, clip), jnp.where(better, errors, least)), None

    start = (jnp.ones(grid), jnp.full(grid, jnp.inf))
    (clip, _), _ = jax.lax.scan(try_clip, start, jnp.arange(CLIP_STEPS))
    return clip
