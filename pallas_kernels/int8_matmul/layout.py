"""The layout of an 8-bit weight: K-major, as wgmma wants it in shared memory, padded to whole 128 x 128 blocks."""

import jax
import jax.numpy as jnp

BLOCK = 128


@jax.jit
def pack(codes: jax.Array) -> jax.Array:
    """Lay the codes of a weight out for the kernel.

    Args:
        codes: int8 or float8_e4m3fn [..., K, N].

    Returns:
        [..., ceil(N / 128) * 128, ceil(K / 128) * 128] of the same dtype, zeros where padded.

    >>> import jax.numpy as jnp
    >>> pack(jnp.zeros((300, 64), jnp.int8)).shape
    (128, 384)
    """
    k, n = codes.shape[-2:]
    padding = [(0, 0)] * (codes.ndim - 2) + [(0, -n % BLOCK), (0, -k % BLOCK)]
    return jnp.pad(codes.swapaxes(-1, -2), padding)


def unpack(weight: jax.Array, k: int, n: int) -> jax.Array:
    """Undo `pack`.

    Args:
        weight: a packed weight [..., padded N, padded K].
        k: inputs.
        n: outputs.

    Returns:
        [..., K, N] of the same dtype.

    >>> import jax.numpy as jnp
    >>> codes = jnp.arange(12, dtype=jnp.int8).reshape(3, 4)
    >>> bool((unpack(pack(codes), 3, 4) == codes).all())
    True
    """
    return weight[..., :n, :k].swapaxes(-1, -2)


def output_sums(weight: jax.Array) -> jax.Array:
    """Sum the int8 codes of each output: what the zero point of an activation is multiplied by.

    Args:
        weight: packed int8 [..., N, K].

    Returns:
        int32 [..., N].

    >>> import jax.numpy as jnp
    >>> output_sums(pack(jnp.ones((3, 4), jnp.int8)))[:5].tolist()
    [3, 3, 3, 3, 0]
    """
    return jnp.sum(weight, axis=-1, dtype=jnp.int32)
