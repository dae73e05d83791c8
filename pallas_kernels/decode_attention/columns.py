"""Reductions over the rows of an accumulator of a warpgroup: the tokens of a tile, for every query head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.decode_attention.operand import TILE, Lane

PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_WARPS = 4
_COMBINE = {"max": arith.maximumf, "add": arith.addf}


def over_rows(op: str, x: jax.Array, scratch) -> jax.Array:
    """The maximum ("max") or sum ("add") of each column of x.

    The four warps exchange theirs with one barrier: between two calls on the same memory there must be another.

    Args:
        op: "max" or "add".
        x: float32 [rows, N] in the layout of an accumulator.
        scratch: float32 [4 N] of shared memory.

    Returns:
        float32 [N].
    """

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType()), return_type=_per_column(x))
    def reduce(_, x, scratch):
        lane, combine, registers = Lane(), _COMBINE[op], _by_column(x)
        place = lambda warp, column: lane.sum(  # noqa: E731
            lane.times(warp, x.shape[1]), lane.times(lane.quad, 2), constant=8 * column
        )
        for column, rows in enumerate(registers):
            total = functools.reduce(combine, rows)
            for distance in (4, 8, 16):
                total = combine(total, mgpu.utils.shfl_bfly(total, distance))
            vector.store(total, scratch, [_index(place(lane.warp, column))], alignment=8)
        mgpu.utils.warpgroup_barrier()
        totals = []
        for column, rows in enumerate(registers):
            loads = [
                vector.load(rows[0].type, scratch, [_index(place(lane.constant(warp), column))], alignment=8)
                for warp in range(_WARPS)
            ]
            totals.append(functools.reduce(combine, loads))
        return _columns(totals, x.shape[1])

    return reduce(x, scratch)  # pyright: ignore[reportCallIssue] - the context is passed by the decorator


def any_row(x: jax.Array) -> jax.Array:
    """The columns [N] of x float32 [rows, N] whose rows are equal."""

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=_per_column(x))
    def take(_, x):
        return _columns([rows[0] for rows in _by_column(x)], x.shape[1])

    return take(x)  # pyright: ignore[reportCallIssue]


def _per_column(x: jax.Array) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((x.shape[1],), jnp.float32, PER_COLUMN)


def _by_column(x) -> list[list]:
    """A thread's registers, each two columns side by side: of every 8 columns, those of its rows."""
    registers = x.registers.reshape(-1, x.shape[1] // 8, 2)
    return [list(registers[:, column].ravel()) for column in range(registers.shape[1])]


def _columns(registers: list, count: int):
    layout = PER_COLUMN.to_mgpu()
    shaped = np.array(registers, dtype=object).reshape(layout.registers_shape((count,)))
    return mgpu.FragmentedArray(_registers=shaped, _layout=layout, _is_signed=None)


def _index(i):
    return arith.index_cast(ir.IndexType.get(), i)
