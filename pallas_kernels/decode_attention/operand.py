"""From the bytes of a cache in shared memory to a wgmma operand in registers: no value moves between threads.

In wgmma's first operand, lane 4r + c of warp w holds rows 16w + r and 16w + r + 8 of every 64 and, of every 16
columns, the columns 2c, 2c + 1, 2c + 8 and 2c + 9. The columns of a product may come in any order that both operands
share, so a lane takes for its four columns four bytes that lie side by side, and for several products a run of bytes:

- keys of 8 bits: a quarter of the channels, packed keys: 8 of every 32 (`channel_order` brings the query's channels in
  the same order);
- values: 8 of every 32 tokens. The weights of those tokens must then be in this order too, so the rows of keys are:
  row 16w + 8h + 2c + e of 32 is token 8c + 4w + 2h + e, by address here, or as `layout` packs them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
DTYPE = jnp.dtype(jnp.float16)  # holds every code of 8 bits exactly, and a code of 4 bits as bits of its mantissa
RUN = 8  # elements of packed keys, and tokens of values, that a lane takes side by side
GROUP = 32

_INT8 = (  # a code with its sign bit turned is code + 128; under the exponent of 1024 it reads as 1152 + code
    "{{ .reg .b32 t, hidden; prmt.b32 t, $1, 0, {selector:#x}; xor.b32 t, t, 0x64806480;"
    " mov.b32 hidden, 0x64806480; sub.f16x2 $0, t, hidden; }}"
)
_INT8_SELECTORS = 0x4140, 0x4342
_E4M3 = "{{ .reg .b16 low, high; mov.b32 {{low, high}}, $1; cvt.rn.f16x2.e4m3x2 $0, {half}; }}"


def keys_operand(codes, scale, offset, *, bits: int, first: int, depth: int) -> jax.Array:
    """Keys of a tile as the first operand of scores: float16 [tokens, depth], rows and columns in the orders above.

    Args:
        codes: in shared memory, int8 or float8_e4m3fn [tokens, H], or bytes of `layout.pack_keys`.
        scale: float16 [tokens / 32, H] of packed codes, otherwise None.
        offset: like scale.
        bits: of a code.
        first: the first of the columns.
        depth: how many of them.
    """
    head_dim = codes.shape[1]
    rows = codes.shape[0] * (8 // bits)
    source = _Source(bits, (rows, depth), first, key_run(head_dim, bits), row_of_half=_token_row)
    return _operand(source, codes, scale, offset, by_lane=True)


def values_operand(codes, scale, offset, *, bits: int, first: int, depth: int) -> jax.Array:
    """Values of a tile as the first operand of the output: float16 [H, depth], columns in the order above.

    Args:
        codes: in shared memory, int8 or float8_e4m3fn [H, tokens], or bytes of `layout.pack_values`.
        scale: float16 [H / 32, tokens] of packed codes, otherwise None.
        offset: like scale.
        bits: of a code.
        first: the first of the columns.
        depth: how many of them.
    """
    shape = (codes.shape[0] * (8 // bits), depth)
    source = _Source(bits, shape, first, RUN, row_of_half=_natural_row)
    return _operand(source, codes, scale, offset, by_lane=False)


def key_run(head_dim: int, bits: int) -> int:
    """Channels that a lane takes side by side: column 16 j + 8 h + 2 c + e is number 4 j + 2 h + e of lane c's."""
    return head_dim // 4 if bits == 8 else RUN


def channel_order(rows, *, bits: int) -> jax.Array:
    """Queries [N, H] in shared memory as [H, N], channels in the order of `keys_operand`'s columns."""
    columns, head_dim = rows.shape
    run = key_run(head_dim, bits)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((head_dim, columns), rows.dtype, TILE),
    )
    def load(_, rows) -> Any:
        lane = Lane()
        element = ir.MemRefType(rows.type).element_type
        registers = np.empty((head_dim // 64, columns // 8, 2), dtype=object)
        for block, column, half in np.ndindex(*registers.shape):
            # Row 16 step + 8 half + 2c + e of the result, with step = 4 block + warp and 2c + e = row.
            quarter, last = lane.divide(lane.row, 2)
            number = lane.sum(lane.times(lane.warp, 4), last, constant=16 * block + 2 * half)
            runs, inside = lane.divide(number, run)
            channel = lane.sum(lane.times(runs, 4 * run), lane.times(quarter, run), inside)
            pair = [
                _load(rows, (lane.sum(lane.times(lane.quad, 2), constant=8 * column + i), channel), 1) for i in range(2)
            ]
            values = [vector.extract(x, dynamic_position=[], static_position=[0]) for x in pair]
            registers[block, column, half] = vector.from_elements(ir.VectorType.get((2,), element), values)
        layout = TILE.to_mgpu()
        shape = layout.registers_shape((head_dim, columns))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return load(rows)  # pyright: ignore[reportCallIssue] - the context is passed by the decorator


def token_order(per_token) -> jax.Array:
    """A number for each token [tokens] in shared memory, in the order of `keys_operand`'s rows."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(per_token.shape, per_token.dtype, PER_ROW)
    )
    def load(_, per_token) -> Any:
        lane, layout = Lane(), PER_ROW.to_mgpu()
        count = ir.MemRefType(per_token.type).shape[0]
        registers = np.array(
            [
                _load(per_token, (_token_row(lane, block, half),), 1)
                for block in range(count // 64)
                for half in range(2)
            ],
            dtype=object,
        )
        registers = registers.reshape(layout.registers_shape((count,)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(per_token)  # pyright: ignore[reportCallIssue]


def token_of_row(row: jax.Array) -> jax.Array:
    """The token of a row of `keys_operand`."""
    bit = lambda i: (row >> i) & 1  # noqa: E731
    return (row & ~31) | bit(0) | (bit(3) << 1) | (bit(4) << 2) | (((row >> 1) & 3) << 3)


class Lane:
    """Where a thread stands, and sums of such numbers as MLIR values."""

    def __init__(self):
        self.type = ir.IntegerType.get_signless(32)
        thread = arith.remui(mgpu.utils.thread_idx(), self.constant(128))
        self.warp, lane = self.divide(thread, 32)
        self.row, self.quad = self.divide(lane, 4)

    def constant(self, value: int):
        """A number known now."""
        return mgpu.utils.c(value, self.type)

    def divide(self, x, by: int) -> tuple:
        """Quotient and remainder."""
        return arith.divui(x, self.constant(by)), arith.remui(x, self.constant(by))

    def times(self, x, by: int):
        """A product with a number known now."""
        return arith.muli(x, self.constant(by))

    def sum(self, *terms, constant: int = 0):
        """A sum."""
        total = self.constant(constant)
        for term in terms:
            total = arith.addi(total, term)
        return total


def _token_row(lane: Lane, block: int, half: int):
    """The token of a thread's row of a half, in `keys_operand`'s order."""
    group, warp = lane.divide(lane.warp, 2)
    run, last = lane.divide(lane.row, 2)
    return lane.sum(
        lane.times(group, 32), lane.times(run, 8), lane.times(warp, 4), last, constant=64 * block + 2 * half
    )


def _natural_row(lane: Lane, block: int, half: int):
    return lane.sum(lane.times(lane.warp, 16), lane.row, constant=64 * block + 8 * half)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an operand lies in shared memory: its columns from `first` on, of which every lane has a quarter.

    `run` bytes side by side are a lane's; rows are as `row_of_half` says.
    """

    bits: int
    shape: tuple[int, int]
    first: int
    run: int
    row_of_half: Callable

    def words(self, ref, row, lane: Lane, itemsize: int = 1) -> list:
        """The thread's 32-bit words of a row: its elements in the order of the product's columns."""
        elements = self.shape[1] // 4
        count = min(self.run, elements, 16 // itemsize)
        words = []
        for element in range(self.first // 4, self.first // 4 + elements, count):
            run, inside = divmod(element, self.run)
            column = lane.sum(lane.times(lane.quad, self.run), constant=4 * self.run * run + inside)
            words += _words(_load(ref, (row, column), count))
        return words


def _operand(source: _Source, codes, scale, offset, *, by_lane: bool) -> jax.Array:
    grids = [] if scale is None else [scale, offset]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[plgpu.RefType()] * len(grids)),
        return_type=plgpu.ShapeDtypeStruct(source.shape, DTYPE, TILE),
    )
    def emit(_, codes, *grids) -> Any:
        lane, registers = Lane(), []
        for block in range(source.shape[0] // 64):
            if grids:
                registers += _unpack_groups(source, lane, block, by_lane, codes, *grids)
            else:
                registers += _unpack_bytes(source, lane, block, codes)
        layout = TILE.to_mgpu()
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        registers = np.array([mgpu.utils.bitcast(r, pair) for r in registers], dtype=object)
        shape = layout.registers_shape(source.shape)
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return emit(codes, *grids)


def _unpack_bytes(source: _Source, lane: Lane, block: int, codes) -> list:
    """The registers of 64 rows of 8-bit codes, in the operand's order."""
    rows = [source.words(codes, source.row_of_half(lane, block, half), lane) for half in range(2)]
    is_int8 = isinstance(ir.MemRefType(codes.type).element_type, ir.IntegerType)
    registers = []
    for words in zip(*rows, strict=True):
        for pair in range(2):
            for word in words:
                if is_int8:
                    asm = _INT8.format(selector=_INT8_SELECTORS[pair])
                else:
                    asm = _E4M3.format(half=("low", "high")[pair])
                registers.append(_asm(asm, word))
    return registers


def _unpack_groups(source: _Source, lane: Lane, block: int, by_lane: bool, codes, scale, offset) -> list:
    """The registers of 64 rows of packed codes: one shift, one mask and one multiply-add for two of them."""
    group, warp = lane.divide(lane.warp, 2)
    group = lane.sum(group, constant=2 * block)
    row = lane.times(group, GROUP * source.bits // 8)
    place = lane.sum(lane.row, lane.times(warp, 8)) if source.bits == 4 else lane.row  # of 2 bits, both warps' rows
    if by_lane:
        words = _words_by_lane(source, codes, row, place, lane)
    else:
        words = source.words(codes, lane.sum(row, place), lane)
    scales, offsets = (source.words(x, group, lane, itemsize=2) for x in (scale, offset))
    registers = []
    for step, word in enumerate(words):
        if not by_lane:  # the two columns of a register in the halves of a word, where packed keys have them
            word = _asm("prmt.b32 $0, $1, $1, 0x3120;", word)
        if source.bits == 2:
            word = arith.shrui(word, lane.times(warp, 4))
        for pair in range(2):
            for half in range(2):
                shift = 10 - source.bits - (8 * pair + source.bits * half)
                registers.append(
                    _multiply_add(word, shift, source.bits, scales[2 * step + pair], offsets[2 * step + pair])
                )
    return registers


def _words_by_lane(source: _Source, codes, row, place, lane: Lane) -> list:
    """The thread's words of the packed keys of a group that begins at a row, as `layout.pack_keys` sorts them."""
    head_dim = ir.MemRefType(codes.type).shape[1]
    count, (span, inside) = min(source.shape[1] // 4, 16), divmod(source.first // 4, 16)
    words = []
    for _ in range(0, source.shape[1] // 4, count):
        byte = lane.sum(lane.times(place, 64), lane.times(lane.quad, 16), constant=64 * GROUP * source.bits // 8 * span)
        down, column = lane.divide(lane.sum(byte, constant=inside), head_dim)
        words += _words(_load(codes, (lane.sum(row, down), column), count))
        span += 1
    return words


def _multiply_add(word, shift: int, bits: int, scale, offset):
    """Two codes as the highest bits of a mantissa, 1 + code / 2**bits, times scale plus offset."""
    mask = ((1 << bits) - 1) << (10 - bits)
    amount = mgpu.utils.c(abs(shift), word.type)
    shifted = word if shift == 0 else arith.shli(word, amount) if shift > 0 else arith.shrui(word, amount)
    return _asm(
        f"{{ .reg .b32 t; lop3.b32 t, $1, {mask * 0x10001:#x}, 0x3C003C00, 0xEA; fma.rn.f16x2 $0, t, $2, $3; }}",
        shifted, scale, offset,
    )  # fmt: skip


def _asm(text: str, *arguments):
    constraints = ",".join(["=r"] + ["r"] * len(arguments))
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(arguments), text, constraints, has_side_effects=False)


def _load(ref, position, count: int):
    """A vector of `count` elements of shared memory, aligned to its size."""
    element = ir.MemRefType(ref.type).element_type
    index = [arith.index_cast(ir.IndexType.get(), i) for i in position]
    return vector.load(
        ir.VectorType.get((count,), element), ref, index, alignment=count * mgpu.utils.bytewidth(element)
    )


def _words(loaded) -> list:
    """The 32-bit words of a vector."""
    i32 = ir.IntegerType.get_signless(32)
    kind = ir.VectorType(loaded.type)
    count = kind.shape[0] * mgpu.utils.bytewidth(kind.element_type) // 4
    words = mgpu.utils.bitcast(loaded, ir.VectorType.get((count,), i32))
    return [vector.extract(words, dynamic_position=[], static_position=[i]) for i in range(count)]
