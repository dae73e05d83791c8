"""Number formats: packing against a bit string, codes against brute force over every level."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.arrays._qtypes import QTYPES, QType, decode_codes, encode_values, get_qtype, pack_codes, unpack_codes

PACKED = [qtype for qtype in QTYPES.values() if qtype.packed]
WIDE = [qtype for qtype in QTYPES.values() if not qtype.packed]
TABLES = [qtype for qtype in QTYPES.values() if qtype.kind == "table"]
FLOATS = [qtype for qtype in QTYPES.values() if qtype.kind == "float"]

pack, unpack = jax.jit(pack_codes, static_argnums=(1, 2)), jax.jit(unpack_codes, static_argnums=(1, 2))
encode, decode = jax.jit(encode_values, static_argnums=1), jax.jit(decode_codes, static_argnums=(1, 2))


def by_name(qtype: QType) -> str:
    return qtype.name


def bit_string(codes: np.ndarray, qtype: QType, axis: int) -> np.ndarray:
    """The format in words: each code plus its offset as `bits` little-endian bits, one code after the other."""
    codes = np.moveaxis(codes, axis, -1).astype(np.int64) + (2 ** (qtype.bits - 1) if qtype.kind == "int" else 0)
    bits = (codes[..., None] >> np.arange(qtype.bits)) & 1
    packed = np.packbits(bits.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")
    return np.moveaxis(packed, -1, axis)


def random_codes(rng: np.random.Generator, qtype: QType, shape: tuple[int, ...]) -> np.ndarray:
    low = -(2 ** (qtype.bits - 1)) if qtype.kind == "int" else 0
    codes = rng.integers(low, low + 2**qtype.bits, shape)
    codes.flat[:2] = low, low + 2**qtype.bits - 1
    return codes.astype(qtype.code_dtype)


@pytest.mark.parametrize("qtype", PACKED, ids=by_name)
@pytest.mark.parametrize(("shape", "axis"), [((24, 3), -2), ((2, 5, 40), -1), ((8, 1, 3), 0)])
def test_packing_is_one_little_endian_bit_string(rng, qtype, shape, axis):
    codes = random_codes(rng, qtype, shape)
    packed = pack(codes, qtype, axis)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, bit_string(codes, qtype, axis))
    back = unpack(packed, qtype, axis)
    assert back.dtype == qtype.code_dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("qtype", WIDE, ids=by_name)
def test_codes_of_whole_bytes_are_not_packed(qtype):
    codes = jnp.zeros((3, 5), qtype.code_dtype)
    assert pack_codes(codes, qtype, 0) is codes
    assert unpack_codes(codes, qtype, 0) is codes


def test_packing_refuses_a_length_that_is_no_multiple_of_eight():
    with pytest.raises(ValueError, match=r"axis 1 holds 12 codes; a multiple of 8"):
        pack_codes(jnp.zeros((2, 12), jnp.int8), get_qtype("int4"), -1)


@pytest.mark.parametrize("qtype", [q for q in QTYPES.values() if q.is_integer], ids=by_name)
def test_integers_round_half_to_even_and_saturate(rng, qtype):
    halves = np.arange(qtype.qmin - 2, qtype.qmax + 2, max(1, 2 ** (qtype.bits - 10))) + 0.5
    values = np.concatenate([halves, rng.uniform(qtype.qmin, qtype.qmax, 50), [1e30, -1e30, np.inf, -np.inf, 0.0]])
    values = np.resize(values, 1200).astype(np.float32)
    codes = np.asarray(encode(values, qtype))
    assert codes.dtype == qtype.code_dtype
    np.testing.assert_array_equal(codes, np.clip(np.rint(values.astype(np.float64)), qtype.qmin, qtype.qmax))
    np.testing.assert_array_equal(decode(codes, qtype, jnp.float32), codes.astype(np.float32))


@pytest.mark.parametrize("qtype", TABLES, ids=by_name)
def test_table_codes_are_nearest_and_ties_go_to_even_codes(rng, qtype):
    levels = np.asarray(qtype.levels, np.float64)
    ordered = np.unique(levels)
    middles = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf)]
    wild = np.asarray([0.0, -0.0, 1e-40, -1e-40, 1e38, -1e38], np.float32)
    values = np.concatenate(
        [middles, *near, ordered.astype(np.float32), rng.normal(0, 2, 500).astype(np.float32), wild]
    )
    codes = np.asarray(encode(values, qtype))
    distance = np.abs(values[:, None].astype(np.float64) - levels)
    nearest = distance == distance.min(1, keepdims=True)
    assert nearest[np.arange(len(values)), codes].all()
    canonical = nearest & ~(np.signbit(levels) & (levels == 0))  # -0.0 is never chosen
    ties = canonical.sum(1) == 2
    assert ties.sum() >= (14 if qtype.name == "mxfp4" else 0)
    np.testing.assert_array_equal(codes[ties] % 2, 0)
    np.testing.assert_array_equal(decode(codes, qtype, jnp.float32), levels[codes].astype(np.float32))


@pytest.mark.parametrize("qtype", FLOATS, ids=by_name)
def test_float8_rounds_to_nearest_even_once_and_saturates(rng, qtype):
    every = np.arange(256, dtype=np.uint8).view(qtype.code_dtype).astype(np.float64)
    every = np.unique(every[np.isfinite(every)])
    middles = (every[1:] + every[:-1]) / 2
    near = [np.nextafter(middles.astype(np.float32), np.float32(to)) for to in (-np.inf, np.inf)]
    values = np.concatenate([middles, *near, every, rng.normal(0, 50, 300), [1e30, -1e30, np.inf, -np.inf, 500, 6e4]])
    values = values.astype(np.float32)
    got = np.asarray(decode(encode(values, qtype), qtype, jnp.float32)).astype(np.float64)
    clipped = np.clip(values.astype(np.float64), qtype.qmin, qtype.qmax)
    distance = np.abs(clipped[:, None] - every)
    np.testing.assert_array_equal(np.abs(got - clipped), distance.min(1))
    ties = (distance == distance.min(1, keepdims=True)).sum(1) == 2
    assert ties.sum() >= 200
    mantissa = got[ties].astype(qtype.code_dtype).view(np.uint8) & 1
    np.testing.assert_array_equal(mantissa, 0)
    np.testing.assert_array_equal(np.signbit(got[got != 0]), np.signbit(values[got != 0]))


@pytest.mark.parametrize("qtype", FLOATS, ids=by_name)
def test_float8_keeps_nan(qtype):
    assert np.isnan(np.asarray(encode(np.full(8, np.nan, np.float32), qtype), np.float32)).all()


def test_nf4_levels_are_normal_quantiles():
    # Dettmers et al. 2023, appendix E: eight quantiles above and seven below zero, from offset 1/2 (29/30 + 31/32) down
    # to 1/2, zero itself, all divided by the greatest. The published table was computed in float32, hence 2^-22.
    offset, quantile = (29 / 30 + 31 / 32) / 2, statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*above, *below, 0.0]) / max(above)
    np.testing.assert_allclose(get_qtype("nf4").levels, expected, rtol=0, atol=2**-22)


def test_mxfp4_levels_are_e2m1():
    def value(code: int) -> float:
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
        return -magnitude if sign else magnitude

    assert get_qtype("mxfp4").levels == tuple(value(code) for code in range(16))
    assert np.signbit(get_qtype("mxfp4").levels[8])


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown qtype 'int9'; accepted: int2, .*mxfp4"):
        get_qtype("int9")
