"""The tiles of a launch: those of several weights numbered through, taken in turn by persistent clusters."""

import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class WeightTiles:
    """Output tiles of several weights, counted on from one weight to the next; each belongs to one.

    Attributes:
      firsts: the first tile of each weight.
      count: tiles in all.
    """

    def __init__(self, counts: Sequence[int]):
        """Number them.

        Args:
          counts: tiles of each weight.
        """
        self.firsts = tuple(itertools.accumulate(counts[:-1], initial=0))
        self.count = sum(counts)

    def within(self, tile, visit: Callable):
        """Call `visit(weight, first tile of that weight)` for the weight that a tile belongs to.

        Returns:
          What `visit` returns, if there is only one weight.
        """
        if len(self.firsts) == 1:
            return visit(0, 0)
        for weight, (first, end) in enumerate(itertools.zip_longest(self.firsts, self.firsts[1:])):

            @pl.when(tile >= first if end is None else (tile >= first) & (tile < end))
            def _here(weight=weight, first=first):
                visit(weight, first)

        return None


def for_each_tile(plan, split_axis: str, visit: Callable):
    """Call `visit(count, m_tile, n_tile, first_step, last_step, position)` for this cluster's tiles.

    Args:
      plan: has the `shape` of the grid of tiles, `num_clusters`, `tile` from an index to a block's tile, and `steps`
        from a rank to the first and the last step along the inputs that are its own.
      split_axis: of the cluster, whose blocks split the inputs.
      visit: returns the position after the tile: how many stages of the ring have gone by.

    Returns:
      The number of tiles, and the position after the last.
    """
    cluster, rank = lax.axis_index("tile"), lax.axis_index(split_axis)
    first, last = plan.steps(rank)
    count = lax.div(plan.shape[0] * plan.shape[1] - cluster + plan.num_clusters - 1, plan.num_clusters)

    def step(i, position):
        m_tile, n_tile = plan.tile(cluster + i * plan.num_clusters, rank)
        return visit(i, m_tile, n_tile, first, last, position)

    return count, lax.fori_loop(0, count, step, jnp.int32(0))
