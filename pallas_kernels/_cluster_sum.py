"""Partial sums of a cluster's blocks, added through distributed shared memory in a fixed order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def add_over_cluster(
    total: jax.Array, count: jax.Array, store: Callable, *, axis: str, split: int, chunks: int, partial, arrived, free
) -> None:
    """Add what the blocks of a cluster hold of a tile; they take turns to own its chunks of columns.

    Args:
      total: this warpgroup's sums `[64, columns]`, float32 or int32.
      count: tiles that this block has done before.
      store: called in the owner of a chunk as `store(sum, first column)`.
      axis: the cluster's axis.
      split: blocks along it.
      chunks: pieces of the columns.
      partial: shared memory `[split - 1, 64, columns / chunks]` float32, of this warpgroup (int32 sums travel as bits).
      arrived: its barrier that a peer's sums complete, of `split - 1` arrivals.
      free: its cluster barrier that `partial` has been read everywhere.
    """
    rank, width = lax.axis_index(axis), total.shape[1] // chunks
    pl.when(count > 0)(lambda: plgpu.barrier_wait(free))
    owners = [lax.rem(count * chunks + q, jnp.int32(split)) for q in range(chunks)]
    pieces = [total[:, q * width : (q + 1) * width] for q in range(chunks)]
    for owner, piece in zip(owners, pieces, strict=True):

        @pl.when(rank != owner)
        def _send(owner=owner, piece=piece):
            place = lax.rem(rank - owner - 1 + split, jnp.int32(split))
            plgpu.async_store_smem(
                _bits(piece, jnp.float32), partial.at[place], arrived, cluster_idx=owner, cluster_dim=axis
            )

    for q, (owner, piece) in enumerate(zip(owners, pieces, strict=True)):

        @pl.when(rank == owner)
        def _add(piece=piece, q=q):
            plgpu.barrier_wait(arrived)
            value = piece
            for place in range(split - 1):
                value = value + _bits(plgpu.load(partial.at[place], layout=plgpu.Layout.WGMMA), value.dtype)
            store(value, q * width)

    plgpu.commit_smem()  # All lanes have read before one of them says so.
    plgpu.barrier_arrive(free)


def _bits(value: jax.Array, dtype) -> jax.Array:
    return value if value.dtype == dtype else lax.bitcast_convert_type(value, dtype)
