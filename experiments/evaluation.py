"""How far a quantized language model is from the float one: perplexity, KL divergence, agreement, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Forward = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Per-sequence means over tokens, so that a caller can bootstrap over sequences.

    Attributes:
        nll: negative log-likelihood of the next token, nats, [sequences].
        kl: KL(float || quantized) of the next-token distribution, nats, [sequences].
        agreement: how often both models' likeliest tokens agree, [sequences].
    """

    nll: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return float(np.exp(self.nll.mean()))


def token_measures(
    reference: jax.Array, logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares two models' logits at each token.

    Args:
        reference: float32 logits [B, T, V] of the float model.
        logits: float32 logits [B, T, V] of the model under test.
        targets: int tokens [B, T] that really came next.

    Returns:
        (negative log-likelihood, KL(reference || model), whether the likeliest tokens agree), each float32 [B, T].
    """
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_q, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(logits, axis=-1)
    return nll, kl, same.astype(jnp.float32)


def evaluate(
    reference: Forward,
    reference_params: Any,
    forward: Forward,
    params: Any,
    tokens: np.ndarray,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Evaluation:
    """Runs both models over token sequences and compares them at every position.

    Args:
        reference: the float model, (params, tokens [B, T]) -> logits [B, T, V].
        reference_params: its parameters.
        forward: the model under test.
        params: its parameters.
        tokens: integer [sequences, T + 1]; inputs are all but the last column, targets all but the first.
        batch_size: sequences a step; a last, smaller batch compiles once more.
        progress: called with the number of sequences done in each step.

    Returns:
        The measures of each sequence.

    Raises:
        ValueError: `tokens` is no integer matrix of at least two columns.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens: expected integers [sequences, T + 1], got {tokens.dtype} {tokens.shape}")

    @jax.jit
    def step(reference_params, params, batch):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        measures = token_measures(reference(reference_params, inputs), forward(params, inputs), targets)
        return tuple(jnp.mean(measure, axis=1) for measure in measures)

    rows = []
    for start in range(0, len(tokens), batch_size):
        batch = jnp.asarray(tokens[start : start + batch_size].astype(np.int32))
        rows.append([np.asarray(measure, np.float64) for measure in step(reference_params, params, batch)])
        progress(len(batch))
    return Evaluation(*(np.concatenate(column) for column in zip(*rows, strict=True)))
