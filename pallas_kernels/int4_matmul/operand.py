"""From packed words in shared memory to a wgmma operand in registers, the one piece that knows the weight format."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

# A code in the low mantissa bits under this exponent reads as magic + code: 128 in bfloat16, 1024 in float16.
_MAGIC_BITS = {"bfloat16": 0x43004300, "float16": 0x64006400}
MAGIC = {"bfloat16": 128, "float16": 1024}
_PTX_TYPE = {"bfloat16": "bf16x2", "float16": "f16x2"}


def unpack_int4(tile, offset: jax.Array, scale: jax.Array | None, *, first_step: int, depth: int, dtype) -> jax.Array:
    """Unpack one tile of the fragment-major layout into wgmma's A operand, `(code - zero_point) [* scale]`.

    Args:
      tile: `[2, 256]` int32 in shared memory.
      offset: `[64]` float32, `MAGIC + 8 + zero_point` of each output: what the magic number adds to the code.
      scale: `[64]` float32 scale of each output, or None to leave the codes unscaled.
      first_step: the first 16-input step of the tile to unpack.
      depth: inputs to unpack, 32 or 64.
      dtype: bfloat16 or float16.

    Returns:
      `[64, depth]` in the register layout of wgmma's A operand.
    """
    name = jnp.dtype(dtype).name
    rows = [offset] if scale is None else [offset, scale]
    rows = [plgpu.layout_cast(row.astype(dtype), ROWS) for row in rows]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[ROWS] * len(rows)),
        return_type=plgpu.ShapeDtypeStruct((64, depth), jnp.dtype(dtype), plgpu.Layout.WGMMA),
    )
    def emit(_, tile, offset, *scale) -> Any:
        words = _load_words(tile, first_step, depth // 16)
        offsets, *scales = [[_pair(value) for value in row.registers.flat] for row in (offset, *scale)]
        halves = [(offsets[h], scales[0][h] if scales else None) for h in range(2)]
        registers = [_dequantize(word, j, *halves[j % 2], name) for word in words for j in range(4)]
        layout = plgpu.Layout.WGMMA.to_mgpu()
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        pair = ir.VectorType.get((2,), element)
        registers = np.array([mgpu.utils.bitcast(r, pair) for r in registers], dtype=object)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape((64, depth))), _layout=layout, _is_signed=None
        )

    return emit(tile, *rows)


def unpack_int4_bytes(tiles, *, dtype) -> jax.Array:
    """Unpack tiles of the layout for 8-bit activations into wgmma's A operand.

    Args:
      tiles: refs `[2, 256]` int32 in shared memory, side by side along the inputs.
      dtype: int8, for 16 times the codes, or float8_e4m3fn, for the codes.

    Returns:
      `[64, 64 * len(tiles)]` in the register layout of wgmma's 8-bit A operand.
    """
    dtype, shape = jnp.dtype(dtype), (64, 64 * len(tiles))
    split = _sixteenfold_bytes if dtype == jnp.int8 else _e4m3_bytes

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(tiles),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA_8BIT),
    )
    def emit(_, *tiles) -> Any:
        words = [word for tile in tiles for word in _load_words(tile, 0, 4)]
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        four = ir.VectorType.get((4,), mgpu.utils.dtype_to_ir_type(dtype))
        registers = [mgpu.utils.bitcast(half, four) for word in words for half in split(word)]
        registers = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
        signed = True if dtype == jnp.int8 else None
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    return emit(*tiles)


def _sixteenfold_bytes(word) -> list:
    """The codes of a word in the high halves of bytes: those of the low nibbles, then those of the high ones."""
    i32 = ir.IntegerType.get_signless(32)
    # (word & 0xF0F0F0F0) ^ 0x80808080: stored codes are offset by 8, which flips their sign bit.
    halves = (arith.shli(word, mgpu.utils.c(4, i32)), word)
    return [_asm("lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;", half) for half in halves]


def _e4m3_bytes(word) -> list:
    """The codes of a word as e4m3: those of the low nibbles, then those of the high ones.

    A byte permutation looks up four codes without their sign bits in the tables of the negative and of the positive
    ones, another picks by the sign bit: the algorithm of CUTLASS's converter.
    """
    i32 = ir.IntegerType.get_signless(32)
    index = _asm("and.b32 $0, $1, 0x77777777;", word)
    choice = _asm("{ .reg .b32 t; shr.b32 t, $1, 1; lop3.b32 $0, t, 0x44444444, 0x32103210, 0xEA; }", word)
    looked_up = []
    for part in range(2):
        shift = mgpu.utils.c(16 * part, i32)
        looked_up.append(
            _asm(
                """{ .reg .b32 negative, positive;
                prmt.b32 negative, 0xCACCCED0, 0xB8C0C4C8, $1;
                prmt.b32 positive, 0x44403800, 0x4E4C4A48, $1;
                prmt.b32 $0, negative, positive, $2; }""",
                *(arith.shrui(value, shift) if part else value for value in (index, choice)),
            )
        )
    return [_asm(f"prmt.b32 $0, $1, $2, {order:#x};", *looked_up) for order in (0x6420, 0x7531)]


def _asm(text: str, *operands):
    """32-bit PTX without side effects."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(operands), text, "=r" + ",r" * len(operands), has_side_effects=False)


def _load_words(tile, first_step: int, count: int) -> list:
    """The thread's `count` words of a tile: one vector load."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(128, i32))
    row = arith.index_cast(index, arith.divui(thread, mgpu.utils.c(64, i32)))
    column = arith.muli(arith.remui(thread, mgpu.utils.c(64, i32)), mgpu.utils.c(4, i32))
    column = arith.index_cast(index, arith.addi(column, mgpu.utils.c(first_step, i32)))
    loaded = vector.load(ir.VectorType.get((count,), i32), tile, [row, column], alignment=4 * count)
    return [vector.extract(loaded, dynamic_position=[], static_position=[i]) for i in range(count)]


def _pair(value):
    """A 16-bit value (a vector of one) in both halves of a 32-bit register."""
    element = ir.VectorType(value.type).element_type
    scalar = vector.extract(value, dynamic_position=[], static_position=[0])
    pair = vector.broadcast(ir.VectorType.get((2,), element), scalar)
    return mgpu.utils.bitcast(pair, ir.IntegerType.get_signless(32))


def _dequantize(word, j: int, offset, scale, dtype_name: str):
    """Operand register `j` of a step: codes `j` and `j + 4` of its word, less the offset, times the scale."""
    kind = _PTX_TYPE[dtype_name]
    shifted = arith.shrui(word, mgpu.utils.c(4 * j, ir.IntegerType.get_signless(32))) if j else word
    multiply = "" if scale is None else f"mul.{kind} $0, $0, $3;"
    return _asm(
        f"lop3.b32 $0, $1, 0x000F000F, {_MAGIC_BITS[dtype_name]:#x}, 0xEA; sub.{kind} $0, $0, $2; {multiply}",
        *((shifted, offset) if scale is None else (shifted, offset, scale)),
    )
