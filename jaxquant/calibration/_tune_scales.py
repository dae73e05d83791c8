"""`tune_scales`: the scales of a quantized model trained end to end on the float model's outputs, codes fixed.

Differs from the paper (EfficientQAT's second phase, E2E-QP) in:
1. The float model is the teacher: the loss compares its outputs with the quantized model's. The paper predicts the next
   token.
2. One float32 gain a scale cell is trained, bounded, and each step sees scales as they will be stored.
3. Batches are held out, and the scales that did best on them are kept, those it started from among them.
4. Where activations are rounded too, training sees them in float; the held-out batches run as `quantized` runs them.

References:
    Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv:2407.11062.
    Malinovskii et al. 2024, "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
    arXiv:2405.14852 (its continuous part).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxquant.algorithms._block_rounding import batch_order
from jaxquant.algorithms.learned_rounding import GAIN_RANGE, falling_rates, soft_scale
from jaxquant.arrays._outliers import OutlierArray, dequantize_weight
from jaxquant.arrays._qarray import QArray
from jaxquant.calibration._calibrate import arguments_of
from jaxquant.calibration._distances import logit_divergence
from jaxquant.parameters._lazy import load_leaf
from jaxquant.parameters._tree import is_quantized, map_named, named_leaves
from jaxquant.tracing._arguments import Form, split_arguments
from jaxquant.tracing._quantized import quantized

Gains = dict[str, jax.Array]
OPTIMIZER = optax.adam(1.0)


def tune_scales(
    apply_fn: Callable[..., Any],
    params: Any,
    qparams: Any,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    held_out: int = 1,
    distance: Callable[[Any, Any], jax.Array] = logit_divergence,
    report: Callable[[int, float], Any] | None = None,
) -> Any:
    """Trains the scales of all quantized weights together, so that the model's output is the float model's.

    The codes stay. Each step takes one batch, runs the float and the quantized model on it, and moves every scale by
    Adam against the gradient of their distance. What is kept is the state that did best on the held-out batches, so
    the result is never worse there than `qparams`. Memory is that of one training step on one batch without an
    optimizer: the float parameters, the weights dequantized, their gradients; checkpoint the model's layers
    (`nn.remat`, `jax.checkpoint`) and make batches small where that is too much.

    Args:
        apply_fn: the float model, called `apply_fn(params, batch)`, or `apply_fn(params, *batch)` for a tuple.
        params: its parameters.
        qparams: what `quantize` made of them, in the plain layout.
        batches: calibration inputs; those that quantized the model will do.
        steps: gradient steps; 0 changes nothing.
        learning_rate: of the first step, relative to each scale; it falls linearly to zero.
        held_out: how many of the batches, the last ones, choose what is kept and train nothing.
        distance: `distance(float model's output, quantized model's)`: a differentiable scalar. The default is for
            logits; `lambda a, b: jnp.mean(jnp.square(a - b))` suits other outputs.
        report: called with (steps done, distance on the held-out batches) before the first step, after each round over
            the batches and after the last step.

    Returns:
        `qparams` with the trained scales, rounded to their stored dtype; everything else is the caller's own.

    Raises:
        ValueError: an argument out of range, too few batches, nothing quantized, a weight whose scales cannot be
            trained (in a kernel's layout, or powers of two), a distance that is not finite. The message names it.

    References:
        Chen et al. 2024, arXiv:2407.11062 (E2E-QP).

    >>> from jaxquant._quantize import quantize
    >>> from jaxquant.arrays._spec import QuantConfig
    >>> params = {"kernel": jnp.sin(jnp.arange(1024.0)).reshape(128, 8)}
    >>> qparams = quantize(params, QuantConfig.preset("w4a16"))
    >>> batches, seen = [3 * jnp.eye(128)] * 2, []
    >>> apply_fn = lambda p, x: x @ p["kernel"]
    >>> tuned = tune_scales(apply_fn, params, qparams, batches, steps=20, report=lambda step, kl: seen.append(kl))
    >>> seen[-1] < seen[0]
    True
    """
    batches = list(batches)
    _check(steps, learning_rate, held_out, len(batches))
    gains = {path: jnp.ones(_tunable(path, q).scale.shape) for path, q in named_leaves(qparams) if is_quantized(q)}
    if not gains:
        raise ValueError("tune_scales: qparams holds no quantized weight; give what quantize returned")
    if not steps:
        return qparams
    params = map_named(lambda _, leaf: load_leaf(leaf), params)
    training = [split_arguments((params, qparams, *arguments_of(batch)), {}) for batch in batches[:-held_out]]
    last = [arguments_of(batch) for batch in batches[-held_out:]]
    step, run, compare = _make_step(apply_fn, distance), quantized(apply_fn), jax.jit(distance)

    def checked(done: int, gains: Gains) -> float:
        moved = _with_gains(qparams, gains)
        value = sum(float(compare(run(params, *args), run(moved, *args))) for args in last) / held_out
        if not done and not jnp.isfinite(value):
            raise ValueError(f"tune_scales: the distance on the held-out batches is {value} at the start; NaN in them?")
        if report is not None:
            report(done, value)
        return value

    best, least = gains, checked(0, gains)
    memory = OPTIMIZER.init(gains)
    order, rates = batch_order(len(training), steps), falling_rates(learning_rate, steps)
    for done, (place, rate) in enumerate(zip(order, rates, strict=True), 1):
        gains, memory = step(*training[place], gains, memory, rate)
        if done == steps or done % len(training) == 0:
            value = checked(done, gains)
            best, least = (gains, value) if value < least else (best, least)
    return _with_gains(qparams, best)


def _check(steps: int, learning_rate: float, held_out: int, batches: int) -> None:
    """Raises for arguments out of range."""
    if steps < 0 or learning_rate <= 0 or held_out < 1:
        raise ValueError(
            f"tune_scales: steps={steps!r}, learning_rate={learning_rate!r}, held_out={held_out!r}; steps must be 0 or"
            " more, the others positive"
        )
    if batches <= held_out:
        raise ValueError(
            f"tune_scales: {batches} batches, and held_out={held_out} of them train nothing; give at least"
            f" {held_out + 1}: smaller ones will do"
        )


def _base(w: QArray | OutlierArray) -> QArray:
    return w.base if isinstance(w, OutlierArray) else w


def _tunable(path: str, w: QArray | OutlierArray) -> QArray:
    """The weight whose scales are trained.

    Raises:
        ValueError: they cannot be.
    """
    q = _base(w)
    if q.layout != "plain":
        raise ValueError(
            f"{path}: layout {q.layout!r} is packed for a kernel, and plain ones are tuned; unpack by"
            " jq.pack_for(qparams, 'plain'), tune, and pack again"
        )
    if q.qtype == "mxfp4":
        raise ValueError(f"{path}: the scales of mxfp4 are powers of two and cannot be trained; take nf4 or int4")
    return q


def _make_step(apply_fn: Callable[..., Any], distance: Callable[[Any, Any], jax.Array]) -> Callable:
    """A jitted function of one call's arguments, gains, optimizer state and rate: the next gains and state."""

    def loss(gains: Gains, params: Any, qparams: Any, *args: Any) -> jax.Array:
        soft = map_named(lambda path, leaf: _soften(leaf, gains[path]) if path in gains else leaf, qparams)
        return distance(apply_fn(params, *args), apply_fn(soft, *args)).astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def step(
        form: Form, arrays: list, gains: Gains, memory: optax.OptState, rate: jax.Array
    ) -> tuple[Gains, optax.OptState]:
        gradients = jax.grad(lambda gains: form.call(functools.partial(loss, gains), arrays))(gains)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes implicitly
            updates, memory = OPTIMIZER.update(gradients, memory)
        return jax.tree.map(lambda old, new: jnp.clip(old + rate * new, *GAIN_RANGE), gains, updates), memory

    return step


def _soften(w: QArray | OutlierArray, gain: jax.Array) -> jax.Array:
    """The float weight of moved scales, differentiable in the gain."""
    return dequantize_weight(_rescaled(w, soft_scale(_base(w).scale, gain)))


def _with_gains(qparams: Any, gains: Mapping[str, jax.Array]) -> Any:
    """The quantized tree with moved scales, in their stored dtype."""

    def move(path: str, leaf: Any) -> Any:
        return _rescaled(leaf, _stored_scale(_base(leaf).scale, gains[path])) if path in gains else leaf

    return map_named(move, qparams)


@jax.jit
def _stored_scale(scale: jax.Array, gain: jax.Array) -> jax.Array:
    return soft_scale(scale, gain).astype(scale.dtype)


def _rescaled(w: QArray | OutlierArray, scale: jax.Array) -> QArray | OutlierArray:
    if isinstance(w, OutlierArray):
        return dataclasses.replace(w, base=dataclasses.replace(w.base, scale=scale))
    return dataclasses.replace(w, scale=scale)
