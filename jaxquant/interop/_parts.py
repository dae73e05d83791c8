"""Fused and stacked kernels, float or QArrays: cutting and joining along the outputs, stacking experts."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.arrays._qarray import QArray


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The logical shape."""
    return tuple(leaf.shape)


def cut_outputs(where: str, leaf: Any, start: int, stop: int) -> Any:
    """The outputs `start` to `stop` (last axis) of a kernel or bias.

    Raises:
        ValueError: a block of scales lies across the cut.
    """
    if not isinstance(leaf, QArray):
        return leaf[..., start:stop]
    outputs = leaf.trailing[-1]

    def cut(grid: Any) -> Any:
        columns = grid.shape[-1]
        if columns == 1:
            return grid
        size = outputs // columns
        if start % size or stop % size:
            raise ValueError(f"{where}: blocks of {size} outputs lie across the cut {start}:{stop}")
        return grid[..., start // size : stop // size]

    return dataclasses.replace(jax.tree.map(cut, leaf), trailing=(*leaf.trailing[:-1], stop - start))


def join_outputs(where: str, leaves: Sequence[Any]) -> Any:
    """Joins kernels or biases along the outputs; undoes `cut_outputs`.

    Raises:
        ValueError: they are not quantized alike, or an input order or activation scale differs.
    """
    first = leaves[0]
    if not isinstance(first, QArray):
        return np.concatenate(leaves, -1)
    outputs = sum(leaf.trailing[-1] for leaf in leaves)
    alike = [dataclasses.replace(leaf, trailing=(*leaf.trailing[:-1], outputs)) for leaf in leaves]
    _check_alike(where, alike)

    def join(*grids: Any) -> Any:
        columns = {grid.shape[-1] for grid in grids}
        if columns != {1}:
            return np.concatenate(grids, -1)
        if all(np.array_equal(grid, grids[0]) for grid in grids):
            return grids[0]
        raise ValueError(f"{where}: its parts have scales or input orders of their own, which one module cannot hold")

    return jax.tree.map(join, *alike)


def stack_leaves(where: str, leaves: Sequence[Any]) -> Any:
    """Stacks kernels, biases or QArrays along a new first axis.

    Raises:
        ValueError: they are not alike.
    """
    if isinstance(leaves[0], QArray):
        _check_alike(where, leaves)
        return jax.tree.map(lambda *parts: np.stack(parts), *leaves)
    if len({shape_of(leaf) for leaf in leaves}) > 1:
        raise ValueError(f"{where}: the parts to stack have the shapes {[shape_of(leaf) for leaf in leaves]}")
    return np.stack(leaves)


def unstack_leaf(leaf: Any) -> list[Any]:
    """Undoes `stack_leaves`."""
    return [jax.tree.map(operator.itemgetter(index), leaf) for index in range(leaf.shape[0])]


def _check_alike(where: str, leaves: Sequence[QArray]) -> None:
    kinds = {str(jax.tree.structure(leaf)) for leaf in leaves}
    if len(kinds) > 1:
        raise ValueError(f"{where}: its parts are quantized differently: {' and '.join(map(repr, leaves[:2]))}")
