"""How a product of rows with weights behaves under `vmap`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def foldable(product: Callable) -> Callable:
    """Give a product its vmap rule: batched rows fold into one product, batched weights are taken one after another.

    Args:
      product: called as `product(rows, weights)`: a tuple of arrays `[M or 1, ...]` or None, and a tuple of pytrees;
        it gives a tuple of `[M, N]`.

    Returns:
      The same function.
    """

    @jax.custom_batching.custom_vmap
    def multiply(rows, weights):
        return product(rows, weights)

    @multiply.def_vmap
    def batched(axis_size, in_batched, rows, weights):
        every = (True,) * len(weights)
        if not any(jax.tree.leaves(in_batched[1])):
            m = next(row.shape[-2] for row in rows if row is not None)
            outs = multiply(tuple(map(lambda a, flag: _folded(a, flag, axis_size, m), rows, in_batched[0])), weights)
            return tuple(out.reshape(axis_size, m, out.shape[-1]) for out in outs), every
        leaves, tree = jax.tree.flatten((rows, weights))
        flags = jax.tree.leaves(in_batched)

        def one(slices):
            held = [s if flag else leaf for s, leaf, flag in zip(slices, leaves, flags, strict=True)]
            return multiply(*tree.unflatten(held))

        return jax.lax.map(one, [leaf if flag else None for leaf, flag in zip(leaves, flags, strict=True)]), every

    return multiply


def _folded(array: jax.Array | None, is_batched: bool, axis_size: int, m: int) -> jax.Array | None:
    """An operand of every row, batch and rows one dimension."""
    if array is None:
        return None
    array = array if is_batched else array[None]
    return jnp.broadcast_to(array, (axis_size, m, array.shape[-1])).reshape(axis_size * m, array.shape[-1])
