"""How the columns of a gate and an up projection lie side by side, so that one thread of the kernel holds both."""

import jax
import jax.numpy as jnp

ROWS = 8  # the rows of a wgmma accumulator's half: a thread holds row r of one half and row r of the next


def interleave(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Merge the columns of two projections by eights: what `activation="silu_mul"` takes, before packing.

    Codes, scales and zero points are all merged so.

    Args:
      gate: `[..., F]`, F a multiple of 8.
      up: like `gate`.

    Returns:
      `[..., 2 F]`: eight columns of gate, the same eight of up, and so on.

    Raises:
      ValueError: if the shapes differ or F is not a multiple of 8.

    >>> import jax.numpy as jnp
    >>> interleave(jnp.zeros(16), jnp.ones(16))[4:12].tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    """
    if gate.shape != up.shape or gate.shape[-1] % ROWS:
        raise ValueError(
            f"gate has shape {gate.shape} and up {up.shape}; both must agree, in multiples of {ROWS} columns"
        )
    *lead, columns = gate.shape
    halves = [a.reshape(*lead, columns // ROWS, 1, ROWS) for a in (gate, up)]
    return jnp.concatenate(halves, axis=-2).reshape(*lead, 2 * columns)


def separate(merged: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undo `interleave`: `[..., 2 F]` to gate and up, `[..., F]` each.

    >>> import jax.numpy as jnp
    >>> gate, up = separate(interleave(jnp.zeros(16), jnp.ones(16)))
    >>> float(gate.max()), float(up.min())
    (0.0, 1.0)
    """
    *lead, columns = merged.shape
    halves = merged.reshape(*lead, columns // (2 * ROWS), 2, ROWS)
    gate, up = halves[..., 0, :], halves[..., 1, :]
    return gate.reshape(*lead, columns // 2), up.reshape(*lead, columns // 2)
