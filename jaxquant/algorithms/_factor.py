"""The Hessian made safe to factor, and its factor."""

import jax
import jax.numpy as jnp

RETRIES = 8  # each takes four times the damping: from 1 % of the mean diagonal to 655 times it


def regularize(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales a Hessian to mean diagonal 1 and decouples channels that never fired.

    Args:
        hessian: [K, K] sum of x^T x.

    Returns:
        (hessian of mean diagonal 1 over the live channels, dead [K] bool). Dead channels get diagonal 1.
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    live = jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(dead, 0.0, diagonal)) / live
    scaled = hessian / jnp.where(mean > 0, mean, 1.0)
    keep = jax.lax.expand_dims(~dead, [1]) & jax.lax.expand_dims(~dead, [0])
    return jnp.where(keep, scaled, 0.0) + jnp.diag(dead.astype(jnp.float32)), dead


def factor_upper(hessian: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Factors H + damping I = R R^T with R upper triangular, raising the damping until the factor exists.

    R is the Cholesky factor of the reversed matrix, reversed back; its inverse is the upper factor of H^-1 that GPTQ
    walks along.

    Args:
        hessian: [K, K] of mean diagonal 1.
        damping: the first damping tried, as a part of the mean diagonal.

    Returns:
        (R, damping used). Should every retry fail, R is the identity and the damping infinite: round-to-nearest.
    """
    eye = jnp.eye(hessian.shape[0])
    reverse = hessian[::-1, ::-1]

    def factor(amount):
        return jnp.linalg.cholesky(reverse + amount * eye)

    def failed(carry):
        lower, _, tries = carry
        return ~jnp.all(jnp.isfinite(lower)) & (tries < RETRIES)

    def retry(carry):
        _, amount, tries = carry
        return factor(amount * 4), amount * 4, tries + 1

    first = jnp.asarray(damping, jnp.float32)
    lower, used, _ = jax.lax.while_loop(failed, retry, (factor(first), first, jnp.zeros((), jnp.int32)))
    good = jnp.all(jnp.isfinite(lower))
    return jnp.where(good, lower[::-1, ::-1], eye), jnp.where(good, used, jnp.inf)


def diagonal_blocks(matrix: jax.Array, size: int) -> jax.Array:
    """The square blocks along a diagonal.

    Args:
        matrix: [K, K].
        size: their size; it divides K.

    Returns:
        [K / size, size, size].

    >>> diagonal_blocks(jnp.eye(4), 2).tolist()
    [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]
    """
    count = matrix.shape[0] // size
    place = jnp.arange(count)
    return matrix.reshape(count, size, count, size)[place, :, place]
