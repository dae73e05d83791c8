"""Operations on a warpgroup's registers, carried out on a CPU for all of its 128 threads at once.

What builds the kernel's MLIR is called with stand-ins that compute with NumPy, an array over the threads for each
value; the few instructions of PTX are interpreted.
"""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import fragmented_array as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import registers
from pallas_kernels.attention.quantize import E4M3, INT8
from pallas_kernels.attention.registers import MAGIC

THREADS = np.arange(128)
WARP, ROW, QUAD = THREADS // 32, THREADS % 32 // 4, THREADS % 4
# Bytes that a layout's register of a thread holds side by side, and so columns of a block that four lanes hold.
WIDTHS = {mosaic.WGMMA_LAYOUT: 2, mosaic.WGMMA_LAYOUT_8BIT: 4}


class Fragment:
    """A FragmentedArray: registers [blocks of rows, blocks of columns, ..., 2 rows, ...] of arrays over the threads."""

    def __init__(self, *, _registers, _layout, _is_signed):
        self.registers, self.layout, self.shape = _registers, _layout, ()

    @staticmethod
    def splat(value, shape, layout, is_signed=None):
        return Fragment(_registers=value, _layout=layout, _is_signed=None)

    @property
    def mlir_dtype(self):
        return next(iter(self.registers.flat)).dtype

    def _each(self, function, *others):
        values = [self.registers, *(other.registers if isinstance(other, Fragment) else other for other in others)]
        registers = np.empty(next(value.shape for value in values if value.dtype == object), dtype=object)
        for index in np.ndindex(registers.shape):
            registers[index] = function(*(value[index] if value.dtype == object else value for value in values))
        return Fragment(_registers=registers, _layout=self.layout, _is_signed=None)

    def __add__(self, other):
        return self._each(np.add, other)

    def __sub__(self, other):
        return self._each(np.subtract, other)

    def __mul__(self, other):
        return self._each(np.multiply, other)

    def max(self, other):
        return self._each(np.maximum, other)

    def exp2(self, *, approx):
        assert approx
        return self._each(np.exp2)

    def bitcast(self, dtype, output_is_signed=None):
        return self._each(lambda x: x.view(dtype))


def held(array, layout):
    """The registers of a warpgroup that holds an array in a layout."""
    array = np.asarray(array)
    if array.ndim == 1:
        values = [array[None, 16 * WARP + ROW + 8 * half] for half in range(2)]
    else:
        width = WIDTHS[layout]
        columns = 4 * width * np.arange(array.shape[1] // (4 * width))
        values = [
            np.stack([array[16 * WARP + ROW + 8 * half, first + width * QUAD + i] for i in range(width)])
            for first in columns
            for half in range(2)
        ]
    registers = np.empty(len(values), dtype=object)
    registers[:] = values
    registers = registers.reshape(layout.registers_shape(array.shape))
    fragment = Fragment(_registers=registers, _layout=layout, _is_signed=None)
    fragment.shape = array.shape
    return fragment


def array_of(fragment, shape):
    """The array that a warpgroup's registers hold, every lane that holds a number agreeing on it."""
    first = next(iter(fragment.registers.flat))
    array = np.zeros(shape, first.dtype)
    for index in np.ndindex(fragment.registers.shape):
        value = fragment.registers[index]
        if len(shape) == 1:
            row = 16 * WARP + ROW + 8 * index[2]
            array[row] = value[0]
            assert all((value[0][row == r] == array[r]).all() or np.isnan(array[r]) for r in row)
            continue
        width = WIDTHS[fragment.layout]
        row, column = 16 * WARP + ROW + 8 * index[4], 4 * width * index[1] + width * QUAD
        for i in range(width):
            array[row, column + i] = value[i]
    assert fragment.registers.shape == fragment.layout.registers_shape(shape)
    return array


def inline_mgpu(*, arg_types, return_type):
    """Calls a function of registers with those of arrays."""

    def decorate(function):
        def call(*arrays):
            assert len(arrays) == len(arg_types)
            given = [held(x, layout.to_mgpu()) for x, layout in zip(arrays, arg_types, strict=True)]
            out = function(None, *given)
            if isinstance(return_type, list):
                return [array_of(x, t.shape) for x, t in zip(out, return_type, strict=True)]
            return array_of(out, return_type.shape)

        return call

    return decorate


def byte_permute(a, b, selector):
    bytes_ = np.concatenate([x.view(np.uint8).reshape(-1, 4).T for x in (a, b)])
    chosen = [bytes_[selector >> 4 * i & 7] for i in range(4)]
    return np.ascontiguousarray(np.stack(chosen, axis=-1)).view(np.uint32)[:, 0]


HALVES = {
    "add.rn.f16x2": np.add,
    "sub.rn.f16x2": np.subtract,
    "max.f16x2": np.maximum,
    "ex2.approx.f16x2": np.exp2,
    "fma.rn.f16x2": lambda a, b, c: a.astype(np.float32) * b.astype(np.float32) + c.astype(np.float32),
}
WORDS = {"and.b32": np.bitwise_and, "mad.lo.u32": lambda a, b, c: a * b + c}


def halves(word):
    """Of words over the threads, the two float16 in each."""
    return np.broadcast_to(np.asarray(word, np.uint32), THREADS.shape).copy().view(np.float16).reshape(-1, 2)


def run_ptx(text, arguments):
    """What a block of PTX of few instructions leaves in $0."""
    values = {f"${i + 1}": x for i, x in enumerate(arguments)}

    def value(name):
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return int(name, 0) if name[0].isdigit() else values[name]

    e4m3 = lambda x: np.asarray(jnp.asarray(x).astype(E4M3)).view(np.uint8).astype(np.uint32)  # noqa: E731
    for statement in text.strip("{} ").split(";"):
        operation, _, rest = statement.strip().partition(" ")
        target, *sources = [x.strip() for x in re.sub(r"[{}]", "", rest).split(",")]
        if operation == "add.rn.f32":
            values[target] = (value(sources[0]) + value(sources[1])).astype(np.float32)
        elif operation == "cvt.rn.satfinite.e4m3x2.f32":  # the first source goes to the upper half
            values[target] = e4m3(value(sources[0])) << 8 | e4m3(value(sources[1]))
        elif operation == "cvt.rn.satfinite.e4m3x2.f16x2":
            low, high = e4m3(halves(value(sources[0])).astype(np.float32)).T
            values[target] = high << 8 | low
        elif operation in HALVES:
            result = HALVES[operation](*(halves(value(x)) for x in sources)).astype(np.float16)
            values[target] = np.ascontiguousarray(result).view(np.uint32)[:, 0]
        elif operation in WORDS:
            values[target] = WORDS[operation](*(np.asarray(value(x), np.uint32) for x in sources))
        elif operation == "prmt.b32":
            values[target] = byte_permute(*(value(x).view(np.uint32) for x in sources[:2]), value(sources[2]))
        elif operation == "mov.b32":
            low, *high = map(value, sources)
            values[target] = low | high[0] << 16 if high else low
        else:
            assert not operation or operation.startswith(".reg"), operation
    return values["$0"]


def constant(dtype, x):
    return np.full(THREADS.shape, x, dtype)


def inserted(value, vector, *, dynamic_position, static_position):
    vector = vector.copy()
    vector[static_position[0]] = value
    return vector


def viewed(type_, vector):
    """A vector bit cast to another type: its elements lie side by side in a thread."""
    (count,), dtype = type_
    return np.ascontiguousarray(np.ascontiguousarray(vector.T).view(dtype).reshape(-1, count).T)


COMPARE = {"sge": np.greater_equal, "sle": np.less_equal}


@pytest.fixture
def on_threads(monkeypatch):
    def integer(bits):
        return np.dtype(f"int{bits}")

    ir = SimpleNamespace(
        IntegerType=SimpleNamespace(get_signless=integer),
        F32Type=SimpleNamespace(get=lambda: np.dtype(np.float32)),
        F16Type=SimpleNamespace(get=lambda: np.dtype(np.float16)),
        Float8E4M3FNType=SimpleNamespace(get=lambda: E4M3),
        FloatAttr=SimpleNamespace(get=lambda dtype, x: x),
        VectorType=SimpleNamespace(get=lambda shape, dtype: (shape, dtype)),
    )
    arith = SimpleNamespace(
        constant=constant,
        remui=np.remainder,
        muli=np.multiply,
        subi=np.subtract,
        addf=np.add,
        maximumf=np.maximum,
        truncf=lambda dtype, x: x.astype(dtype),
        maxsi=np.maximum,
        cmpi=lambda how, a, b: COMPARE[how](a, b),
        select=lambda condition, a, b: np.where(condition, a, b),
        CmpIPredicate=SimpleNamespace(sge="sge", sle="sle"),
    )
    vector = SimpleNamespace(
        extract=lambda x, dynamic_position, static_position: x[static_position[0]],
        insert=inserted,
        broadcast=lambda type_, x: np.broadcast_to(x, (type_[0][0], *THREADS.shape)),
        bitcast=viewed,
    )
    replaced = {
        "ir": ir,
        "arith": arith,
        "vector": vector,
        "llvm": SimpleNamespace(inline_asm=lambda _, arguments, text, *a, **k: run_ptx(text, arguments)),
        "utils": SimpleNamespace(
            thread_idx=lambda: THREADS.astype(np.int32), shfl_bfly=lambda x, lanes: x[THREADS ^ lanes]
        ),
        "fa": SimpleNamespace(
            FragmentedArray=Fragment,
            **{name: getattr(mosaic, name) for name in ("WGMMA_LAYOUT", "WGMMA_ROW_LAYOUT", "WGMMA_LAYOUT_8BIT")},
        ),
        "plgpu": SimpleNamespace(inline_mgpu=inline_mgpu, ShapeDtypeStruct=plgpu.ShapeDtypeStruct, Layout=plgpu.Layout),
    }
    for name, replacement in replaced.items():
        monkeypatch.setattr(registers, name, replacement)


def scores(rng, columns, hidden=0.2):
    """Products of int8 codes as the kernel holds them, some of them hidden."""
    x = (MAGIC + rng.integers(-(127**2) * 128, 127**2 * 128 + 1, (64, columns))).astype(np.float32)
    x[rng.uniform(size=x.shape) < hidden] = -np.inf
    return x


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_columns_outside_the_bounds_are_hidden(rng, on_threads, columns):
    x = scores(rng, columns, 0)
    # Around every column, far before and behind all, and the largest that a kernel can ask for.
    far = np.array([-(2**30), -1, 0, columns - 1, columns, 2**30])
    first, last = (np.where(rng.uniform(size=64) < 0.3, rng.choice(far, 64), rng.integers(-9, columns + 9, 64))
                   .astype(np.int32) for _ in range(2))  # fmt: skip
    column = np.arange(columns)
    for begin in (None, first):
        seen = column <= last[:, None]
        seen &= True if begin is None else column >= begin[:, None]
        np.testing.assert_array_equal(registers.keep_columns(x, begin, last), np.where(seen, x, -np.inf))


@pytest.mark.parametrize("positive", [False, True])
def test_largest_of_columns(rng, on_threads, positive):
    x = scores(rng, 128)
    x[5] = -np.inf
    expected = x.reshape(64, 16, 8).max(axis=1)
    np.testing.assert_array_equal(registers.largest_of_columns(x, positive=positive), expected)


def test_columns_repeat_and_split(rng, on_threads):
    x = rng.normal(size=(64, 8)).astype(np.float32)
    np.testing.assert_array_equal(registers.repeat_columns(x, 64), np.tile(x, (1, 8)))
    for more in (8, 16):
        acc = np.concatenate([rng.normal(size=(64, 128)), np.tile(x[:, :1], (1, more))], axis=1).astype(np.float32)
        first, last = registers.split_columns(acc, 128)
        np.testing.assert_array_equal(first, acc[:, :128])
        np.testing.assert_array_equal(last, acc[:, 128])


def test_parts_of_a_sum_become_the_sum(rng, on_threads, monkeypatch):
    """A lane's part leaves and enters as registers, since lanes of a row do not agree on it."""
    x = rng.integers(0, 449, (64, 128)).astype(np.float32)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "array_of", lambda fragment, shape: fragment)
        parts = registers.sum_of_own_columns(x)
    parts.shape, parts.dtype = (64,), x.dtype
    monkeypatch.setitem(globals(), "held", lambda fragment, layout: fragment)
    np.testing.assert_array_equal(registers.sum_of_parts(parts), x.sum(axis=1))  # integers below 2^24: exact


@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_weights_become_interleaved_codes(rng, on_threads, dtype):
    """In each 16 columns, position 4c + 2h + e holds column 8h + 2c + e."""
    x = rng.uniform(-127, 127, (64, 64)).astype(np.float32)
    codes = registers.round_to_operand(x, dtype)
    rounded = np.rint(x).astype(np.int8) if dtype == INT8 else np.asarray(jnp.asarray(x).astype(E4M3))
    expected = np.zeros_like(rounded)
    for column in range(64):
        block, half, lane, element = column // 16, column % 16 // 8, column % 8 // 2, column % 2
        expected[:, 16 * block + 4 * lane + 2 * half + element] = rounded[:, column]
    np.testing.assert_array_equal(codes.astype(np.float32), expected.astype(np.float32))


def test_a_parabola_raises_two_to_a_power(rng, on_threads):
    y = rng.uniform(-126, 9, (64, 128)).astype(np.float32)
    y[:, ::5] = np.rint(y[:, ::5]) + rng.choice([0, 0.5, -0.5], (64, 26))
    y[0], y[1], y[2] = -np.inf, -1e30, np.linspace(-140, -126, 128)
    for count in (0, 1, 4, 8):
        with np.errstate(over="ignore"):  # integers wrap, as they do on the device
            out = registers.powers_of_two(y, count) if count else np.exp2(y)
        exact = np.exp2(y.astype(np.float64))
        block = np.arange(128) // 8
        parabola = block * count % 16 < count
        assert parabola.sum() == 8 * count
        assert (np.abs(out - exact) <= 0.0018 * exact + 2.0**-125)[:, parabola].all()
        np.testing.assert_array_equal(out[:, ~parabola], np.exp2(y)[:, ~parabola])


@pytest.mark.parametrize("by_polynomial", [0, 4, 16])
def test_weights_of_halves(rng, on_threads, by_polynomial):
    """In e4m3, interleaved; by the special function unit, or by a parabola that is off by 1/500 and rounded thrice."""
    x = rng.normal(0, 5, (64, 128)).astype(np.float16)
    x[:, ::7], x[0] = -np.inf, np.linspace(-40, 0, 128)
    largest = x.max(axis=1).astype(np.float32)
    with np.errstate(over="ignore", divide="ignore"):
        codes = registers.weights_of_halves(x, 8 - largest, by_polynomial).astype(np.float64)
    exact = np.exp2(x.astype(np.float64) + (8 - largest)[:, None].astype(np.float16))
    exact = exact.reshape(64, 8, 2, 4, 2).swapaxes(2, 3).reshape(64, 128)
    # e4m3 errs by 1/16 of a value, or by half its smallest; exponents from -16 to 16 by 2^-7 in float16.
    relative = 1 / 16 + 2.0**-7 + (0.0018 + 3 * 2.0**-10 if by_polynomial else 0)
    assert (np.abs(codes - exact) <= relative * exact + 2.0**-10 * 1.01).all()
    assert (codes[np.isneginf(x).reshape(64, 8, 2, 4, 2).swapaxes(2, 3).reshape(64, 128)] == 0).all()
