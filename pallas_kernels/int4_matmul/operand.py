"""From packed words in shared memory to a wgmma operand in registers, the one piece that knows the weight format."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.int4_matmul.formats import FORMATS, NF4_LEVELS

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

# A code in the low mantissa bits under this exponent reads as magic + code: 128 in bfloat16, 1024 in float16.
_MAGIC_BITS = {"bfloat16": 0x43004300, "float16": 0x64006400}
MAGIC = {"bfloat16": 128, "float16": 1024}
# int4 codes as stored, -8 first, in e4m3.
_E4M3_OF_STORED = [*np.arange(-8, 8).astype(jnp.float8_e4m3fn).view(np.uint8).tolist()]
_PTX_TYPE = {"bfloat16": "bf16x2", "float16": "f16x2"}


def unpack_words(
    tiles, offset: jax.Array | None, scale: jax.Array | None, *, first_word: int, depth: int, dtype, qtype: str
) -> jax.Array:
    """Unpack codes into wgmma's 16-bit A operand, `(code - zero_point) [* scale]`.

    Args:
      tiles: refs `[2, 256]` int32 in shared memory, side by side along the inputs.
      offset: `[64]` float32, for int4 and int2 what the magic number adds to the code; None for the others.
      scale: `[64]` float32 scale of each output, or None to leave the codes unscaled.
      first_word: of a thread's four in a tile, the first to unpack.
      depth: inputs to unpack, 32 or 64.
      dtype: bfloat16 or float16.
      qtype: the format of the codes.

    Returns:
      `[64, depth]` in the register layout of wgmma's A operand.
    """
    dtype = jnp.dtype(dtype)
    rows = [plgpu.layout_cast(row.astype(dtype), ROWS) for row in (offset, scale) if row is not None]
    count = depth * FORMATS[qtype].bits // 64 // len(tiles)  # words of each tile

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * len(tiles), [ROWS] * len(rows)),
        return_type=plgpu.ShapeDtypeStruct((64, depth), dtype, plgpu.Layout.WGMMA),
    )
    def emit(_, tiles, rows) -> Any:
        words = [word for tile in tiles for word in _load_words(tile, first_word, count)]
        factors = [[_pair(value) for value in row.registers.flat] for row in rows]
        offsets = factors.pop(0) if offset is not None else [None, None]
        scales = factors.pop(0) if scale is not None else [None, None]
        codes = [register for word in words for register in _SPLIT[qtype](word, offsets, dtype.name)]
        # Registers of the upper and of the lower rows alternate.
        registers = [_scaled(register, scales[i % 2], dtype.name) for i, register in enumerate(codes)]
        layout, pair = plgpu.Layout.WGMMA.to_mgpu(), ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        registers = np.array([mgpu.utils.bitcast(r, pair) for r in registers], dtype=object)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape((64, depth))), _layout=layout, _is_signed=None
        )

    return emit(tiles, rows)  # pyright: ignore[reportCallIssue] - the context is passed by the decorator


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
    # Stored codes are offset by 8, which flips their sign bit.
    halves = (_asm("shl.b32 $0, $1, 4;", word), word)
    return [_asm("lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;", half) for half in halves]


def _e4m3_bytes(word) -> list:
    """The codes of a word as e4m3: those of the low nibbles, then those of the high ones."""
    looked_up = [_looked_up(_E4M3_OF_STORED, *half) for half in _nibble_selectors(word)]
    return [_asm(f"prmt.b32 $0, $1, $2, {order:#x};", *looked_up) for order in (0x6420, 0x7531)]


def _nibble_selectors(word) -> list:
    """What looks the four low nibbles of a word up in a table of 16 bytes, and what the four high ones.

    By CUTLASS's converter: a byte permutation looks up by three bits in each half of the table, another picks by the
    fourth.
    """
    index = _asm("and.b32 $0, $1, 0x77777777;", word)
    choice = _asm("{ .reg .b32 t; shr.b32 t, $1, 1; lop3.b32 $0, t, 0x44444444, 0x32103210, 0xEA; }", word)
    return [(index, choice), tuple(_asm("shr.b32 $0, $1, 16;", value) for value in (index, choice))]


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


def _scaled(register, scale, dtype_name: str):
    return register if scale is None else _asm(f"mul.{_PTX_TYPE[dtype_name]} $0, $1, $2;", register, scale)


def _low_bits(word, offsets, dtype_name: str, *, bits: int) -> list:
    """Registers of codes of 2 or 4 bits less the offset: codes are the low mantissa bits under a magic exponent."""
    mask, registers = 0x00010001 * (2**bits - 1), []
    for i in range(16 // bits):
        shifted = _asm(f"shr.b32 $0, $1, {bits * i};", word) if i else word
        text = (
            f"lop3.b32 $0, $1, {mask:#x}, {_MAGIC_BITS[dtype_name]:#x}, 0xEA; sub.{_PTX_TYPE[dtype_name]} $0, $0, $2;"
        )
        registers.append(_asm(text, shifted, offsets[i % 2]))
    return registers


def _int8(word, _, dtype_name: str) -> list:
    """Registers of int8 codes: bytes 0 and 2, then bytes 1 and 3, less 128."""
    if dtype_name == "float16":
        text = """{{ .reg .b32 t, offset; prmt.b32 t, $1, 0x64646464, {:#x}; mov.b32 offset, 0x64806480;
            sub.f16x2 $0, t, offset; }}"""
        return [_asm(text.format(0x4040 | (r + 2) << 8 | r), word) for r in range(2)]
    # Eight bits are one too many for bfloat16's mantissa: by way of float32, whose upper half they end in.
    text = """{{ .reg .b32 a, b; .reg .f32 x, y;
        prmt.b32 a, $1, 0x4B000000, {:#x}; prmt.b32 b, $1, 0x4B000000, {:#x};
        mov.b32 x, a; mov.b32 y, b; sub.f32 x, x, 0f4B000080; sub.f32 y, y, 0f4B000080;
        mov.b32 a, x; mov.b32 b, y; prmt.b32 $0, a, b, 0x7632; }}"""
    return [_asm(text.format(0x7540 | r, 0x7540 | r + 2), word) for r in range(2)]


def _e4m3(word, _, dtype_name: str) -> list:
    """Registers of e4m3 codes, bytes 0 and 2, then 1 and 3: bits moved into place, the exponent's bias made up for."""
    shift, mask, power = {"bfloat16": (4, 0x07F007F0, 0x7B807B80), "float16": (1, 0x3F803F80, 0x5C005C00)}[dtype_name]
    high = (_asm("shl.b32 $0, $1, 8;", word), word)
    text = f"""{{ .reg .b32 t, power; shr.b32 t, $1, {shift}; and.b32 t, t, {mask:#x}; mov.b32 power, {power:#x};
        lop3.b32 t, $1, 0x80008000, t, 0xEA; mul.{_PTX_TYPE[dtype_name]} $0, t, power; }}"""
    return [_asm(text, half) for half in high]


def _nf4(word, _, dtype_name: str) -> list:
    """Registers of NF4 levels: a byte permutation looks four codes' upper bytes up, another their lower ones."""
    bits = np.asarray(np.array(NF4_LEVELS), jnp.dtype(dtype_name)).view(np.uint16)
    registers = []
    for nibbles in _nibble_selectors(word):
        low, high = (_looked_up([int(b) for b in plane], *nibbles) for plane in (bits & 255, bits >> 8))
        registers += [_asm(f"prmt.b32 $0, $1, $2, {order:#x};", low, high) for order in (0x5140, 0x7362)]
    return registers


def _looked_up(table: list[int], index, choice):
    """Four bytes of a table of 16, by the low three bits of nibbles and by selectors that the fourth bits make."""
    words = [f"{int.from_bytes(bytes(table[i : i + 4]), 'little'):#x}" for i in range(0, 16, 4)]
    text = f"""{{ .reg .b32 lower, upper;
        prmt.b32 lower, {words[0]}, {words[1]}, $1; prmt.b32 upper, {words[2]}, {words[3]}, $1;
        prmt.b32 $0, lower, upper, $2; }}"""
    return _asm(text, index, choice)


# From a word (and the offsets of both row halves) to its operand registers, in the order of the layout.
_SPLIT = {
    "int2": functools.partial(_low_bits, bits=2),
    "int4": functools.partial(_low_bits, bits=4),
    "int8": _int8,
    "float8_e4m3fn": _e4m3,
    "nf4": _nf4,
}
