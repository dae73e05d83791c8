"""`distill`: the codes and scales of a quantized model trained end to end on the float model's outputs.

Differs from the papers in:
1. The float model is the teacher: the loss compares its outputs with the quantized model's. EfficientQAT predicts the
   next token.
2. Codes move by offsets that are rounded, with a straight-through gradient, from where GPTQ for example has left them;
   the float weights play no part. PV-Tuning moves a few codes at a time.
3. One float32 gain a scale cell is trained, bounded, and each step sees scales as they will be stored.
4. Batches are held out, and the state that did best on them is kept, the one it started from among them.
5. Where activations are rounded too, training sees them in float; the held-out batches run as `quantized` runs them.

References:
    Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", arXiv:2305.17888
    (distillation, on text that the float model wrote itself).
    Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv:2407.11062.
    Malinovskii et al. 2024, "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
    arXiv:2405.14852.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxquant.algorithms._block_rounding import batch_order
from jaxquant.algorithms.learned_rounding import GAIN_RANGE, falling_rates, soft_scale, straight_through
from jaxquant.arrays._outliers import OutlierArray, dequantize_weight
from jaxquant.arrays._qarray import QArray, codes_of, dequantize_array, dequantize_codes, pack_padded
from jaxquant.arrays._qtypes import decode_codes
from jaxquant.calibration._calibrate import arguments_of
from jaxquant.calibration._distances import logit_divergence
from jaxquant.parameters._lazy import load_leaf
from jaxquant.parameters._tree import is_quantized, map_named, named_leaves
from jaxquant.tracing._arguments import Form, split_arguments
from jaxquant.tracing._quantized import quantized

OPTIMIZER = optax.adam(1.0)


class Move(NamedTuple):
    """What is trained of a weight.

    Attributes:
        gain: scale grid, factors of the scales.
        offset: what is added to the codes before rounding, of their shape; None where they stay.
    """

    gain: jax.Array
    offset: jax.Array | None


Moves = dict[str, Any]  # of each path a Move; optax knows no named tuples


def distill(
    apply_fn: Callable[..., Any],
    params: Any,
    qparams: Any,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    code_rate: float = 0.01,
    held_out: int = 1,
    distance: Callable[[Any, Any], jax.Array] = logit_divergence,
    report: Callable[[int, float], Any] | None = None,
) -> Any:
    """Trains the codes and scales of all quantized weights together, so that the model's output is the float model's.

    Each step takes one batch, runs the float and the quantized model on it, and moves every scale and every integer
    code by Adam against the gradient of their distance. What is kept is the state that did best on the held-out
    batches, so the result is never worse there than `qparams`. A model has more codes than most calibration sets have
    tokens: give it many, text that the float model wrote itself for example, or `code_rate=0`.

    Memory is that of training with Adam: the float parameters, the weights dequantized, their gradients and three
    float32 a code (`code_rate=0`: only the first two and the gradients); checkpoint the model's layers (`nn.remat`,
    `jax.checkpoint`) and make batches small where that is too much.

    Args:
        apply_fn: the float model, called `apply_fn(params, batch)`, or `apply_fn(params, *batch)` for a tuple.
        params: its parameters.
        qparams: what `quantize` made of them, in the plain layout.
        batches: calibration inputs; those that quantized the model will do.
        steps: gradient steps; 0 changes nothing.
        learning_rate: of the first step, relative to each scale; it falls linearly to zero.
        code_rate: the same for codes, in units of one code; 0 leaves them. Formats that are no integers keep theirs.
        held_out: how many of the batches, the last ones, choose what is kept and train nothing.
        distance: `distance(float model's output, quantized model's)`: a differentiable scalar. The default is for
            logits; `lambda a, b: jnp.mean(jnp.square(a - b))` suits other outputs.
        report: called with (steps done, distance on the held-out batches) before the first step, after each round over
            the batches and after the last step.

    Returns:
        `qparams` with the trained codes, and scales rounded to their stored dtype; everything else is the caller's own.

    Raises:
        ValueError: an argument out of range, too few batches, nothing quantized, a weight whose scales cannot be
            trained (in a kernel's layout, or powers of two), a distance that is not finite. The message names it.

    References:
        Liu et al. 2023, arXiv:2305.17888. Chen et al. 2024, arXiv:2407.11062.

    >>> from jaxquant._quantize import quantize
    >>> from jaxquant.arrays._spec import QuantConfig
    >>> params = {"kernel": jnp.sin(jnp.arange(1024.0)).reshape(128, 8)}
    >>> qparams = quantize(params, QuantConfig.preset("w4a16"))
    >>> batches, seen = [3 * jnp.eye(128)] * 2, []
    >>> apply_fn = lambda p, x: x @ p["kernel"]
    >>> trained = distill(apply_fn, params, qparams, batches, steps=20, report=lambda step, kl: seen.append(kl))
    >>> seen[-1] < seen[0]
    True
    """
    batches = list(batches)
    _check(steps, learning_rate, code_rate, held_out, len(batches))
    moves: Moves = {
        path: _unmoved(_trainable(path, q), code_rate) for path, q in named_leaves(qparams) if is_quantized(q)
    }
    if not moves:
        raise ValueError("distill: qparams holds no quantized weight; give what quantize returned")
    if not steps:
        return qparams
    params = map_named(lambda _, leaf: load_leaf(leaf), params)
    training = [split_arguments((params, qparams, *arguments_of(batch)), {}) for batch in batches[:-held_out]]
    last = [arguments_of(batch) for batch in batches[-held_out:]]
    step, run, compare = _make_step(apply_fn, distance), quantized(apply_fn), jax.jit(distance)

    def checked(done: int, moves: Moves) -> float:
        moved = _with_moves(qparams, moves)
        value = sum(float(compare(run(params, *args), run(moved, *args))) for args in last) / held_out
        if not done and not jnp.isfinite(value):
            raise ValueError(f"distill: the distance on the held-out batches is {value} at the start; NaN in them?")
        if report is not None:
            report(done, value)
        return value

    best, least = moves, checked(0, moves)
    memory = OPTIMIZER.init(moves)
    rates = zip(falling_rates(learning_rate, steps), falling_rates(code_rate, steps), strict=True)
    for done, (place, rate) in enumerate(zip(batch_order(len(training), steps), rates, strict=True), 1):
        moves, memory = step(*training[place], moves, memory, rate)
        if done == steps or done % len(training) == 0:
            value = checked(done, moves)
            best, least = (moves, value) if value < least else (best, least)
    return _with_moves(qparams, best)


def _check(steps: int, learning_rate: float, code_rate: float, held_out: int, batches: int) -> None:
    """Raises for arguments out of range."""
    if steps < 0 or learning_rate <= 0 or code_rate < 0 or held_out < 1:
        raise ValueError(
            f"distill: steps={steps!r}, learning_rate={learning_rate!r}, code_rate={code_rate!r},"
            f" held_out={held_out!r}; steps and code_rate must be 0 or more, the others positive"
        )
    if batches <= held_out:
        raise ValueError(
            f"distill: {batches} batches, and held_out={held_out} of them train nothing; give at least"
            f" {held_out + 1}: smaller ones will do"
        )


def _base(w: QArray | OutlierArray) -> QArray:
    return w.base if isinstance(w, OutlierArray) else w


def _trainable(path: str, w: QArray | OutlierArray) -> QArray:
    """What is trained of a weight.

    Raises:
        ValueError: it cannot be.
    """
    q = _base(w)
    if q.layout != "plain":
        raise ValueError(
            f"{path}: layout {q.layout!r} is packed for a kernel, and plain ones are trained; unpack by"
            " jq.pack_for(qparams, 'plain'), distill, and pack again"
        )
    if q.qtype == "mxfp4":
        raise ValueError(f"{path}: the scales of mxfp4 are powers of two and cannot be trained; take nf4 or int4")
    return q


def _unmoved(q: QArray, code_rate: float) -> Move:
    """The parameters that leave a weight as it is."""
    moving = code_rate > 0 and q.format.is_integer
    return Move(jnp.ones(q.scale.shape), jnp.zeros(jax.eval_shape(codes_of, q).shape) if moving else None)


def _make_step(apply_fn: Callable[..., Any], distance: Callable[[Any, Any], jax.Array]) -> Callable:
    """A jitted function of one call's arguments, moves, optimizer state and two rates: the next moves and state."""

    def loss(moves: Moves, params: Any, qparams: Any, *args: Any) -> jax.Array:
        soft = map_named(lambda path, leaf: _soften(leaf, moves[path]) if path in moves else leaf, qparams)
        return distance(apply_fn(params, *args), apply_fn(soft, *args)).astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def step(
        form: Form, arrays: list, moves: Moves, memory: optax.OptState, rates: tuple[jax.Array, jax.Array]
    ) -> tuple[Moves, optax.OptState]:
        gradients = jax.grad(lambda moves: form.call(functools.partial(loss, moves), arrays))(moves)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes implicitly
            updates, memory = OPTIMIZER.update(gradients, memory)
        rates_of = {path: Move(rates[0], None if move.offset is None else rates[1]) for path, move in moves.items()}
        moves = jax.tree.map(lambda old, rate, update: old + rate * update, moves, rates_of, updates)
        return {path: Move(jnp.clip(gain, *GAIN_RANGE), offset) for path, (gain, offset) in moves.items()}, memory

    return step


def _moved_codes(q: QArray, offset: jax.Array) -> jax.Array:
    """The values of moved codes, within their format, differentiable in the offset."""
    codes = decode_codes(codes_of(q), q.format) + straight_through(jnp.round(offset), offset)
    return jnp.clip(codes, q.format.qmin, q.format.qmax)


def _soften(w: QArray | OutlierArray, move: Move) -> jax.Array:
    """The float weight that a move leads to, differentiable in it."""
    wide = dataclasses.replace(_base(w), dtype=jnp.dtype("float32"))
    moved = dataclasses.replace(wide, scale=soft_scale(wide.scale, move.gain))
    weight = (
        dequantize_array(moved) if move.offset is None else dequantize_codes(moved, _moved_codes(wide, move.offset))
    )
    if isinstance(w, OutlierArray):  # what the outlier channels add stays
        weight = weight + dequantize_weight(dataclasses.replace(w, base=wide)) - dequantize_array(wide)
    return weight.astype(w.dtype)


def _with_moves(qparams: Any, moves: Mapping[str, Move]) -> Any:
    """The quantized tree after moves, scales in their stored dtype."""

    def apply(path: str, leaf: Any) -> Any:
        if path not in moves:
            return leaf
        base = _apply_move(_base(leaf), moves[path])
        return dataclasses.replace(leaf, base=base) if isinstance(leaf, OutlierArray) else base

    return map_named(apply, qparams)


@jax.jit
def _apply_move(q: QArray, move: Move) -> QArray:
    scale = soft_scale(q.scale, move.gain).astype(q.scale.dtype)
    if move.offset is None:
        return dataclasses.replace(q, scale=scale)
    codes = _moved_codes(q, move.offset).astype(q.format.code_dtype)
    return dataclasses.replace(q, qvalue=pack_padded(codes, q.format, q.axis[-1]), scale=scale)
