"""Learned rounding: offsets before rounding and gains of the scales, trained by gradient steps.

Differs from the papers in:
1. A block is what lies between two cuts of the traced program (`jaxquant/calibration/_blocks.py`), two of them for each
   layer of a transformer; no list of modules says so. With `output="layer"` the objective is each weight's own output
   error trace(D^T H D) over all calibration tokens instead, with its exact gradient.
2. It starts from whatever codes the chain has reached, from GPTQ's for example, and keeps the round of training that
   did best on batches held out, or the start; AutoRound starts from round-to-nearest and keeps what did best on the
   tokens it trains on.
3. One gain for each scale cell, with zero points fixed, where AutoRound trains both ends of the range.
4. Rounding is hard with a straight-through gradient (AutoRound), not AdaRound's annealed sigmoid.
5. The target lies half way between the float block's outputs on the quantized and on the float model's activations:
   making up for all that went before follows the calibration tokens too closely (see `compensate`). AutoRound takes
   the float model's outputs, `strength=1`.
6. Where a block's activations are rounded too, training sees them in float.

Symbols: V [K, N] offsets within +-1/2, g gains of the scale grid, D [K, N] = weight - its rounding.

References:
    Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
    (AutoRound), arXiv:2309.05516. Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"
    (AdaRound), arXiv:2004.10568. Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction", arXiv:2102.05426.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.algorithms._factor import regularize
from jaxquant.algorithms._statistics import require
from jaxquant.algorithms._transform import BlockTuning, WeightState, WeightTransform, make_transform, output_error
from jaxquant.algorithms.rtn import apply_rtn
from jaxquant.arrays._numerics import expand_grid
from jaxquant.arrays._qtypes import QType, decode_codes
from jaxquant.arrays._spec import QuantSpec

GAIN_RANGE = (0.5, 1.5)
OPTIMIZERS = {"sign": optax.sign_sgd, "adam": optax.adam}
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
    *,
    output: Literal["block", "layer"] = "block",
    steps: int = 200,
    learning_rate: float = 0.005,
    optimizer: Literal["sign", "adam"] = "sign",
    cuts: int = 2,
    strength: float = 0.5,
    held_out: int = 1,
) -> WeightTransform:
    """Trains rounding offsets and scale gains on the output of a block of layers, or of each layer alone.

    Args:
        output: `"block"` trains the weights of a block together, on the quantized model's activations, towards the
            float block's outputs; it needs a sequential pass with the float model beside it. `"layer"` trains each
            weight on its own output error.
        steps: gradient steps, each on one calibration batch (`"layer"`: on all tokens); the learning rate falls
            linearly to zero over them.
        learning_rate: of the first step, in units of one code for offsets.
        optimizer: `"sign"` steps by the gradient's sign (AutoRound), `"adam"` by Adam.
        cuts: how far a block reaches: to the `cuts`-th place behind it through which a single array carries all that
            follows. Two are a transformer's layer, attention and MLP; one trains the two apart.
        strength: how much of what its inputs deviate by a block makes up for: 0 trains towards what the float block
            makes of the quantized model's activations, 1 towards what it makes of the float model's (AutoRound).
        held_out: how many batches, the last ones, train no block and choose which round of its training is kept; of a
            single batch, that one.

    Returns:
        The transform; it rounds, from the codes of the transform before it if that rounds. Put it last in a chain.

    Raises:
        ValueError: an argument out of range.

    >>> sorted(learned_rounding().needs), sorted(learned_rounding(output="layer").needs)
    (['block'], ['hessian'])
    """
    if steps < 1 or learning_rate <= 0 or cuts < 1:
        raise ValueError(
            f"learned_rounding: steps={steps!r}, learning_rate={learning_rate!r}, cuts={cuts!r}; all must be positive"
        )
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"learned_rounding: optimizer {optimizer!r}; accepted: 'sign', 'adam'")
    if output not in ("block", "layer"):
        raise ValueError(f"learned_rounding: output {output!r}; accepted: 'block', 'layer'")
    if held_out < 1:
        raise ValueError(f"learned_rounding: held_out must be 1 or more, got {held_out!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"learned_rounding: strength must lie in [0, 1], got {strength!r}")
    if output == "block":
        tuning = BlockTuning(cuts, steps, learning_rate, optimizer, strength, held_out)
        return WeightTransform("learned_rounding", frozenset({"block"}), _round_first, tuning=tuning)
    options = {"steps": steps, "learning_rate": learning_rate, "optimizer": optimizer}
    return make_transform(_apply_learned, "learned_rounding", {"hessian"}, **options)


def _round_first(state: WeightState, spec: QuantSpec) -> WeightState:
    """Codes to start from; the walk trains them once it has reached the end of the block."""
    check_integer(spec.weight.format)
    return state if state.codes is not None else apply_rtn(state, spec)


def _apply_learned(
    state: WeightState, spec: QuantSpec, *, steps: int, learning_rate: float, optimizer: str
) -> WeightState:
    check_integer(spec.weight.format)
    hessian, _ = regularize(require(state.stats, "hessian"))
    state = state if state.codes is not None else apply_rtn(state, spec)
    if state.codes is None or state.scale is None:
        raise ValueError("learned_rounding starts from codes; round the state first")
    start = start_from(state.weight, state.codes, state.scale, state.zero_point, spec.weight.format)

    def loss(rounding: Rounding) -> jax.Array:
        return output_error(hessian, soft_weight(rounding, start) - state.weight)

    best = train(loss, initial(start), optimizer, falling_rates(learning_rate, steps))
    codes, scale = harden(best, start, state.zero_point, spec.weight.format)
    return dataclasses.replace(state, codes=codes, scale=scale)


def check_integer(qtype: QType) -> None:
    """Raises unless a format has codes to move."""
    if not qtype.is_integer:
        raise ValueError(f"learned_rounding moves integer codes, got {qtype.name!r}; take rtn() or gptq()")


def start_from(
    weight: jax.Array, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, qtype: QType
) -> Start:
    """Reads the start of training off a rounded weight.

    Args:
        weight: float32 of any rank, what the codes are to stand for.
        codes: of the same shape, unpacked.
        scale: scale grid.
        zero_point: grid or None.
        qtype: an integer format.

    Returns:
        The start.
    """
    zero = jnp.zeros(scale.shape) if zero_point is None else zero_point.astype(jnp.float32)
    code = decode_codes(codes, qtype) - expand_grid(zero, codes.shape)
    value = weight / expand_grid(scale.astype(jnp.float32), weight.shape)
    near = jnp.clip(value, code - NEAR_HALF, code + NEAR_HALF)
    return Start(near, qtype.qmin - zero, qtype.qmax - zero, scale)


def initial(start: Start) -> Rounding:
    """The parameters that leave the start as it is."""
    return Rounding(jnp.zeros_like(start.value), jnp.ones(start.scale.shape))


def straight_through(rounded: jax.Array, x: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `x`."""
    return x + jax.lax.stop_gradient(rounded - x)


def soft_scale(scale: jax.Array, gain: jax.Array) -> jax.Array:
    """Scales times gains, float32 but rounded as they are stored, with a straight-through gradient."""
    wide = scale.astype(jnp.float32) * gain
    return straight_through(wide.astype(scale.dtype).astype(jnp.float32), wide)


def _soft_codes(rounding: Rounding, start: Start) -> tuple[jax.Array, jax.Array]:
    """(codes less zero points with a straight-through gradient, float32 scales as stored)."""
    shape, scale = start.value.shape, soft_scale(start.scale, rounding.gain)
    moved = start.value / expand_grid(rounding.gain, shape) + rounding.offset
    codes = straight_through(jnp.round(moved), moved)
    return jnp.clip(codes, expand_grid(start.low, shape), expand_grid(start.high, shape)), scale


def soft_weight(rounding: Rounding, start: Start) -> jax.Array:
    """The [K, N] weight that the parameters stand for, differentiable in them."""
    codes, scale = _soft_codes(rounding, start)
    return codes * expand_grid(scale, codes.shape)


def harden(rounding: Rounding, start: Start, zero_point: jax.Array | None, qtype: QType) -> tuple[jax.Array, jax.Array]:
    """The trained codes and scales."""
    codes, scale = _soft_codes(rounding, start)
    if zero_point is not None:
        codes = codes + expand_grid(zero_point.astype(jnp.float32), codes.shape)
    return jnp.round(codes).astype(qtype.code_dtype), scale.astype(start.scale.dtype)


def falling_rates(learning_rate: float, steps: int) -> np.ndarray:
    """The learning rate of each step, falling linearly towards zero."""
    return np.asarray(learning_rate * (1 - np.arange(steps) / steps), np.float32)


def step_roundings(
    optimizer: str, roundings: list[Rounding], memory: optax.OptState, gradients: list[Rounding], rate: jax.Array
) -> tuple[list[Rounding], optax.OptState]:
    """Moves parameters against their gradients, within their bounds.

    Args:
        optimizer: out of `OPTIMIZERS`.
        roundings: the parameters.
        memory: the optimizer's state.
        gradients: of the loss.
        rate: float32 scalar, the learning rate.

    Returns:
        (parameters, state).
    """
    with jax.numpy_dtype_promotion("standard"):  # optax promotes implicitly
        updates, memory = OPTIMIZERS[optimizer](1.0).update(gradients, memory, roundings)
    return [bound(add_scaled(old, rate, update)) for old, update in zip(roundings, updates, strict=True)], memory


def add_scaled(rounding: Rounding, rate: jax.Array, update: Rounding) -> Rounding:
    """The parameters moved by a multiple of an update."""
    return Rounding(*jax.tree.map(lambda old, new: old + rate * new, rounding, update))


def bound(rounding: Rounding) -> Rounding:
    """Puts parameters that a step has moved too far back to the ends of their range."""
    return Rounding(jnp.clip(rounding.offset, -0.5, 0.5), jnp.clip(rounding.gain, *GAIN_RANGE))


def train(
    loss: Callable[[Rounding], jax.Array], rounding: Rounding, optimizer: str, rates: np.ndarray | jax.Array
) -> Rounding:
    """Trains rounding parameters, within their bounds, and gives the best ones seen.

    Args:
        loss: differentiable function of the parameters.
        rounding: where to start.
        optimizer: out of `OPTIMIZERS`.
        rates: float32 [steps] learning rates.

    Returns:
        The parameters of least loss among start and steps.
    """

    def step(carry, rate):
        now, memory, best, least = carry
        value, gradient = jax.value_and_grad(loss)(now)
        better = value < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        (following,), memory = step_roundings(optimizer, [now], memory, [gradient], rate)
        return (following, memory, best, jnp.where(better, value, least)), None

    start = (rounding, OPTIMIZERS[optimizer](1.0).init([rounding]), rounding, jnp.asarray(jnp.inf))
    (last, _, best, least), _ = jax.lax.scan(step, start, jnp.asarray(rates))
    better = loss(last) < least
    return Rounding(*jax.tree.map(lambda new, old: jnp.where(better, new, old), last, best))
