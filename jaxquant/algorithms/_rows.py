"""Visiting rows one after the other, each making up for those before it: the inner loop of GPTQ and of descent."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Rows written out as one step. On a GPU one row alone is some kernel launches; on a CPU nothing is won beyond two, and
# eight take half as long again to compile.
UNROLLED = {"gpu": 8, "cpu": 2}

Visit = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def visit_rows(rows: jax.Array, coupling: jax.Array, each: Any, visit: Visit) -> tuple[jax.Array, jax.Array]:
    """Visits the rows of a tile in order; what a row leaves is subtracted, coupled, from the rows behind it.

    Args:
        rows: [T, N] float32.
        coupling: [T, T]; row i loses coupling[j, i] times what row j left, for each j before it.
        each: tree of arrays of leading dimension T, of which `visit` gets its row's.
        visit: (row [1, N], its part of `each`, leading dimension 1) -> (result, what it leaves), both [1, N].

    Returns:
        (results [T, N], what the rows left [T, N]).

    >>> rows, ones = jnp.asarray([[1.0], [5.0]]), jnp.ones((2, 2))
    >>> visit_rows(rows, ones, (), lambda row, _: (row, row))[0].tolist()
    [[1.0], [4.0]]
    """
    count = rows.shape[0]
    size = math.gcd(count, UNROLLED.get(jax.default_backend(), UNROLLED["gpu"]))

    def visit_some(rest: jax.Array, scanned: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, along, some = scanned
        own = jax.lax.dynamic_slice_in_dim(rest, start, size)
        inner = jax.lax.dynamic_slice_in_dim(along, start, size, axis=1)
        results, left = [], []
        for i in range(size):
            row = own[i : i + 1]
            for j in range(i):
                row = row - inner[j, i] * left[j]
            result, remains = visit(row, jax.tree.map(lambda leaf, at=i: leaf[at : at + 1], some))
            results.append(result)
            left.append(remains)
        lost = jnp.einsum("st,sn->tn", along, jnp.concatenate(left), precision="high")
        return rest - lost, (jnp.concatenate(results), jnp.concatenate(left))

    split = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), (coupling, each))
    _, (results, left) = jax.lax.scan(visit_some, rows, (jnp.arange(0, count, size), *split))
    return results.reshape(rows.shape), left.reshape(rows.shape)
