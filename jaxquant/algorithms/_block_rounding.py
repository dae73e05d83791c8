"""Learned rounding of all weights of a block together, on the block's outputs, batch after batch."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.algorithms._transform import BlockTuning
from jaxquant.algorithms.learned_rounding import (
    OPTIMIZERS,
    Rounding,
    Start,
    falling_rates,
    harden,
    initial,
    soft_weight,
    start_from,
    step_roundings,
)
from jaxquant.arrays._outliers import OutlierArray, dequantize_weight
from jaxquant.arrays._qarray import QArray, codes_of, dequantize_array, pack_padded, pad_axis

Run = Callable[[list[jax.Array], Any], list[jax.Array]]  # the block: weights and everything else -> outputs


class Trained(NamedTuple):
    """What training a block gives.

    Attributes:
        weights: quantized as trained.
        before: squared error of the outputs on the batches held out, relative, with the codes it started from.
        after: the same with the trained ones.
    """

    weights: list[QArray | OutlierArray]
    before: float
    after: float


class Held(NamedTuple):
    """A weight in training: what stays as it is.

    Attributes:
        start: of its codes.
        pre_scale: factors of its inputs, or None.
        rest: what outlier channels add, or None.
    """

    start: Start
    pre_scale: jax.Array | None
    rest: jax.Array | None


def train_block(
    run: Run,
    tuning: BlockTuning,
    weights: Sequence[QArray | OutlierArray],
    floats: Sequence[jax.Array],
    inputs: Sequence[Any],
    targets: Sequence[list[jax.Array]],
) -> Trained:
    """Trains the roundings of a block's weights towards given outputs.

    Args:
        run: the block, differentiable; blocks alike should be one object, so that they compile once.
        tuning: how.
        weights: the quantized weights, in plain layout.
        floats: the float ones.
        inputs: for each batch what `run` takes beside the weights.
        targets: for each batch the outputs wanted.

    Returns:
        The weights as they did best on the batches held out, after some round of training or before any.
    """
    held = [_hold(q, w) for q, w in zip(weights, floats, strict=True)]
    shapes = tuple(q.shape for q in weights)
    roundings = [initial(each.start) for each in held]
    memory = OPTIMIZERS[tuning.optimizer](1.0).init(roundings)
    split = max(len(inputs) - tuning.held_out, 1)
    judges = slice(split if split < len(inputs) else 0, None)

    def judge(roundings: list[Rounding]) -> float:
        return _mean_loss(run, shapes, roundings, held, inputs[judges], targets[judges])

    before = least = judge(roundings)
    best = jax.tree.map(jnp.copy, roundings)
    rates = falling_rates(tuning.learning_rate, tuning.steps)
    for done, (place, rate) in enumerate(zip(batch_order(split, tuning.steps), rates, strict=True), 1):
        state = (roundings, memory, held, inputs[place], targets[place], rate)
        roundings, memory = _step(run, shapes, tuning.optimizer, *state)
        if (done % split == 0 or done == tuning.steps) and (error := judge(roundings)) < least:
            best, least = jax.tree.map(jnp.copy, roundings), error
    return Trained([_release(*parts) for parts in zip(weights, best, held, strict=True)], before, least)


def batch_order(batches: int, steps: int) -> Iterable[int]:
    """Every batch once in each round, in an order of its own."""
    rng = np.random.default_rng(0)
    rounds = [rng.permutation(batches) for _ in range(-(-steps // batches))]
    return map(int, np.concatenate(rounds)[:steps])


@jax.jit
def _hold(q: QArray | OutlierArray, w: jax.Array) -> Held:
    base = q.base if isinstance(q, OutlierArray) else q
    rest = None
    if isinstance(q, OutlierArray):
        rest = dequantize_weight(q).astype(jnp.float32) - dequantize_array(base).astype(jnp.float32)
    weight = w.astype(jnp.float32) - (0.0 if rest is None else rest)
    if base.pre_scale is not None:
        weight = weight / base.pre_scale
    padded = pad_axis(weight, base.axis[-1], base.padded - base.trailing[base.axis[-1]])
    return Held(start_from(padded, codes_of(base), base.scale, base.zero_point, base.format), base.pre_scale, rest)


def _soften(rounding: Rounding, held: Held, shape: tuple[int, ...]) -> jax.Array:
    """The float weight that parameters stand for, differentiable in them."""
    weight = soft_weight(rounding, held.start)
    weight = jax.lax.slice(weight, [0] * len(shape), shape)
    if held.pre_scale is not None:
        weight = weight * held.pre_scale
    return weight if held.rest is None else weight + held.rest


@jax.jit
def _release(q: QArray | OutlierArray, rounding: Rounding, held: Held) -> QArray | OutlierArray:
    base = q.base if isinstance(q, OutlierArray) else q
    codes, scale = harden(rounding, held.start, base.zero_point, base.format)
    new = dataclasses.replace(base, qvalue=pack_padded(codes, base.format, base.axis[-1]), scale=scale)
    return dataclasses.replace(q, base=new) if isinstance(q, OutlierArray) else new


def _loss(run: Run, shapes, roundings, held, inputs, targets) -> jax.Array:
    """Squared error of a block's outputs over their mean square, summed over the outputs."""
    outs = run([_soften(*parts) for parts in zip(roundings, held, shapes, strict=True)], inputs)
    total = jnp.zeros(())
    for out, target in zip(outs, targets, strict=True):
        wanted = target.astype(jnp.float32)
        power = jnp.maximum(jnp.sum(jnp.square(wanted)), jnp.finfo(jnp.float32).tiny)
        total = total + jnp.sum(jnp.square(out.astype(jnp.float32) - wanted)) / power
    return total


_loss_only = jax.jit(_loss, static_argnums=(0, 1))


def _mean_loss(run: Run, shapes, roundings, held, inputs, targets) -> float:
    losses = [_loss_only(run, shapes, roundings, held, *pair) for pair in zip(inputs, targets, strict=True)]
    return float(np.mean(np.asarray(losses, np.float64)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(run: Run, shapes, optimizer: str, roundings, memory, held, inputs, targets, rate):
    gradients = jax.grad(_loss, argnums=2)(run, shapes, roundings, held, inputs, targets)
    return step_roundings(optimizer, roundings, memory, gradients, rate)
