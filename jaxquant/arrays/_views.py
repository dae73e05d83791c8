"""Views of a quantized weight: the QArray of the transposed, reshaped, sliced or gathered weight, without unpacking.

Every leaf of a QArray has the weight's rank, so a view acts on all leaves alike: on the codes in units of elements (of
bytes along the packed axis), on the grids in units of cells. Where a cell boundary does not survive, the grid is
refined by repetition; where the packing does not survive, codes are unpacked to one byte each (`unpacked`). What no
QArray can stand for raises `Unrepresentable`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays._qarray import QArray, codes_of

GRIDS = ("scale", "zero_point", "pre_scale", "act_scale", "act_zero_point", "perm")


_REMEDY = (
    "slice another dimension, give the weight another axis with Rule(pattern, spec, axis=...), or leave it in float"
    " with Rule(pattern, None)"
)


class Unrepresentable(Exception):
    """No QArray stands for the result; the message says why."""


def remake(q: QArray, shape: Sequence[int], axis: tuple[int, ...], padded: int, leaves: dict) -> QArray:
    """Builds the QArray of a view from its leaves, finding which leading dimensions `scale` holds in full.

    Args:
        q: where everything else comes from.
        shape: the view's logical shape.
        axis: the view's contracting axes, the packed one last.
        padded: length of the packed axis in codes.
        leaves: `qvalue` and every name of `GRIDS`.

    Returns:
        The QArray.
    """
    first = len(shape) + min(axis)
    lead = next((d for d in range(first) if leaves["scale"].shape[d] != shape[d]), first)
    return dataclasses.replace(q, **leaves, axis=axis, trailing=tuple(shape[lead:]), padded=padded)


def map_grids(q: QArray, fn: Callable[[jax.Array], jax.Array]) -> dict:
    """Applies a function to every grid that there is: the leaves by name."""
    return {name: None if getattr(q, name) is None else fn(getattr(q, name)) for name in GRIDS}


def packed_dim(q: QArray) -> int:
    """The dimension whose codes share bytes, counted from the front."""
    return q.ndim + q.axis[-1]


def code_shape(q: QArray) -> tuple[int, ...]:
    """The logical shape with group padding included."""
    return tuple(q.padded if d == packed_dim(q) else size for d, size in enumerate(q.shape))


def refine(grid: jax.Array, dim: int, cells: int) -> jax.Array:
    """Repeats a grid along one dimension until it has `cells` cells there.

    >>> refine(jnp.asarray([1, 2]), 0, 4).tolist()
    [1, 1, 2, 2]
    """
    held = grid.shape[dim]
    return grid if held == cells else jnp.repeat(grid, cells // held, axis=dim, total_repeat_length=cells)


def unpacked(q: QArray) -> QArray:
    """The same weight with one code a byte and no group padding: the last resort before a float copy.

    Raises:
        Unrepresentable: the codes index a table, so that no eight-bit format reads them.
    """
    if q.format.kind == "table":
        raise Unrepresentable(f"codes of {q.qtype} have no form outside their packed bytes")
    dim, length = packed_dim(q), q.shape[packed_dim(q)]
    codes = jax.lax.slice_in_dim(codes_of(q), 0, length, axis=dim)
    leaves = map_grids(q, lambda grid: _slice_grid(grid, dim, q.padded, 0, length))
    name = "int8" if q.format.kind == "int" else "uint8"
    qtype = name if q.format.packed else q.qtype
    return dataclasses.replace(q, qvalue=codes, **leaves, qtype=qtype, padded=length)


def astype(q: QArray, dtype: jnp.dtype) -> QArray:
    """Changes the logical dtype; codes and scales stay."""
    return dataclasses.replace(q, dtype=jnp.dtype(dtype))


def multiply(q: QArray, factor: jax.Array | float) -> QArray:
    """Multiplies a weight by a scalar, in its scale; a finer scale dtype keeps the product's digits."""
    return dataclasses.replace(q, scale=q.scale.astype(jnp.float32) * jnp.asarray(factor, jnp.float32))


def transpose(q: QArray, permutation: Sequence[int]) -> QArray:
    """Permutes the dimensions."""
    order, rank = tuple(permutation), q.ndim
    axis = tuple(order.index(rank + a) - rank for a in q.axis)
    leaves = map_grids(q, lambda grid: jnp.transpose(grid, order))
    leaves["qvalue"] = jnp.transpose(q.qvalue, order)
    return remake(q, [q.shape[d] for d in order], axis, q.padded, leaves)


def broadcast_in_dim(q: QArray, shape: Sequence[int], dims: Sequence[int]) -> QArray:
    """Adds and stretches dimensions as `lax.broadcast_in_dim` does; only codes are stretched.

    Raises:
        Unrepresentable: the packed axis would be stretched.
    """
    rank, packed = len(shape), dims[packed_dim(q)]
    if shape[packed] != q.shape[packed_dim(q)]:
        raise Unrepresentable("it stretches the packed axis")
    codes = [q.qvalue.shape[dims.index(d)] if d == packed else size for d, size in enumerate(shape)]
    spots = {d: i for i, d in enumerate(dims)}
    leaves = map_grids(q, lambda grid: grid.reshape([grid.shape[spots[d]] if d in spots else 1 for d in range(rank)]))
    leaves["qvalue"] = jax.lax.broadcast_in_dim(q.qvalue, codes, dims)
    axis = tuple(dims[q.ndim + a] - rank for a in q.axis)
    return remake(q, shape, axis, q.padded, leaves)


def slice_dim(q: QArray, dim: int, start: int, limit: int, stride: int = 1) -> QArray:
    """Slices one dimension.

    Raises:
        ValueError: the cut falls inside a byte of the packed axis.
        Unrepresentable: an act-order weight is cut along its input order.
    """
    size = q.shape[dim]
    if (start, limit, stride) == (0, size, 1):
        return q
    packed = dim == packed_dim(q)
    if q.perm is not None and q.perm.shape[dim] > 1 and dim == packed_dim(q):
        raise Unrepresentable("it cuts an act-order weight along its input order")
    length = q.padded if packed else size
    end = length if packed and limit == size else limit  # the padding stays with the last slice
    qvalue = _slice_packed(q, start, end, stride) if packed else _slice(q.qvalue, dim, start, end, stride)
    leaves = map_grids(q, lambda grid: _slice_grid(grid, dim, length, start, end, stride))
    shape = [len(range(start, limit, stride)) if d == dim else n for d, n in enumerate(q.shape)]
    return remake(q, shape, q.axis, end - start if packed else q.padded, leaves | {"qvalue": qvalue})


def _slice(x: jax.Array, dim: int, start: int, limit: int, stride: int = 1) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, limit, stride, axis=dim)


def _slice_packed(q: QArray, start: int, limit: int, stride: int) -> jax.Array:
    dim, bits = packed_dim(q), q.format.bits
    if not q.format.packed and stride == 1:
        return _slice(q.qvalue, dim, start, limit)
    aligned = 8 // math.gcd(8, bits)
    if stride != 1 or start % aligned:
        raise ValueError(
            f"slices [{start}:{limit}:{stride}] of dimension {dim}, along which {q.qtype} codes share bytes; a slice"
            f" may start at multiples of {aligned} with stride 1: {_REMEDY}"
        )
    bytes_ = _slice(q.qvalue, dim, start * bits // 8, min(-(-limit // 8) * bits + bits, q.qvalue.shape[dim]))
    wanted = -(-(limit - start) // 8) * bits
    missing = max(0, wanted - bytes_.shape[dim])
    return _slice(jnp.pad(bytes_, [(0, missing if d == dim else 0) for d in range(bytes_.ndim)]), dim, 0, wanted)


def _slice_grid(grid: jax.Array, dim: int, length: int, start: int, limit: int, stride: int = 1) -> jax.Array:
    cells = grid.shape[dim]
    if cells == 1:
        return grid
    size = math.gcd(length // cells, start, limit) if stride == 1 else 1
    return _slice(refine(grid, dim, length // size), dim, start // size, -(-limit // size), stride)


def dynamic_slice(q: QArray, starts: Sequence[jax.Array], sizes: Sequence[int]) -> QArray:
    """Slices at traced places, along dimensions that are not packed.

    Raises:
        ValueError: the packed axis is cut.
    """
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == q.shape[dim]:
            continue
        if dim == packed_dim(q):
            raise ValueError(
                f"slices {size} of {q.shape[dim]} of dimension {dim} at a traced place, along which {q.qtype} codes"
                f" share bytes: {_REMEDY}"
            )
        q = _map_dim(q, dim, lambda x, d=dim, s=start, n=size: jax.lax.dynamic_slice_in_dim(x, s, n, axis=d), size)
    return q


def take(q: QArray, indices: jax.Array, dim: int, mode: Any = "fill") -> QArray:
    """Gathers along dimension `dim`, which the dimensions of `indices` replace; negative indices are out of range.

    Out-of-range indices give what `mode` says: filled scales are NaN.

    Raises:
        Unrepresentable: `dim` is the packed axis.
    """
    if dim == packed_dim(q):
        raise Unrepresentable("it gathers along the packed axis")

    def gather(x: jax.Array) -> jax.Array:
        whole = (slice(None),) * dim
        how = mode if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1 else "clip"
        return x.at[(*whole, indices)].get(mode=how, wrap_negative_indices=False)

    leaves = map_grids(q, lambda grid: gather(refine(grid, dim, q.shape[dim]))) | {"qvalue": gather(q.qvalue)}
    shape = [*q.shape[:dim], *indices.shape, *q.shape[dim + 1 :]]
    axis = tuple(a if q.ndim + a > dim else a - indices.ndim + 1 for a in q.axis if q.ndim + a != dim)
    return remake(q, shape, axis, q.padded, leaves)


def _map_dim(q: QArray, dim: int, fn: Callable[[jax.Array], jax.Array], size: int) -> QArray:
    """Applies a function of one unpacked dimension to every leaf that varies along it."""

    def on_grid(grid: jax.Array) -> jax.Array:
        return grid if grid.shape[dim] == 1 else fn(refine(grid, dim, q.shape[dim]))

    shape = [size if d == dim else n for d, n in enumerate(q.shape)]
    return remake(q, shape, q.axis, q.padded, map_grids(q, on_grid) | {"qvalue": fn(q.qvalue)})


def concatenate(parts: Sequence[QArray], dim: int) -> QArray:
    """Joins weights of one format along a dimension.

    Raises:
        Unrepresentable: formats, paddings or byte boundaries do not fit together.
    """
    head = parts[0]
    packed = dim == packed_dim(head)
    same = all(
        (p.qtype, p.axis, p.activation, p.layout) == (head.qtype, head.axis, head.activation, head.layout)
        and all((getattr(p, name) is None) == (getattr(head, name) is None) for name in GRIDS)
        for p in parts
    )
    if not same or head.perm is not None:
        raise Unrepresentable("it joins weights of different formats")
    if packed and any(p.padded % 8 or p.padded != p.shape[dim] for p in parts):
        raise Unrepresentable("it joins weights along an axis whose ends do not fill a byte")
    lengths = [code_shape(p)[dim] for p in parts]

    def join(name: str) -> jax.Array | None:
        grids = [getattr(p, name) for p in parts]
        if grids[0] is None:
            return None
        if len({grid.dtype for grid in grids}) > 1:
            grids = [grid.astype(jnp.float32) for grid in grids]
        for d in range(head.ndim):
            if d != dim:
                cells = math.lcm(*(grid.shape[d] for grid in grids))
                grids = [refine(grid, d, cells) for grid in grids]
        size = math.gcd(*(n // grid.shape[dim] for n, grid in zip(lengths, grids, strict=True)))
        return jnp.concatenate([refine(g, dim, n // size) for n, g in zip(lengths, grids, strict=True)], axis=dim)

    leaves = {name: join(name) for name in GRIDS}
    leaves["qvalue"] = jnp.concatenate([p.qvalue for p in parts], axis=dim)
    shape = [sum(p.shape[dim] for p in parts) if d == dim else n for d, n in enumerate(head.shape)]
    return remake(head, shape, head.axis, sum(lengths) if packed else head.padded, leaves)


def with_leading(q: QArray) -> QArray:
    """Makes dimension 0 one that `scan`, `vmap` and indexing can slice: every leaf holds it in full.

    Raises:
        Unrepresentable: it is the packed axis.
    """
    if packed_dim(q) == 0:
        raise Unrepresentable("it slices the packed axis")
    leaves = map_grids(q, lambda grid: refine(grid, 0, q.shape[0])) | {"qvalue": q.qvalue}
    return remake(q, q.shape, tuple(a for a in q.axis if a != -q.ndim), q.padded, leaves)


def reshape(q: QArray, shape: Sequence[int]) -> QArray:
    """Reshapes in row-major order.

    Raises:
        Unrepresentable: neither packing nor padding nor input order survives.
    """
    shape = tuple(shape)
    if 0 in shape or not shape:
        raise Unrepresentable("it reshapes to an empty or scalar shape")
    groups = common_factors(q.shape, shape)
    packed = packed_dim(q)
    old, new = next(pair for pair in groups if packed in pair[0])
    moved = [q.shape[d] for d in old if q.shape[d] > 1] != [shape[d] for d in new if shape[d] > 1]
    if moved and q.perm is not None:
        raise Unrepresentable("it reshapes an act-order weight along its input order")
    if moved and (q.padded != q.shape[packed] or (q.format.packed and not _stays_packed(q, old, new, shape))):
        return reshape(unpacked(q), shape)
    # the packed axis is the last that counts of its group, or the place it had among ones
    home = max((d for d in new if shape[d] > 1), default=new[-1] if new else None)
    if home is None:
        raise Unrepresentable("it drops the packed axis")
    if not moved and q.shape[packed] > 1:
        home = [d for d in new if shape[d] > 1][[d for d in old if q.shape[d] > 1].index(packed)]
    contracting = {
        d
        for before, after in groups
        if any(q.shape[o] > 1 and o - q.ndim in q.axis for o in before)
        for d in after
        if shape[d] > 1
    }
    if not moved and len(old) > 1:  # sizes survive one for one, and so do their roles
        before, after = [d for d in old if q.shape[d] > 1], [d for d in new if shape[d] > 1]
        contracting -= {n for o, n in zip(before, after, strict=True) if o - q.ndim not in q.axis}
    axis = (*(d - len(shape) for d in sorted(contracting - {home})), home - len(shape))
    length = q.padded if not moved else shape[home]
    stored = [length if d == home else n for d, n in enumerate(shape)]
    leaves = map_grids(q, lambda grid: _reshape_grid(grid, code_shape(q), stored, groups))
    codes = [q.qvalue.shape[packed] * length // q.padded if d == home else n for d, n in enumerate(shape)]
    return remake(q, shape, axis, length, leaves | {"qvalue": q.qvalue.reshape(codes)})


def _stays_packed(q: QArray, old: list[int], new: list[int], shape: tuple[int, ...]) -> bool:
    last_old = max((d for d in old if q.shape[d] > 1), default=old[-1])
    last_new = max((d for d in new if shape[d] > 1), default=None)
    return last_old == packed_dim(q) and last_new is not None and q.padded % 8 == 0 and shape[last_new] % 8 == 0


def common_factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the least runs of dimensions of equal size on both sides.

    >>> common_factors((6, 8), (2, 3, 8))
    [([0], [0, 1]), ([1], [2])]
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(before), j + len(after)
        while (a := math.prod(old[d] for d in before)) != (b := math.prod(new[d] for d in after)):
            if a < b:
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        groups.append((before, after))
    return groups


def _reshape_grid(grid: jax.Array, old: Sequence[int], new: Sequence[int], groups: list) -> jax.Array:
    """Reshapes a grid along with its tensor, refined as little as the new dimensions need."""
    fine, cells = list(grid.shape), [1] * len(new)
    for before, after in groups:
        held, sizes, wanted = [grid.shape[d] for d in before], [old[d] for d in before], [new[d] for d in after]
        run = _constant_run(sizes, held)
        while True:  # the longest run of equal elements that cells on both sides can say
            shorter = _fit_run(sizes, _fit_run(wanted, run))
            if shorter == run:
                break
            run = shorter
        for d, count in zip(before, _cells_of_run(sizes, run), strict=True):
            fine[d] = count
        for d, count in zip(after, _cells_of_run(wanted, run), strict=True):
            cells[d] = count
    for d, count in enumerate(fine):
        grid = refine(grid, d, count)
    return grid.reshape(cells)


def _constant_run(sizes: Sequence[int], cells: Sequence[int]) -> int:
    """How many consecutive elements share a value; all of them when every dimension has one cell."""
    run = 1
    for size, count in zip(reversed(sizes), reversed(cells), strict=True):
        run *= size // count
        if count > 1:
            break
    return run


def _fit_run(sizes: Sequence[int], run: int) -> int:
    done = 1
    for size in reversed(sizes):
        if (run // done) % size:
            return done * math.gcd(run // done, size)
        done *= size
    return done


def _cells_of_run(sizes: Sequence[int], run: int) -> list[int]:
    cells = []
    for size in reversed(sizes):
        inner = size if run % size == 0 else run
        cells.append(size // inner)
        run //= inner
    return cells[::-1]
