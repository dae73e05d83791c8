"""Values in the registers of a warpgroup: layouts of a wgmma's operands and accumulators, and moves that cost nothing.

In an accumulator, lane 4r + c of a warp holds, of rows r and r + 8 of the warp's 16, columns 8b + 2c and 8b + 2c + 1
of every 8: "its columns" below.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.attention.quantize import INT8

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
MAGIC = 1.5 * 2**23  # float32 from here to 2^23 further has steps of 1
MAGIC_BITS = 0x4B400000
QUAD_COLUMNS = 8  # the columns that the four lanes of a quad hold together, two each


def along_rows(per_row, like):
    """Broadcasts a value per row to the shape of `like`."""
    return lax.broadcast_in_dim(per_row, like.shape, [0])


def along_columns(per_column, like):
    """Broadcasts a value per column to the shape of `like`."""
    return lax.broadcast_in_dim(per_column, like.shape, [1])


def repeat_columns(x, columns: int):
    """Repeats the 8 columns of x [rows, 8] to [rows, columns]: register copies."""
    shape = (x.shape[0], columns)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, TILE))
    def repeat(ctx, x):
        registers = np.repeat(x.registers, columns // QUAD_COLUMNS, axis=1)
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return repeat(x)  # pyright: ignore[reportCallIssue] - the context is passed by the decorator


def largest_of_columns(x):
    """The maxima [rows, 8] of x [rows, columns] over columns that are equal modulo 8: no lane asks another."""
    return _fold_columns(x, arith.maximumf)


def sum_of_columns(x):
    """The sums [rows, 8] of x [rows, columns] over columns that are equal modulo 8: no lane asks another."""
    return _fold_columns(x, arith.addf)


def _fold_columns(x, combine):
    shape = (x.shape[0], QUAD_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, TILE))
    def fold(ctx, x):
        registers = x.registers[:, :1].copy()
        for block in range(1, x.registers.shape[1]):
            for index in np.ndindex(registers.shape):
                here = (index[0], block, *index[2:])
                registers[index] = combine(registers[index], x.registers[here])
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return fold(x)  # pyright: ignore[reportCallIssue]


_ROUND_TO_E4M3 = (
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
    " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
)
_ROUND_TO_INT8 = (  # adding 1.5 * 2^23 leaves the rounded integer in the low byte
    "{ .reg .f32 a, b, c, d; .reg .b32 i, j, k, l;"
    " add.rn.f32 a, $1, 0f4B400000; add.rn.f32 b, $2, 0f4B400000; add.rn.f32 c, $3, 0f4B400000;"
    " add.rn.f32 d, $4, 0f4B400000; mov.b32 i, a; mov.b32 j, b; mov.b32 k, c; mov.b32 l, d;"
    " prmt.b32 i, i, j, 0x0040; prmt.b32 k, k, l, 0x0040; prmt.b32 $0, i, k, 0x5410; }"
)


def round_to_operand(x, dtype: jnp.dtype):
    """Rounds float32 [rows, columns] to 8 bits in the register layout of a wgmma's operand, with no lane exchange.

    The four bytes of a lane are its columns of two blocks of 8, so columns come out interleaved: in each 16, position
    4c + 2h + e holds column 8h + 2c + e. A product over the columns is right if both its operands are interleaved.
    """

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, plgpu.Layout.WGMMA_8BIT))
    def round_registers(ctx, x):
        word = ir.IntegerType.get_signless(32)
        bytes_type = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        element = ir.IntegerType.get_signless(8) if dtype == INT8 else ir.Float8E4M3FNType.get()
        pairs = np.moveaxis(x.registers, 1, -1)  # [..., 8-column blocks], each register two adjacent columns
        words = np.empty((*pairs.shape[:-1], pairs.shape[-1] // 2), dtype=object)
        for index in np.ndindex(words.shape):
            two = (pairs[(*index[:-1], 2 * index[-1] + half)] for half in range(2))
            four = [vector.extract(pair, dynamic_position=[], static_position=[i]) for pair in two for i in range(2)]
            asm = _ROUND_TO_INT8 if dtype == INT8 else _ROUND_TO_E4M3
            packed = llvm.inline_asm(word, four, asm, "=r,f,f,f,f", asm_dialect=0)
            packed = vector.bitcast(bytes_type, vector.broadcast(ir.VectorType.get((1,), word), packed))
            words[index] = vector.bitcast(ir.VectorType.get((4,), element), packed)
        registers = np.moveaxis(words, -1, 1).reshape(fa.WGMMA_LAYOUT_8BIT.registers_shape(x.shape))
        return fa.FragmentedArray(
            _registers=registers, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=True if dtype == INT8 else None
        )

    return round_registers(x)  # pyright: ignore[reportCallIssue]
