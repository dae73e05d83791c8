"""The PTX that unpacks codes, evaluated instruction by instruction, against the manual's figures of wgmma's operand."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import operand, pack
from pallas_kernels.int4_matmul.formats import FORMATS, values_of


def lop3(a, b, c, table):
    """Any bitwise function of three words, by its truth table."""
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            picked = [word if i >> (2 - j) & 1 else ~word for j, word in enumerate((a, b, c))]
            out |= picked[0] & picked[1] & picked[2]
    return out


def prmt(a, b, selector):
    """Bytes of two words by the nibbles of a selector, whose fourth bit is not used here."""
    source = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    out = np.zeros(np.broadcast(a, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        assert (nibble < 8).all()
        out |= np.select([nibble == j for j in range(8)], source) << np.uint32(8 * i)
    return out


def halves(function, dtype):
    """An operation on both 16-bit halves of words, rounded once."""

    def run(a, b):
        wide = [np.ascontiguousarray(np.broadcast_to(x, a.shape)).view(dtype).astype(np.float64) for x in (a, b)]
        return function(*wide).astype(dtype).view(np.uint32)

    return run


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.f32": lambda a, b: (a.view(np.float32) - np.atleast_1d(b).view(np.float32)).view(np.uint32),
    "sub.bf16x2": halves(np.subtract, jnp.bfloat16),
    "mul.bf16x2": halves(np.multiply, jnp.bfloat16),
    "sub.f16x2": halves(np.subtract, np.float16),
    "mul.f16x2": halves(np.multiply, np.float16),
}


def evaluate(text, *operands):
    """What `operand._asm` emits, on arrays of words."""
    registers = {f"${i + 1}": value for i, value in enumerate(operands)}

    def read(name):
        if name in registers:
            return registers[name]
        return np.uint32(int(name[2:], 16) if name.startswith("0f") else int(name, 0))

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if line.strip():
            name, rest = line.strip().split(maxsplit=1)
            target, *sources = (part.strip() for part in rest.split(","))
            registers[target] = OPERATIONS[name](*map(read, sources))
    return registers["$0"]


@pytest.fixture
def evaluated(monkeypatch):
    monkeypatch.setattr(operand, "_asm", evaluate)


def words_of(codes, **options):
    """The four words of each of a warpgroup's threads, of one packed tile."""
    return np.asarray(pack(jnp.asarray(codes), **options)).view(np.uint32).reshape(128, 4)


THREAD = np.arange(128)
ROW, COLUMN = 16 * (THREAD // 32) + THREAD % 32 // 4, THREAD % 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("qtype", list(FORMATS))
def test_registers_of_16_bit_operands_hold_their_values(rng, evaluated, qtype, dtype):
    depth, dtype = FORMATS[qtype].tile_k, jnp.dtype(dtype)
    if qtype == "float8_e4m3fn":  # every finite one, subnormals too
        bits = rng.permutation(np.tile([b for b in range(256) if b & 127 != 127], 9))[: depth * 64]
        codes = bits.astype(np.uint8).view(jnp.float8_e4m3fn).reshape(depth, 64)
    else:
        low, high = {"int2": (-2, 2), "int4": (-8, 8), "int8": (-128, 128), "nf4": (0, 16)}[qtype]
        codes = rng.integers(low, high, (depth, 64)).astype(np.int32)
    offset = operand.MAGIC[dtype.name] + (FORMATS[qtype].offset or 0)
    pair = np.full((128,), offset, dtype).repeat(2).view(np.uint32)
    split, words = operand._SPLIT[qtype], words_of(codes, qtype=qtype)
    registers = [r for i in range(4) for r in split(words[:, i], [pair, pair], dtype.name)]
    assert len(registers) == depth // 16 * 4
    values = np.asarray(values_of(jnp.asarray(codes), qtype)).astype(dtype)
    for number, register in enumerate(registers):
        step, column_half, row_half = number // 4, number % 4 // 2, number % 2
        for element, found in enumerate(register.view(dtype).reshape(128, 2).T):
            inputs = 16 * step + 8 * column_half + 2 * COLUMN + element
            np.testing.assert_array_equal(found, values[inputs, ROW + 8 * row_half])


@pytest.mark.parametrize(("dtype", "factor"), [("int8", 16), ("float8_e4m3fn", 1)])
def test_registers_of_8_bit_operands_hold_their_values(rng, evaluated, dtype, factor):
    codes = rng.integers(-8, 8, (64, 64)).astype(np.int8)
    split = operand._sixteenfold_bytes if dtype == "int8" else operand._e4m3_bytes
    words = words_of(codes, x_bytes=1)
    registers = [r for i in range(4) for r in split(words[:, i])]
    for number, register in enumerate(registers):
        step, row_half = divmod(number, 2)
        for element, found in enumerate(register.view(jnp.dtype(dtype)).reshape(128, 4).T):
            expected = factor * codes[16 * step + 4 * COLUMN + element, ROW + 8 * row_half].astype(np.int32)
            np.testing.assert_array_equal(found.astype(np.int32), expected)
