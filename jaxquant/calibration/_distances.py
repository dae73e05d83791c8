"""How far a changed model's output is from the float model's: one number."""

from typing import Any

import jax
import jax.numpy as jnp


def squared_change(reference: Any, output: Any) -> jax.Array:
    """Mean squared change of a model's floating outputs, relative to their mean square.

    Args:
        reference: pytree of the float model's outputs.
        output: the same of the changed model.

    Returns:
        float32 scalar, summed over the leaves.

    Raises:
        ValueError: no output is floating.

    >>> squared_change(jnp.asarray([3.0, 4.0]), jnp.asarray([3.0, 3.0])).item()
    0.03999999910593033
    """
    tiny = jnp.finfo(jnp.float32).tiny
    changes = [
        jnp.mean(jnp.square(b - a)) / jnp.maximum(jnp.mean(jnp.square(a)), tiny)
        for a, b in _floating("squared_change", reference, output)
    ]
    return sum(changes, jnp.float32(0))


def logit_divergence(reference: Any, output: Any) -> jax.Array:
    """Mean KL(float || changed) of the distributions that a model's floating outputs are the logits of.

    Args:
        reference: pytree of the float model's logits, [..., V] each.
        output: the same of the changed model.

    Returns:
        float32 scalar, nats, summed over the leaves.

    Raises:
        ValueError: no output is floating.

    >>> logit_divergence(jnp.zeros((2, 4)), jnp.zeros((2, 4)) + 1.0).item()
    0.0
    """
    total = jnp.float32(0)
    for a, b in _floating("logit_divergence", reference, output):
        log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        total = total + jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    return total


def _floating(name: str, reference: Any, output: Any) -> list[tuple[jax.Array, jax.Array]]:
    """The floating leaves of two outputs in pairs, in float32."""
    pairs = zip(jax.tree.leaves(reference), jax.tree.leaves(output), strict=True)
    floats = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
    if not floats:
        raise ValueError(f"{name}: the model's output holds no floating array; measure it by distance=")
    return floats
