"""From packed words in shared memory to a wgmma operand in registers, the one piece that knows the weight format."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

ROWS = plgpu.Layout.WGMMA.reduce(1)

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
    i32 = ir.IntegerType.get_signless(32)
    kind = _PTX_TYPE[dtype_name]
    shifted = arith.shrui(word, mgpu.utils.c(4 * j, i32)) if j else word
    multiply = "" if scale is None else f"mul.{kind} $0, $0, $3;"
    return llvm.inline_asm(
        i32,
        [shifted, offset] if scale is None else [shifted, offset, scale],
        f"lop3.b32 $0, $1, 0x000F000F, {_MAGIC_BITS[dtype_name]:#x}, 0xEA; sub.{kind} $0, $0, $2; {multiply}",
        "=r,r,r" if scale is None else "=r,r,r,r",
        has_side_effects=False,
    )
