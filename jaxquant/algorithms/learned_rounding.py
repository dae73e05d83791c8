"""Learned rounding: offsets before rounding and gains of the scales, trained by gradient steps.

Differs from the papers in:
1. The objective of one layer is trace(D^T H D) over all calibration tokens, with its exact gradient, where AutoRound
   takes sampled batches of a block. `train` takes any objective, a block's output included.
2. It starts from whatever codes the chain has reached, and the best parameters seen are kept, so it never loses to its
   start; AutoRound starts from round-to-nearest.
3. One gain for each scale cell, with zero points fixed, where AutoRound trains both ends of the range.
4. Rounding is hard with a straight-through gradient (AutoRound), not AdaRound's annealed sigmoid.

Symbols: V [K, N] offsets within +-1/2, g gains of the scale grid, D [K, N] = weight - its rounding.

References:
    Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
    (AutoRound), arXiv:2309.05516. Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"
    (AdaRound), arXiv:2004.10568.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxquant._numerics import expand_grid
from jaxquant._qtypes import decode_codes
from jaxquant._spec import QuantSpec, TensorSpec
from jaxquant._statistics import require
from jaxquant.algorithms._factor import regularize
from jaxquant.algorithms._transform import WeightState, WeightTransform, make_transform, output_error
from jaxquant.algorithms.rtn import apply_rtn

GAIN_RANGE = (0.5, 1.5)
NEAR_HALF = 0.499  # how far a start may lie from its code and still round to it


class Rounding(NamedTuple):
    """What is trained.

    Attributes:
        offset: [K, N] V.
        gain: scale grid g.
    """

    offset: jax.Array
    gain: jax.Array


class Start(NamedTuple):
    """What training starts from, fixed.

    Attributes:
        value: [K, N] the weight in units of the scale, within half a step of its code.
        low: grid, least code less the zero point.
        high: grid, greatest code less the zero point.
        scale: scale grid.
    """

    value: jax.Array
    low: jax.Array
    high: jax.Array
    scale: jax.Array


def learned_rounding(
    *, steps: int = 200, learning_rate: float = 0.005, optimizer: Literal["sign", "adam"] = "sign"
) -> WeightTransform:
    """Trains rounding offsets and scale gains on the layer's output error.

    Args:
        steps: gradient steps; the learning rate falls linearly to zero over them.
        learning_rate: of the first step, in units of one code for offsets.
        optimizer: `"sign"` steps by the gradient's sign (AutoRound), `"adam"` by Adam.

    Returns:
        The transform; it needs the Hessian and rounds, from the codes of the transform before it if that rounds.

    Raises:
        ValueError: an argument out of range.

    >>> sorted(learned_rounding().needs)
    ['hessian']
    """
    if steps < 1 or learning_rate <= 0:
        raise ValueError(f"learned_rounding: steps={steps!r}, learning_rate={learning_rate!r}; both must be positive")
    if optimizer not in ("sign", "adam"):
        raise ValueError(f"learned_rounding: optimizer {optimizer!r}; accepted: 'sign', 'adam'")
    options = {"steps": steps, "learning_rate": learning_rate, "optimizer": optimizer}
    return make_transform(_apply_learned, "learned_rounding", {"hessian"}, **options)


def _apply_learned(
    state: WeightState, spec: QuantSpec, *, steps: int, learning_rate: float, optimizer: str
) -> WeightState:
    hessian, _ = regularize(require(state.stats, "hessian"))
    state = state if state.codes is not None else apply_rtn(state, spec)
    start = start_from(state, spec.weight)

    def loss(rounding: Rounding) -> jax.Array:
        return output_error(hessian, soft_weight(rounding, start) - state.weight)

    best = train(loss, initial(start), steps, make_optimizer(optimizer, learning_rate, steps))
    return harden(best, start, state, spec.weight)


def start_from(state: WeightState, spec: TensorSpec) -> Start:
    """Reads the start of training off a rounded state.

    Raises:
        ValueError: the format is no integer, or the state is not rounded.
    """
    if not spec.format.is_integer:
        raise ValueError(f"learned_rounding moves integer codes, got {spec.qtype!r}; take rtn() or gptq()")
    if state.codes is None or state.scale is None:
        raise ValueError("learned_rounding starts from codes; round the state first")
    zero = jnp.zeros(state.scale.shape) if state.zero_point is None else state.zero_point.astype(jnp.float32)
    code = decode_codes(state.codes, spec.format) - expand_grid(zero, state.codes.shape)
    value = state.weight / expand_grid(state.scale.astype(jnp.float32), state.weight.shape)
    near = jnp.clip(value, code - NEAR_HALF, code + NEAR_HALF)
    return Start(near, spec.format.qmin - zero, spec.format.qmax - zero, state.scale)


def initial(start: Start) -> Rounding:
    """The parameters that leave the start as it is."""
    return Rounding(jnp.zeros_like(start.value), jnp.ones(start.scale.shape))


def _straight_through(rounded: jax.Array, x: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)


def _soft_codes(rounding: Rounding, start: Start) -> tuple[jax.Array, jax.Array]:
    """(codes less zero points with a straight-through gradient, float32 scales as stored)."""
    shape = start.value.shape
    wide = start.scale.astype(jnp.float32) * rounding.gain
    scale = _straight_through(wide.astype(start.scale.dtype).astype(jnp.float32), wide)
    moved = start.value / expand_grid(rounding.gain, shape) + rounding.offset
    codes = _straight_through(jnp.round(moved), moved)
    return jnp.clip(codes, expand_grid(start.low, shape), expand_grid(start.high, shape)), scale


def soft_weight(rounding: Rounding, start: Start) -> jax.Array:
    """The [K, N] weight that the parameters stand for, differentiable in them."""
    codes, scale = _soft_codes(rounding, start)
    return codes * expand_grid(scale, codes.shape)


def harden(rounding: Rounding, start: Start, state: WeightState, spec: TensorSpec) -> WeightState:
    """Puts the trained codes and scales into a state."""
    codes, scale = _soft_codes(rounding, start)
    if state.zero_point is not None:
        codes = codes + expand_grid(state.zero_point.astype(jnp.float32), codes.shape)
    return dataclasses.replace(
        state, codes=jnp.round(codes).astype(spec.format.code_dtype), scale=scale.astype(start.scale.dtype)
    )


def make_optimizer(name: str, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """The optimizer of a name, with its learning rate falling linearly to zero."""
    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.sign_sgd(schedule) if name == "sign" else optax.adam(schedule)


def train(
    loss: Callable[[Rounding], jax.Array],
    rounding: Rounding,
    steps: int,
    optimizer: optax.GradientTransformation,
) -> Rounding:
    """Trains rounding parameters, within their bounds, and gives the best ones seen.

    Args:
        loss: differentiable function of the parameters.
        rounding: where to start.
        steps: gradient steps.
        optimizer: of optax.

    Returns:
        The parameters of least loss among start and steps.
    """

    def bound(rounding: Rounding) -> Rounding:
        return Rounding(jnp.clip(rounding.offset, -0.5, 0.5), jnp.clip(rounding.gain, *GAIN_RANGE))

    def step(carry, _):
        now, memory, best, least = carry
        value, gradient = jax.value_and_grad(loss)(now)
        better = value < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes implicitly
            updates, memory = optimizer.update(gradient, memory, now)
        following = bound(Rounding(*jax.tree.map(jnp.add, now, updates)))
        return (following, memory, best, jnp.where(better, value, least)), None

    start = (rounding, optimizer.init(rounding), rounding, jnp.asarray(jnp.inf))
    (last, _, best, least), _ = jax.lax.scan(step, start, None, length=steps)
    better = loss(last) < least
    return Rounding(*jax.tree.map(lambda new, old: jnp.where(better, new, old), last, best))
