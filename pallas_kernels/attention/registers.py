"""Values in the registers of a warpgroup: layouts of a wgmma's operands and accumulators, and moves that cost nothing.

In an accumulator, lane 4r + c of a warp holds, of rows r and r + 8 of the warp's 16, columns 8b + 2c and 8b + 2c + 1
of every 8: "its columns" below.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.attention.quantize import E4M3, INT8

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
MAGIC = 1.5 * 2**23  # float32 from here to 2^23 further has steps of 1
MAGIC_BITS = 0x4B400000
PARABOLA = 1.0004423283, 0.7034276790, 0.2384181403  # of f, nearest to 2**f in relative error from -1/2 to 1/2
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


def largest_of_columns(x, *, positive: bool):
    """The maxima [rows, 8] of x [rows, columns] over columns that are equal modulo 8: no lane asks another.

    Numbers that are `positive`, or -inf, order as their bits do as integers, of which one instruction compares three.
    """
    shape = (x.shape[0], QUAD_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, TILE))
    def largest(ctx, x):
        pair, words = (ir.VectorType.get((2,), t) for t in (ir.F32Type.get(), ir.IntegerType.get_signless(32)))
        values, larger = x.registers.copy(), arith.maximumf
        if positive:
            larger = arith.maxsi
            for index in np.ndindex(values.shape):
                values[index] = vector.bitcast(words, values[index])
        registers = values[:, :1].copy()
        for block in range(1, values.shape[1]):
            for index in np.ndindex(registers.shape):
                registers[index] = larger(registers[index], values[(index[0], block, *index[2:])])
        if positive:
            for index in np.ndindex(registers.shape):
                registers[index] = vector.bitcast(pair, registers[index])
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return largest(x)  # pyright: ignore[reportCallIssue]


def keep_columns(x, first, last):
    """X [rows, columns] where first <= column <= last, bounds int32 [rows] or None; -inf elsewhere.

    A lane subtracts the column that it begins at from the bounds once, so that each score is compared with a constant:
    indices of its columns would be hoisted out of the loop and fill 32 registers.
    """
    bounds = [(bound, compare) for bound, compare in ((first, "sge"), (last, "sle")) if bound is not None]

    @plgpu.inline_mgpu(
        arg_types=(TILE, *(PER_ROW for _ in bounds)), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TILE)
    )
    def keep(ctx, x, *rows):
        word = ir.IntegerType.get_signless(32)

        def constant(value: int):
            return arith.constant(word, value)

        lane = arith.remui(utils.thread_idx(), constant(4))
        begin = arith.muli(lane, constant(2))
        limits = [
            [
                arith.subi(vector.extract(bound, dynamic_position=[], static_position=[0]), begin)
                for bound in row.registers.flat
            ]
            for row in rows
        ]
        dtype = x.mlir_dtype
        hidden = arith.constant(dtype, ir.FloatAttr.get(dtype, float("-inf")))
        registers = x.registers.copy()
        for index in np.ndindex(registers.shape):
            block, row = index[1], index[4]
            pair = registers[index]
            for element in range(2):
                value = vector.extract(pair, dynamic_position=[], static_position=[element])
                for (_, compare), limit in zip(bounds, limits, strict=True):
                    column = constant(QUAD_COLUMNS * block + element)
                    seen = arith.cmpi(getattr(arith.CmpIPredicate, compare), column, limit[row])
                    value = arith.select(seen, value, hidden)
                pair = vector.insert(value, pair, dynamic_position=[], static_position=[element])
            registers[index] = pair
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return keep(x, *(bound for bound, _ in bounds))  # pyright: ignore[reportCallIssue]


def sum_of_own_columns(x):
    """The sum of the columns that each lane holds, of x [rows, columns], as [rows]: a lane's own part of the row's sum.

    The layout says that the lanes of a row agree, and here they do not: add such parts, scale them by values of the
    row, and let `sum_of_parts` make them one. Half the registers of a sum [rows, 8].
    """

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape[:1], x.dtype, PER_ROW))
    def fold(ctx, x):
        pairs = np.moveaxis(x.registers, 1, -1).reshape(2, -1)  # two rows a lane, two adjacent columns a register
        sums = np.empty(2, dtype=object)
        for row in range(2):
            pair = functools.reduce(arith.addf, pairs[row])
            first, second = (vector.extract(pair, dynamic_position=[], static_position=[i]) for i in range(2))
            sums[row] = arith.addf(first, second)
        return _per_row(sums)

    return fold(x)  # pyright: ignore[reportCallIssue]


def split_columns(x, columns: int):
    """The first `columns` of x [rows, more], and as [rows] the one behind them, which the others are too."""
    shapes = (x.shape[0], columns), x.shape[:1]

    @plgpu.inline_mgpu(
        arg_types=(TILE,),
        return_type=[
            plgpu.ShapeDtypeStruct(shape, x.dtype, layout)
            for shape, layout in zip(shapes, (TILE, PER_ROW), strict=True)
        ],
    )
    def split(ctx, x):
        first, last = np.split(x.registers, [columns // QUAD_COLUMNS], axis=1)
        first = fa.FragmentedArray(_registers=first, _layout=fa.WGMMA_LAYOUT, _is_signed=None)
        return first, _per_row([_scalar(register) for register in last[:, :1].flat])

    return split(x)  # pyright: ignore[reportCallIssue]


def sum_of_parts(x):
    """The sums over a row's four lanes of [rows] that hold a part each."""

    @plgpu.inline_mgpu(arg_types=(PER_ROW,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, PER_ROW))
    def add(ctx, x):
        sums = np.empty(2, dtype=object)
        for row, part in enumerate(x.registers.flat):
            part = _scalar(part)
            for lanes in (1, 2):
                part = arith.addf(part, utils.shfl_bfly(part, lanes))
            sums[row] = part
        return _per_row(sums)

    return add(x)  # pyright: ignore[reportCallIssue]


def powers_of_two(y, by_polynomial: int):
    """2**y of float32 y [rows, columns], of every 16 blocks of 8 columns so many on the FMA units.

    The special function unit gives 16 a cycle and is what a softmax waits for, of FMAs there are 128 a cycle. By these,
    2**y = 2**n 2**f, n the nearest integer of y and f what is left, of which a parabola is right to 0.0018 of the
    value: a fraction of what 8 bits round off. From -127 down the result is 0, but for values below every float16.
    """
    if not by_polynomial:
        return jnp.exp2(y)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(y.shape, y.dtype, TILE))
    def power(ctx, y):
        def of(registers):
            return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

        mixed = np.array([block * by_polynomial % 16 < by_polynomial for block in range(y.registers.shape[1])])
        registers = y.registers.copy()
        registers[:, ~mixed] = of(y.registers[:, ~mixed]).exp2(approx=True).registers
        registers[:, mixed] = _parabola(of(y.registers[:, mixed])).registers
        return of(registers)

    return power(y)  # pyright: ignore[reportCallIssue]


def _parabola(y):
    word = ir.IntegerType.get_signless(32)
    c = [
        fa.FragmentedArray.splat(arith.constant(ir.F32Type.get(), x), y.shape, y.layout)
        for x in (-127.0, MAGIC, *PARABOLA)
    ]
    shifted = y.max(c[0]) + c[1]
    f = y.max(c[0]) - (shifted - c[1])
    mantissa = (c[4] * f + c[3]) * f + c[2]
    exponent = shifted.bitcast(word, output_is_signed=True) * fa.FragmentedArray.splat(
        arith.constant(word, 1 << 23), y.shape, y.layout, is_signed=True
    )
    bits = exponent + mantissa.bitcast(word, output_is_signed=True)
    return bits.bitcast(ir.F32Type.get())


def _scalar(register):
    return vector.extract(register, dynamic_position=[], static_position=[0])


def _per_row(values):
    element, registers = ir.VectorType.get((1,), ir.F32Type.get()), np.empty((1, 1, 2, 1, 1), dtype=object)
    for row, value in enumerate(values):
        registers[0, 0, row, 0, 0] = vector.broadcast(element, value)
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_ROW_LAYOUT, _is_signed=None)


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


def _two_halves(value: float) -> str:
    bits = int(np.float16(value).view(np.uint16))
    return f"0x{bits << 16 | bits:08X}"


# As `_parabola`, two at a time: 1.5 * 2^10 has steps of 1 in float16. Below 2^-10, half of e4m3's smallest, all is 0.
_CONSTANTS = {"lowest": -14, "magic": 1536, "c0": PARABOLA[0], "c1": PARABOLA[1], "c2": PARABOLA[2]}
_LOAD_CONSTANTS = "".join(f" mov.b32 {name}, {_two_halves(value)};" for name, value in _CONSTANTS.items())
_POWER_OF_HALVES = (
    "max.f16x2 x, x, lowest; add.rn.f16x2 n, x, magic; sub.rn.f16x2 p, n, magic; sub.rn.f16x2 x, x, p;"
    " fma.rn.f16x2 p, x, c2, c1; fma.rn.f16x2 p, p, x, c0; and.b32 n, n, 0x003F003F; mad.lo.u32 x, n, 1024, p;"
)


def _halves_to_e4m3(by_polynomial: tuple[bool, bool]) -> str:
    """PTX for e4m3 of 2**($1 + $3) and 2**($2 + $3), each two halves."""
    text = "{ .reg .b32 x, n, p, lowest, magic, c0, c1, c2; .reg .b16 part0, part1;"
    text += _LOAD_CONSTANTS if any(by_polynomial) else ""
    for part, polynomial in enumerate(by_polynomial):
        text += f" add.rn.f16x2 x, ${part + 1}, $3; {_POWER_OF_HALVES if polynomial else 'ex2.approx.f16x2 x, x;'}"
        text += f" cvt.rn.satfinite.e4m3x2.f16x2 part{part}, x;"
    return text + " mov.b32 $0, {part0, part1}; }"


def weights_of_halves(x, shift, by_polynomial: int):
    """2**(x + shift) of float16 x [rows, columns] and float32 shift [rows], in e4m3 as `round_to_operand` leaves it.

    Of every 16 blocks of 8 columns, `by_polynomial` are by a parabola as in `powers_of_two`.
    """

    @plgpu.inline_mgpu(
        arg_types=(TILE, PER_ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, E4M3, plgpu.Layout.WGMMA_8BIT)
    )
    def weights(ctx, x, shift):
        word, f16 = ir.IntegerType.get_signless(32), ir.F16Type.get()
        one, two = ir.VectorType.get((1,), word), ir.VectorType.get((2,), f16)

        def as_word(register):
            return vector.extract(vector.bitcast(one, register), dynamic_position=[], static_position=[0])

        shifts = [as_word(vector.broadcast(two, arith.truncf(f16, _scalar(row)))) for row in shift.registers.flat]
        pairs = x.registers.reshape(-1, 2)  # [8-column blocks, rows], each register two adjacent columns
        packed = np.empty((pairs.shape[0] // 2, 2), dtype=object)
        for block, row in np.ndindex(packed.shape):
            arguments = [as_word(pairs[2 * block + half, row]) for half in range(2)]
            mixed = tuple((2 * block + half) * by_polynomial % 16 < by_polynomial for half in range(2))
            asm = _halves_to_e4m3(mixed)
            code = llvm.inline_asm(word, [*arguments, shifts[row]], asm, "=r,r,r,r", asm_dialect=0)
            code = vector.bitcast(ir.VectorType.get((4,), ir.IntegerType.get_signless(8)), vector.broadcast(one, code))
            packed[block, row] = vector.bitcast(ir.VectorType.get((4,), ir.Float8E4M3FNType.get()), code)
        registers = packed.reshape(fa.WGMMA_LAYOUT_8BIT.registers_shape(x.shape))
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=None)

    return weights(x, shift)  # pyright: ignore[reportCallIssue]


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
