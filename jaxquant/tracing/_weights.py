"""Quantized weights as the interpreter carries them: alone, or as the quantized term of a sum."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays import _views
from jaxquant.arrays._outliers import OutlierArray, dequantize_weight
from jaxquant.arrays._packing import plain
from jaxquant.arrays._qarray import QArray


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized weight on its way through a program.

    Attributes:
        array: the weight, or the view of it that the program has made.
        path: where its parameter lies in the tree.
    """

    array: QArray | OutlierArray
    path: str


@dataclasses.dataclass(frozen=True)
class Shifted:
    """`weight + delta + sum of a @ b`, kept as a sum so that products with it are sums of products (LoRA).

    Attributes:
        weight: the quantized term.
        delta: float array of the weight's shape, or None.
        factors: pairs (a [K, r], b [r, N]).
    """

    weight: Weight
    delta: jax.Array | None
    factors: tuple[tuple[jax.Array, jax.Array], ...] = ()

    @property
    def path(self) -> str:
        """The path of the quantized term."""
        return self.weight.path

    def total_delta(self, dtype: jnp.dtype) -> jax.Array:
        """The float terms added up."""
        parts = [self.delta] if self.delta is not None else []
        parts += [jnp.matmul(a, b) for a, b in self.factors]
        return sum((part.astype(dtype) for part in parts[1:]), parts[0].astype(dtype))


jax.tree_util.register_dataclass(Weight, data_fields=["array"], meta_fields=["path"])
jax.tree_util.register_dataclass(Shifted, data_fields=["weight", "delta", "factors"], meta_fields=[])


def dense(value: Weight | Shifted) -> jax.Array:
    """The float array that a weight, or a sum with one, stands for."""
    if isinstance(value, Weight):
        return dequantize_weight(plain(value.array))
    weight = dequantize_weight(plain(value.weight.array))
    return weight + value.total_delta(weight.dtype)


Cut = tuple[Weight, Any, Callable[[Weight], Weight]]


def cut_shards(value: Weight, spec: Any, mesh: Any) -> Cut | None:
    """Cuts a weight for `shard_map`: codes, grids and float rows alike.

    Args:
        value: the weight.
        spec: the partition of its dimensions.
        mesh: the mesh.

    Returns:
        (the weight with grids fine enough, the partition of every leaf, what gives a shard its own sizes); None where a
        cut would fall inside a byte, or between outlier channels.
    """
    names = [*spec, *([None] * (value.array.ndim - len(spec)))]
    if isinstance(value.array, OutlierArray):
        base = _cut_base(value.array.base, value.path, names, mesh)
        return None if base is None else _cut_outliers(value.array, value.path, names, base)
    return _cut_base(value.array, value.path, names, mesh)


def _grid_spec(grid: jax.Array, names: list) -> Any:
    """The partition of a grid: that of the weight, where it varies."""
    return jax.sharding.PartitionSpec(*(n if size > 1 else None for n, size in zip(names, grid.shape, strict=True)))


def _cut_outliers(w: OutlierArray, path: str, names: list, base: Cut) -> Cut | None:
    """Adds the float rows, in full along their channels, to a cut of the base."""
    if any(names[a] for a in w.axis):
        return None
    ready, specs, localize = base

    def put(base: Weight, rows: Any, index: Any) -> Weight:
        return Weight(dataclasses.replace(w, base=base.array, rows=rows, index=index), path)

    def localize_all(local: Any) -> Weight:
        return put(localize(Weight(local.array.base, path)), local.array.rows, local.array.index)

    specs = put(specs, _grid_spec(w.rows, names), _grid_spec(w.index, names))
    return put(ready, w.rows, w.index), specs, localize_all


def _cut_base(array: QArray, path: str, names: list, mesh: Any) -> Cut | None:
    q = plain(array)
    cuts = [math.prod(mesh.shape[n] for n in ((s,) if isinstance(s, str) else s or ())) for s in names]
    packed = _views.packed_dim(q)
    aligned = q.padded == q.shape[packed] and (not q.format.packed or q.padded // cuts[packed] % 8 == 0)
    if cuts[packed] > 1 and (q.perm is not None or not aligned):
        return None

    def cut_grid(grid: jax.Array | None) -> jax.Array | None:
        if grid is None:
            return None
        for d, cut in enumerate(cuts):
            cells = grid.shape[d]
            grid = grid if cells == 1 else _views.refine(grid, d, math.lcm(cells, cut))
        return grid

    grids = {name: cut_grid(getattr(q, name)) for name in _views.GRIDS}
    specs = {name: None if grid is None else _grid_spec(grid, names) for name, grid in grids.items()}
    specs |= {"qvalue": jax.sharding.PartitionSpec(*names)}

    def localize(local: Weight) -> Weight:
        ends = cuts[len(cuts) - len(q.trailing) :]
        trailing = tuple(size // cut for size, cut in zip(q.trailing, ends, strict=True))
        return Weight(dataclasses.replace(local.array, trailing=trailing, padded=q.padded // cuts[packed]), path)

    ready = dataclasses.replace(q, **grids)
    return Weight(ready, path), Weight(dataclasses.replace(ready, **specs), path), localize
