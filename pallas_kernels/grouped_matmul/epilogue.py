"""What happens to a tile's sums: gate times up within a thread's registers, and a store that minds the expert's end."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

TILE = 64
CHUNK = 8  # 16-bit values of the 16 bytes that a thread stores at once
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
STAGING = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))


def silu_mul(sums, row_scale=None):
    """`silu(gate) * up` of a tile whose rows alternate, eight of gate and eight of up: no lane asks another.

    Args:
      sums: `[64, columns]` float32 in the layout of wgmma's accumulator.
      row_scale: `[columns]` float32 to multiply by, or None.

    Returns:
      `[64, columns / 2]` float32: of every 16 rows, the first eight hold outputs of the first half of the columns,
      the last eight the same outputs of the second half.
    """
    half = sums.shape[1] // 2
    operands = [sums] if row_scale is None else [sums, row_scale]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, PER_COLUMN)[: len(operands)],
        return_type=plgpu.ShapeDtypeStruct((TILE, half), jnp.float32, plgpu.Layout.WGMMA),
    )
    def emit(_, sums, *scale) -> Any:
        pairs = sums.registers.reshape(-1, 2)  # [8-column blocks, halves of 16 rows], each two adjacent columns
        scales = scale[0].registers.reshape(-1) if scale else [None] * len(pairs)
        values = np.array([_gated(gate, up, s) for (gate, up), s in zip(pairs, scales, strict=True)], dtype=object)
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.ascontiguousarray(values.reshape(2, -1).T).reshape(layout.registers_shape((TILE, half)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit(*operands)  # pyright: ignore[reportCallIssue] - the context is passed by the decorator


_GATED = (
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 t, t; mul.f32 t, t, $1; mul.f32 $0, t, $2; }"
)  # -log2(e) and 1


def _gated(gate, up, scale):
    """`silu(gate) * up [* scale]` of two adjacent columns."""
    if scale is not None:
        up = arith.mulf(up, scale)
    f32 = ir.F32Type.get()
    result = gate
    for i in range(2):
        one = [vector.extract(v, dynamic_position=[], static_position=[i]) for v in (gate, up)]
        value = llvm.inline_asm(f32, one, _GATED, "=f,f,f", has_side_effects=False)
        result = vector.insert(value, result, dynamic_position=[], static_position=[i])
    return result


def store_rows(staging, out, first_row, low, high, first_column, *, columns: int, second_half: int | None):
    """Copy a warpgroup's staged outputs to the rows of `out` that belong to the expert.

    Args:
      staging: `[rows, 64]` in shared memory, just written by this warpgroup.
      out: `[T, columns]` in global memory.
      first_row: of `out`, where the first staged row goes.
      low: rows of `out` from here,
      high: to here (exclusive) belong to the expert.
      first_column: of `out`, where the first staged column goes.
      columns: of `out`.
      second_half: after `silu_mul`, how many rows further down the odd eights of the staged columns go.
    """
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(STAGING), plgpu.RefType(), scalar, scalar, scalar, scalar))
    def emit(_, staging, out, *scalars):
        mgpu.utils.warpgroup_barrier()  # every lane has written
        values = [s.registers.item() for s in scalars]
        _store_rows(staging, out, values, columns, second_half)
        mgpu.utils.warpgroup_barrier()  # and has read: the buffer may be written again

    emit(staging, out, first_row, low, high, first_column)  # pyright: ignore[reportCallIssue]


def _store_rows(staging, out, scalars, columns, second_half):
    first_row, low, high, first_column = scalars
    i32 = ir.IntegerType.get_signless(32)
    index = ir.IndexType.get()
    constant = lambda value: mgpu.utils.c(value, i32)  # noqa: E731
    at = lambda value: arith.index_cast(index, value)  # noqa: E731
    rows = ir.MemRefType(staging.type).shape[0] * 8
    thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
    chunk, line = arith.remui(thread, constant(CHUNK)), arith.divui(thread, constant(CHUNK))
    column, offset = arith.muli(chunk, constant(CHUNK)), first_row
    if second_half is not None:
        column = arith.muli(arith.divui(chunk, constant(2)), constant(CHUNK))
        offset = arith.addi(first_row, arith.muli(arith.remui(chunk, constant(2)), constant(second_half)))
    column = arith.addi(first_column, column)
    inside = arith.cmpi(arith.CmpIPredicate.slt, column, constant(columns))
    within = arith.remui(line, constant(8))
    place = arith.muli(arith.xori(chunk, within), constant(CHUNK))  # the swizzle of 128 bytes
    tile_of_line = arith.divui(line, constant(8))
    element = ir.MemRefType(staging.type).element_type
    for start in range(0, rows, 16):
        row = arith.addi(offset, arith.addi(line, constant(start)))
        wanted = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.sge, row, low))
        wanted = arith.andi(wanted, arith.cmpi(arith.CmpIPredicate.slt, row, high))
        if rows - start < 16:
            wanted = arith.andi(wanted, arith.cmpi(arith.CmpIPredicate.slt, line, constant(rows - start)))
        with mgpu.utils.when(wanted):
            source = [at(arith.addi(tile_of_line, constant(start // 8))), at(constant(0)), at(within), at(place)]
            value = vector.load(ir.VectorType.get((CHUNK,), element), staging, source, alignment=16)
            vector.store(value, out, [at(row), at(column)], alignment=16)
