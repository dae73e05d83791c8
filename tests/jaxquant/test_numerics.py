"""Ranges, scales and rounding: derived bounds, brute force in float64, and the awkward ends of every dtype."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.arrays._numerics import (
    ERROR_NORM,
    all_finite,
    decode,
    encode,
    expand_grid,
    find_scale,
    grid_shape,
    padded_length,
    range_to_scale,
    reduce_cells,
    search_shrink,
)
from jaxquant.arrays._qtypes import QTYPES
from jaxquant.arrays._spec import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, TensorSpec

TINY = float(np.finfo(np.float32).tiny)
SHAPE, AXIS = (64, 24), (-2,)
GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(16), PerBlock((32, 8)))
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@functools.partial(jax.jit, static_argnums=1)
def quantize(w, spec):
    """(codes, scale, zero point or None, decoded) of a float32 matrix."""
    scale, zero_point = find_scale(w, grid_shape(w.shape, AXIS, spec.granularity), spec)
    codes = encode(w, scale, zero_point, spec)
    return codes, scale, zero_point, decode(codes, scale, zero_point, spec)


def spread(grid, shape=SHAPE) -> np.ndarray:
    """A grid repeated to its tensor's shape, in float64."""
    grid = np.asarray(grid).astype(np.float64)
    for dim, size in enumerate(shape):
        grid = np.repeat(grid, size // grid.shape[dim], dim)
    return grid


def reduce_in_numpy(reduction, x: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    cells = x.reshape([n for size, count in zip(x.shape, grid, strict=True) for n in (count, size // count)])
    return reduction(cells, axis=tuple(range(1, 2 * x.ndim, 2)))


def exact_scale(w: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, float]:
    """(|scale| before rounding to its dtype, in float64; what the range is in units of it)."""
    grid, qtype, w = grid_shape(w.shape, AXIS, spec.granularity), spec.format, w.astype(np.float64)
    if not spec.symmetric:
        high, low = reduce_in_numpy(np.max, np.maximum(w, 0), grid), reduce_in_numpy(np.min, np.minimum(w, 0), grid)
        return (high - low) / qtype.qmax, qtype.qmax
    absmax, half = reduce_in_numpy(np.max, np.abs(w), grid), 2 ** (qtype.bits - 1)
    span = {"full": half - 0.5, "restricted": half - 1, "power": half, "signed": half}[spec.grid]
    span = span if spec.format.kind == "int" else qtype.qmax
    if spec.qtype == "mxfp4":
        return np.where(absmax > 0, 2.0 ** (np.frexp(absmax)[1] - 3), 0), 8.0
    return absmax / span, span


def error_bound(w: np.ndarray, spec: TensorSpec, scale: np.ndarray) -> np.ndarray:
    """How far a dequantized weight may be from the weight.

    With s the exact scale, s' the stored one and S the range in units of s, values reach S s / s' in units of s', and
    the outermost code lies at q. Inside, the error is at most half the gap g between codes; what is clipped misses by
    at most S s - q s' <= (S - q) s' + S |s - s'|. So

        |w - dequantized| <= max(g / 2, S - q) |s'| + S |s - s'|,

    where the second term is the scale's own rounding. For an unsigned format the rounded zero point moves both ends by
    at most 1/2, and S = 2^b - 1 gives the same line with g / 2 alone. float32 arithmetic (an inverse and two products,
    each half an ulp, and ties decided in between) adds 2^-22 |w|max, and XLA may flush denormals to zero.
    """
    s, span = exact_scale(w, spec)
    s, stored = spread(s), np.abs(spread(scale))
    qtype, magnitude = spec.format, np.abs(w.astype(np.float64))
    if qtype.kind == "float":  # half a unit in the last place: relative above the least normal, absolute below it
        info = jnp.finfo(qtype.name)
        steps = np.maximum(magnitude * 2.0 ** -(info.nmant + 1), stored * float(info.smallest_subnormal) / 2)
    elif qtype.kind == "table":
        levels = np.unique(qtype.levels)
        steps = stored * max(np.diff(levels).max() / 2, span - qtype.qmax)
    else:
        steps = stored * (0.5 if not spec.symmetric else max(0.5, span - qtype.qmax))
    rounding = np.where(s > 0, span * np.abs(s - stored), 0)
    return steps + rounding + 2.0**-22 * spread(reduce_in_numpy(np.max, magnitude, np.shape(scale))) + 4 * TINY


def best_error(w: np.ndarray, spec: TensorSpec, scale, zero_point) -> np.ndarray:
    """The least error any code could give under the stored scale and zero point: brute force over all of them."""
    qtype = spec.format
    if qtype.kind == "float":
        levels = np.arange(256, dtype=np.uint8).view(qtype.code_dtype).astype(np.float64)
        levels = np.unique(levels[np.isfinite(levels)])
    elif qtype.kind == "table":
        levels = np.unique(qtype.levels)
    else:
        levels = np.arange(qtype.qmin, qtype.qmax + 1)
    offset = 0 if zero_point is None else spread(zero_point)[..., None]
    return np.abs((levels - offset) * spread(scale)[..., None] - w[..., None].astype(np.float64)).min(-1)


def wild_weights(rng: np.random.Generator, magnitude: float) -> np.ndarray:
    """Normal values with outliers, exact ties of magnitude, one-sided and zero columns, and a row of tiny values."""
    w = rng.normal(size=SHAPE)
    w[rng.integers(0, 64, 5), rng.integers(0, 24, 5)] *= 50
    w[:, 0], w[:, 1], w[:, 2] = 0, np.abs(w[:, 1]), -np.abs(w[:, 2])
    w[:, 3] = np.sign(w[:, 3])
    w[:32, 4] = 0
    w[40] *= 1e-12
    return (w * magnitude).astype(np.float32)


@st.composite
def tensor_specs(draw):
    qtype = draw(st.sampled_from(sorted(QTYPES)))
    grids = ["full", "restricted", "power", "signed"] if QTYPES[qtype].kind == "int" else ["full"]
    scale_dtype = "float32" if qtype == "int16" else draw(st.sampled_from(sorted(UNIT_ROUNDOFF)))
    return TensorSpec(
        qtype, draw(st.sampled_from(GRANULARITIES)), grid=draw(st.sampled_from(grids)), scale_dtype=scale_dtype
    )


@hypothesis.settings(max_examples=30)
@hypothesis.given(tensor_specs(), st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 3000.0, 1e34]), st.integers(0, 2**32 - 1))
def test_errors_are_bounded_and_codes_are_the_nearest(spec, magnitude, seed):
    if spec.scale_dtype == "float16":  # its scales saturate at 65504
        magnitude = min(max(magnitude, 1e-7), 200.0)
    w = wild_weights(np.random.default_rng(seed), magnitude)
    codes, scale, zero_point, decoded = jax.tree.map(np.asarray, quantize(w, spec))
    assert codes.dtype == spec.format.code_dtype
    assert str(scale.dtype) == spec.scale_dtype
    check_scale(w, spec, scale, zero_point)
    error = np.abs(decoded.astype(np.float64) - w)
    assert (error <= error_bound(w, spec, scale)).all()
    if spec.qtype != "int16":
        slop = 2.0**-22 * np.maximum(np.abs(w), np.abs(decoded)) + 4 * TINY
        assert (error <= best_error(w, spec, scale, zero_point) + slop).all()
    np.testing.assert_array_equal(decoded[w == 0], 0)


def check_scale(w, spec, scale, zero_point):
    """The stored scale is the exact one, rounded once; the zero point is the nearest code to where zero lies."""
    exact, span = exact_scale(w, spec)
    stored, live = np.abs(scale.astype(np.float64)), exact > 0
    # XLA divides by a constant as a product with its rounded inverse: two more roundings in float32.
    allowed = (UNIT_ROUNDOFF[spec.scale_dtype] + 2.0**-22) * exact
    if spec.scale_dtype == "float16":  # below 2^-14 its numbers are 2^-24 apart
        allowed = np.maximum(allowed, 2.0**-24)
    assert (np.abs(stored - exact) <= allowed)[live].all()
    np.testing.assert_array_equal(stored[~live], 1)
    if zero_point is not None:
        low = reduce_in_numpy(np.min, np.minimum(w, 0), scale.shape).astype(np.float64)
        expected = np.clip(np.rint(-low / stored), 0, span)
        close_to_tie = np.abs(-low / stored % 1 - 0.5) < 2.0**-14
        np.testing.assert_array_equal(zero_point[~close_to_tie], expected[~close_to_tie])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_rounds_to_the_nearest_code(rng, name):
    spec, w = PRESETS[name].weight, rng.normal(0, 0.05, (128, 24)).astype(np.float32)
    _, scale, zero_point, decoded = jax.tree.map(np.asarray, quantize(w, spec))
    groups = 128 // getattr(spec.granularity, "size", 128)
    assert scale.shape == ((1, 1) if spec.granularity == PerTensor() else (groups, 24))
    levels_by_cell = []
    for column in range(24):  # straight from the definition: each group's levels, and of those the nearest
        for rows in np.split(np.arange(128), groups):
            cell = w[rows, column].astype(np.float64)
            s = float(scale[min(rows[0] * groups // 128, groups - 1), column if scale.shape[1] > 1 else 0])
            z = 0.0 if zero_point is None else float(zero_point[rows[0] * groups // 128, column])
            if spec.format.kind == "float":
                levels = np.arange(256, dtype=np.uint8).view(spec.format.code_dtype).astype(np.float64)
                levels = levels[np.isfinite(levels)]
            else:
                levels = np.asarray(spec.format.levels or np.arange(spec.format.qmin, spec.format.qmax + 1))
            levels = (levels - z) * s
            best = np.abs(cell[:, None] - levels).min(1)
            levels_by_cell.append((np.abs(decoded[rows, column] - cell), best, np.abs(cell)))
    error, best, size = (np.concatenate(part) for part in zip(*levels_by_cell, strict=True))
    assert (error <= best + 2.0**-22 * size).all()
    assert error.mean() > 0


@pytest.mark.parametrize(("bits", "scale_dtype"), [(2, "bfloat16"), (3, "float32"), (4, "float16"), (8, "bfloat16")])
def test_the_signed_grid_puts_the_extreme_on_the_lowest_code(rng, bits, scale_dtype):
    # The stored scale is off by at most 2^-8 (bfloat16), which moves 2^7 by 1/2 at most: half to even stays on 2^7.
    w = rng.normal(size=SHAPE).astype(np.float32)
    codes, scale, _, _ = jax.tree.map(
        np.asarray, quantize(w, TensorSpec(f"int{bits}", grid="signed", scale_dtype=scale_dtype))
    )
    extreme, columns = np.abs(w).argmax(0), np.arange(24)
    np.testing.assert_array_equal(codes[extreme, columns], -(2 ** (bits - 1)))
    np.testing.assert_array_equal(np.sign(scale[0].astype(np.float32)), -np.sign(w[extreme, columns]))


def test_the_grids_differ_as_their_names_say():
    w = np.zeros(SHAPE, np.float32)
    w[0], w[1] = -6.0, 3.0
    scales = {
        g: float(quantize(w, TensorSpec("int4", grid=g))[1][0, 0]) for g in ("full", "restricted", "power", "signed")
    }
    expected = {"full": 12 / 15, "restricted": 6 / 7, "power": 6 / 8, "signed": 6 / 8}
    assert scales == pytest.approx(expected, rel=2.0**-22)
    assert float(quantize(-w, TensorSpec("int4", grid="signed"))[1][0, 0]) == -6 / 8


@pytest.mark.parametrize(
    ("qtype", "scale_dtype"),
    [
        *((qtype, "float32") for qtype in ("int2", "int8", "uint2", "uint8", "float8_e4m3fn", "nf4", "mxfp4")),
        ("int2", "bfloat16"),
        *((qtype, "float16") for qtype in ("int8", "uint4", "mxfp4")),
    ],
)
def test_huge_and_denormal_weights_stay_finite(qtype, scale_dtype):
    w = np.zeros(SHAPE, np.float32)
    w[:, 0], w[:, 1], w[::2, 2], w[1::2, 2] = 1e38, -1e38, 2e38, -2e38
    w[:, 3], w[:, 4], w[5, 5] = 1e-40, 1e-38, 1e-45
    _, scale, _, decoded = jax.tree.map(np.asarray, quantize(w, TensorSpec(qtype, scale_dtype=scale_dtype)))
    wide = scale.astype(np.float64)
    assert np.isfinite(wide).all()
    assert (wide > 0).all()
    assert np.isfinite(decoded).all()
    if scale_dtype != "float16":
        assert (
            np.abs(decoded - w.astype(np.float64)) <= error_bound(w, TensorSpec(qtype, scale_dtype=scale_dtype), scale)
        ).all()
        assert (np.abs(decoded[:, :3]) >= np.abs(w[:, :3]) / 3).all()  # 2-bit codes are thirds of the range apart


def test_a_power_of_two_scale_is_exact_over_the_whole_range():
    exponents = np.arange(-126, 128)
    w = np.ldexp(np.ones((1, exponents.size), np.float32), exponents)
    below = np.nextafter(w, 0).astype(np.float32)
    for values, expected in ((w, exponents - 2), (below[:, 1:], exponents[1:] - 3)):
        scale, _ = jax.jit(range_to_scale, static_argnums=2)(-values, values, TensorSpec("mxfp4"))
        np.testing.assert_array_equal(np.log2(np.asarray(scale, np.float64))[0], np.maximum(expected, -126))


@pytest.mark.parametrize(
    "spec",
    [TensorSpec(range="percentile"), TensorSpec("int4", grid="signed", range="mse"), TensorSpec("uint4", range="mse")],
)
def test_zeros_come_back_as_zeros(spec):
    _, scale, _, decoded = quantize(np.zeros(SHAPE, np.float32), spec)
    np.testing.assert_array_equal(decoded, 0)
    np.testing.assert_array_equal(scale, 1)


MSE_SPECS = [
    TensorSpec("int4", PerGroup(16), "mse", scale_dtype="bfloat16"),
    TensorSpec("int3", PerChannel(), "mse", grid="signed"),
    TensorSpec("uint4", PerGroup(16), "mse", scale_dtype="bfloat16"),
    TensorSpec("nf4", PerGroup(16), "mse"),
]


@pytest.mark.parametrize("spec", MSE_SPECS, ids=lambda spec: spec.qtype)
def test_a_searched_range_never_loses_to_absmax_in_its_own_norm(rng, spec):
    w = rng.standard_t(3, SHAPE).astype(np.float32)
    plain = TensorSpec(spec.qtype, spec.granularity, "absmax", grid=spec.grid, scale_dtype=spec.scale_dtype)
    (_, scale, _, searched), (_, _, _, absmax) = quantize(w, spec), quantize(w, plain)

    def total(decoded):
        return reduce_in_numpy(np.sum, np.abs(np.asarray(decoded, np.float64) - w) ** ERROR_NORM, scale.shape)

    # The search sums 64 float32 terms: 64 roundings of 2^-24, and as much again for the powers.
    assert (total(searched) <= total(absmax) * (1 + 2.0**-16)).all()
    assert total(searched).sum() < total(absmax).sum()


def test_the_search_is_scale_free(rng):
    w, spec = rng.standard_t(3, SHAPE).astype(np.float32), MSE_SPECS[0]
    codes, scale, _, _ = quantize(w, spec)
    for exponent in (-90, 90):
        again, rescaled, _, _ = quantize(np.ldexp(w, exponent), spec)
        np.testing.assert_array_equal(codes, again)
        np.testing.assert_array_equal(
            np.ldexp(np.asarray(scale, np.float64), exponent), np.asarray(rescaled, np.float64)
        )


def test_the_search_heeds_importance(rng):
    w, spec = rng.normal(size=SHAPE).astype(np.float32), TensorSpec("int4")
    w[0] = 20.0
    high = np.abs(w).max(0, keepdims=True)
    shrink = jax.jit(search_shrink, static_argnums=3)
    unimportant = np.ones(SHAPE, np.float32)
    unimportant[0] = 0
    assert (shrink(w, -high, high, spec, unimportant) < 0.5).all()
    assert (shrink(w, -high, high, spec, 1 - unimportant) > 0.9).all()


def test_percentile_cuts_the_tail_as_numpy_does(rng):
    w = rng.normal(size=SHAPE).astype(np.float32)
    w[7, :], w[:, 0], w[3, 0] = 100.0, 0.0, 5.0
    _, scale, _, _ = quantize(w, TensorSpec("int8", range="percentile", percentile=95.0))
    expected = np.percentile(np.abs(w), 95.0, axis=0)
    expected[0] = 5.0  # all but one element are zero: the range stays
    np.testing.assert_allclose(scale[0], expected / 127.5, rtol=2.0**-20)
    whole, absmax = (quantize(w, TensorSpec("int8", range=r, percentile=100.0))[1] for r in ("percentile", "absmax"))
    np.testing.assert_allclose(whole, absmax, rtol=2.0**-22)


def test_methods_for_activations_are_refused_for_weights():
    with pytest.raises(ValueError, match="range='kl' is a method for calibrated activations"):
        find_scale(jnp.ones(SHAPE), (1, 24), TensorSpec(range="kl"))


@pytest.mark.parametrize(
    ("shape", "axis", "granularity", "expected"),
    [
        ((64, 24), (-2,), PerTensor(), (1, 1)),
        ((3, 64, 24), (-2,), PerTensor(), (3, 1, 1)),
        ((2, 3, 64, 24), (-2,), PerChannel(), (2, 3, 1, 24)),
        ((24, 64), (-1,), PerChannel(), (24, 1)),
        ((24, 64), (-1,), PerGroup(16), (24, 4)),
        ((64, 24), (-2,), PerGroup(64), (1, 24)),
        ((64, 24), (-2,), PerGroup(1), (64, 24)),
        ((64,), (-1,), PerGroup(16), (4,)),
        ((64, 4, 8), (-3,), PerChannel(), (1, 4, 8)),
        ((64, 4, 8), (-3,), PerTensor(), (1, 1, 1)),
        ((5, 4, 16, 64), (-3, -2), PerChannel(), (5, 1, 1, 64)),
        ((4, 16, 64), (-3, -2), PerGroup(8), (4, 2, 64)),
        ((4, 16, 64), (-3, -2), PerGroup(32), (2, 1, 64)),
        ((4, 16, 64), (-3, -2), PerGroup(64), (1, 1, 64)),
        ((3, 3, 8, 32), (-4, -3, -2), PerGroup(24), (3, 1, 1, 32)),
        ((64, 24), (-2,), PerBlock((32, 8)), (2, 3)),
        ((7, 64, 24), (-2,), PerBlock((64, 24)), (7, 1, 1)),
        ((64, 4, 8), (-3,), PerBlock((16, 8)), (4, 4, 1)),
    ],
)
def test_grid_shapes(shape, axis, granularity, expected):
    assert grid_shape(shape, axis, granularity) == expected
    assert padded_length(shape, axis, granularity) == shape[axis[-1]]


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [((100, 8), (-2,), 128), ((4, 48, 8), (-3, -2), 64), ((6, 20, 8), (-3, -2), 8), ((7, 8), (-2,), 2)],
)
def test_a_group_that_does_not_fit_is_answered_with_sizes_that_do(shape, axis, size):
    length = " x ".join(str(shape[a]) for a in axis)
    with pytest.raises(
        ValueError, match=f"group size {size} does not divide the contracting length {length};"
    ) as caught:
        grid_shape(shape, axis, PerGroup(size))
    message = str(caught.value)
    assert "pad=True" in message
    suggested = message.split("sizes that would: ")[1].split(";")[0]
    if max(math.prod(shape[a] for a in axis), 0) < 8:
        assert suggested == "none of 8 or more"
    else:
        for fitting in map(int, suggested.split(", ")):
            grid_shape(shape, axis, PerGroup(fitting))
    padded = list(shape)
    padded[axis[-1]] = padded_length(shape, axis, PerGroup(size))
    assert shape[axis[-1]] <= padded[axis[-1]] < shape[axis[-1]] + size
    grid_shape(tuple(padded), axis, PerGroup(size))


def test_blocks_need_columns_that_divide_behind_the_contracting_axes():
    with pytest.raises(
        ValueError, match="block columns 128 do not divide the 192 outputs; sizes that would: 48, 64, 96, 192"
    ):
        grid_shape((256, 192), (-2,), PerBlock((128, 128)))
    with pytest.raises(ValueError, match="PerBlock needs an output axis behind the contracting axes"):
        grid_shape((256, 256), (-1,), PerBlock((128, 128)))
    with pytest.raises(ValueError, match="group size 96 does not divide the contracting length 256"):
        grid_shape((256, 256), (-2,), PerBlock((96, 128)))


@pytest.mark.parametrize(
    ("shape", "grid"), [((6, 8), (3, 2)), ((4, 6, 10), (4, 1, 5)), ((2, 3), (2, 3)), ((12,), (1,))]
)
def test_grids_reduce_and_expand_as_repeats(rng, shape, grid):
    x = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(reduce_cells(jnp.max, x, grid), reduce_in_numpy(np.max, x, grid))
    cells = rng.normal(size=grid).astype(np.float32)
    np.testing.assert_array_equal(expand_grid(jnp.asarray(cells), shape), spread(cells, shape).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_bad_element_anywhere_is_found(rng, dtype):
    finite = jax.jit(all_finite)
    w = rng.normal(size=(257, 33)).astype(jnp.dtype(dtype))
    assert finite(w)
    largest = np.full_like(w, jnp.finfo(dtype).max)  # whose sum overflows
    assert finite(largest)
    for bad in ([np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]):
        for clean in (w, largest):
            spoilt = clean.copy()
            spoilt.flat[rng.choice(spoilt.size, len(bad), replace=False)] = bad
            assert not finite(spoilt)


def test_finiteness_is_found_under_vmap(rng):
    stack = rng.normal(size=(3, 16, 8)).astype(np.float32)
    stack[1, 5, 5] = np.nan
    np.testing.assert_array_equal(jax.vmap(all_finite)(stack), [True, False, True])
