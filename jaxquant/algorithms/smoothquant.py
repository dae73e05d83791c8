"""SmoothQuant: activation outliers are divided out of the inputs and multiplied into the weight.

Differs from the paper in:
1. The factor stays with the weight as `pre_scale` instead of being folded into the norm before it, so any product can
   be smoothed.
2. `alpha=0` leaves the layer as it is. The paper's formula would there move all of the weight's spread into the
   activation, which nobody wants.
3. `alpha=None` searches alpha for each layer: the least squared output error on sampled inputs, with weight and
   activation both rounded as the spec says; "unchanged" is among the candidates.
4. Factors are scaled to geometric mean 1, so that scales stay in the range of their dtype.

Symbols: s [K] the factor a weight row is multiplied by (`pre_scale` is 1 / s), alpha the migration strength.

References:
    Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    arXiv:2211.10438; reference code mit-han-lab/smoothquant.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.algorithms._statistics import require
from jaxquant.algorithms._transform import (
    WeightState,
    WeightTransform,
    find_cells,
    make_transform,
    matrix_grid,
    rescale_inputs,
)
from jaxquant.algorithms.ranges import fake_quantize_activation
from jaxquant.arrays._numerics import decode, encode
from jaxquant.arrays._spec import QuantSpec

GRID = tuple(step / 20 for step in range(0, 20))
FLOOR = 1e-5  # of maxima, as in the reference code


def smoothquant(*, alpha: float | None = None) -> WeightTransform:
    """Moves a part of the activation's outliers into the weight.

    Args:
        alpha: migration strength in [0, 1]: 0.5 is usual for OPT, 0.85 for Llama; None searches it for each layer.

    Returns:
        The transform; it needs channel maxima, and sampled inputs for a search. It does not round.

    Raises:
        ValueError: alpha outside [0, 1].

    >>> sorted(smoothquant(alpha=0.5).needs)
    ['absmax']
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must lie in [0, 1], got {alpha!r}")
    needs = {"absmax"} if alpha is not None else {"absmax", "samples"}
    return make_transform(_apply_smoothquant, "smoothquant", needs, alpha=alpha)


def _apply_smoothquant(state: WeightState, spec: QuantSpec, *, alpha: float | None) -> WeightState:
    chosen = jnp.asarray(alpha, jnp.float32) if alpha is not None else _search_alpha(state, spec)
    smoothed = rescale_inputs(state, 1 / _factor(state, chosen))
    return dataclasses.replace(smoothed, report=state.report | {"alpha": chosen})


def _factor(state: WeightState, alpha: jax.Array) -> jax.Array:
    """[K] max|x|^alpha / max|w|^(1 - alpha), or 1 where alpha is 0 or a channel never fired."""
    absmax = require(state.stats, "absmax")
    activation, weight = jnp.maximum(absmax, FLOOR), jnp.maximum(jnp.max(jnp.abs(state.weight), 1), FLOOR)
    logs = alpha * jnp.log(activation) - (1 - alpha) * jnp.log(weight)
    live = absmax > 0
    mean = jnp.sum(jnp.where(live, logs, 0.0)) / jnp.maximum(jnp.sum(live), 1).astype(jnp.float32)
    return jnp.where(live & (alpha > 0), jnp.exp(logs - mean), 1.0)


def _search_alpha(state: WeightState, spec: QuantSpec) -> jax.Array:
    x = require(state.stats, "samples")
    expected = jnp.matmul(x, state.weight, precision="high")
    grid = matrix_grid(state.weight.shape, spec.weight)

    def score(alpha):
        factor = _factor(state, alpha)
        scaled = state.weight * jax.lax.expand_dims(factor, [1])
        scale, zero_point = find_cells(scaled, grid, spec.weight)
        rounded = decode(encode(scaled, scale, zero_point, spec.weight), scale, zero_point, spec.weight)
        inputs = x / jax.lax.expand_dims(factor, [0])
        if spec.activation is not None:
            inputs = fake_quantize_activation(inputs, spec.activation)
        return jnp.sum(jnp.square(jnp.matmul(inputs, rounded, precision="high") - expected))

    alphas = jnp.asarray(GRID)
    return alphas[jnp.argmin(jax.lax.map(score, alphas))]
