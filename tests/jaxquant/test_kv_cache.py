import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.kv_cache import FORMATS, KVCache

HEADS, DIM = 2, 32
WINDOWS = {"float": 0, "int8": 64, "float8_e4m3fn": 0, "int4": 32, "int2": 32}
append, attend, dequantize = (jax.jit(f) for f in (KVCache.append, KVCache.attend, KVCache.dequantize))


def tokens(rng, batch, count, dtype=jnp.float32):
    return tuple(jnp.asarray(rng.normal(size=(batch, count, HEADS, DIM)), dtype) for _ in range(2))


def bound(cache, key, value):
    """Half a step of each format for tokens [B, T, K, H], as [B, K, T, H] arrays; a factor for the scale's rounding."""
    key, value = (np.abs(np.asarray(x, np.float64)).swapaxes(1, 2) for x in (key, value))
    absmax = [x.max(axis=-1, keepdims=True) for x in (key, value)]
    match cache.format:
        case "float":
            return [np.zeros_like(x) for x in (key, value)]
        case "int8":
            return [x / 254 * 1.001 for x in absmax]
        case "float8_e4m3fn":  # half a step is 1/16 of the value, or of the least normal number 2**-6
            return [np.maximum(x, m / 448 * 2**-6) / 16 * 1.001 for x, m in zip((key, value), absmax, strict=True)]
        case _:  # at most 2 absmax over the levels of 32 elements; here over all: 4.5 sigma, and float16's 2**-11
            levels = 2 ** int(cache.format[-1]) - 1
            return [np.full_like(x, x.max() * (1.001 / levels + 2**-9)) for x in (key, value)]


def check(cache, key, value, lengths):
    """The cache holds the first `lengths` of the tokens [B, T, K, H], each within half a step, and zeros after."""
    got_key, got_value = dequantize(cache)
    got = np.asarray(got_key), np.asarray(got_value).swapaxes(2, 3)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for x, original, allowed in zip(got, (key, value), bound(cache, key, value), strict=True):
        original = np.asarray(original).swapaxes(1, 2)
        for b, length in enumerate(lengths):
            assert (np.abs(x[b, :, :length] - original[b, :, :length]) <= allowed[b, :, :length] + 1e-6).all()
            assert not x[b, :, length:].any()


@pytest.mark.parametrize("format", FORMATS)
def test_appending_at_once_is_appending_one_by_one(rng, format):
    """A prompt of ragged lengths, then tokens under jit and scan."""
    key, value = tokens(rng, 3, 150)
    counts = jnp.array([0, 37, 90])
    cache = KVCache.init(3, 192, HEADS, DIM, format=format, dtype=jnp.float32, window=WINDOWS.get(format))
    at_once = append(cache, key, value, counts)
    check(at_once, key, value, counts)

    def step(cache, kv):
        index, k, v = kv
        return cache.append(k[:, None], v[:, None], (index < counts).astype(jnp.int32)), None

    steps = jnp.arange(90), key[:, :90].swapaxes(0, 1), value[:, :90].swapaxes(0, 1)
    one_by_one, _ = jax.jit(lambda c: jax.lax.scan(step, c, steps))(cache)
    for a, b in zip(dequantize(at_once), dequantize(one_by_one), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not one_by_one.overflowed.any()


@pytest.mark.parametrize("format", ["float", "int8", "int2"])
def test_a_full_cache_drops_and_says_so(rng, format):
    key, value = tokens(rng, 2, 80)
    cache = KVCache.init(2, 64, HEADS, DIM, format=format, dtype=jnp.float32, window=WINDOWS.get(format))
    cache = append(cache, key, value, jnp.array([64, 50]))
    np.testing.assert_array_equal(cache.overflowed, [False, False])
    fuller = append(cache, key[:, 50:65], value[:, 50:65])
    np.testing.assert_array_equal(fuller.overflowed, [True, True])
    check(fuller, key, value, [64, 64])
    still = append(fuller, key[:, :3], value[:, :3])
    for a, b in zip(dequantize(fuller), dequantize(still), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", ["int4", "int2"])
def test_recent_tokens_are_exact_and_a_channel_bias_costs_nothing(rng, format):
    key, value = tokens(rng, 1, 100)
    biased = key + jnp.broadcast_to(20 * jnp.asarray(rng.normal(size=(1, 1, 1, DIM)), jnp.float32), key.shape)
    cache = KVCache.init(1, 128, HEADS, DIM, format=format, dtype=jnp.float32, window=64)
    cache = append(cache, biased, value)
    got = np.asarray(dequantize(cache)[0])[0].swapaxes(0, 1)
    expected = np.asarray(biased)[0]
    np.testing.assert_array_equal(got[64:100], expected[64:])  # of 100 tokens, 2 groups of 32 have left the ring
    got_value = np.asarray(dequantize(cache)[1])[0].transpose(2, 0, 1)
    np.testing.assert_array_equal(got_value[64:100], np.asarray(value)[0, 64:])
    assert (got_value[:64] != np.asarray(value)[0, :64]).any()
    spread = np.ptp(np.asarray(key)[0, :64].reshape(2, 32, HEADS, DIM), axis=1).repeat(32, axis=0)
    levels = 2 ** int(format[-1]) - 1
    # Half a step, the rounding of a minimum of about 20 sigma and of the scale to float16's 11 bits.
    allowed = spread / levels / 2 + np.abs(expected).max() * 2.0**-11 + spread * 2.0**-11
    assert (np.abs(got[:64] - expected[:64]) <= allowed * 1.01).all()
    assert (got[:64] != expected[:64]).any()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_pages_hold_what_a_fixed_cache_holds(rng, format):
    key, value = tokens(rng, 3, 100)
    fixed = KVCache.init(3, 128, HEADS, DIM, format=format, dtype=jnp.float32, window=WINDOWS.get(format))
    paged = {"pages": 9, "page_size": 32, "format": format, "dtype": jnp.float32, "window": WINDOWS.get(format)}
    paged = KVCache.init_paged(3, 128, HEADS, DIM, **paged)
    for start, end, counts in ((0, 70, [70, 5, 0]), (70, 100, [8, 30, 1])):
        more = key[:, start:end], value[:, start:end], jnp.array(counts)
        fixed, paged = append(fixed, *more), append(paged, *more)
    for a, b in zip(dequantize(fixed), dequantize(paged), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(paged.num_free) == 9 - (3 + 2 + 1)
    query = jnp.asarray(rng.normal(size=(3, 4, DIM)), jnp.float32)
    np.testing.assert_allclose(attend(fixed, query), attend(paged, query), rtol=1e-6, atol=1e-6)


def test_pages_run_out_and_come_back(rng):
    key, value = tokens(rng, 3, 32)
    cache = KVCache.init_paged(3, 64, HEADS, DIM, pages=3, page_size=16, format="float", dtype=jnp.float32)
    cache = append(cache, key, value, jnp.array([20, 20, 10]))  # 2 pages, none left for the second, 1 for the third
    np.testing.assert_array_equal(cache.lengths, [20, 0, 10])
    np.testing.assert_array_equal(cache.overflowed, [False, True, False])
    assert int(cache.num_free) == 0
    cache = jax.jit(KVCache.release)(cache, jnp.array([True, True, False]))
    assert int(cache.num_free) == 2
    np.testing.assert_array_equal(cache.overflowed, [False, False, False])
    cache = append(cache, key, value, jnp.array([0, 32, 0]))
    held = [*np.asarray(cache.page_table[1, :2]).tolist(), int(cache.page_table[2, 0])]
    assert sorted(held) == [0, 1, 2]
    got = np.asarray(dequantize(cache)[0])
    np.testing.assert_array_equal(got[1, :, :32], np.asarray(key)[1].swapaxes(0, 1))
    np.testing.assert_array_equal(got[2, :, :10], np.asarray(key)[2, :10].swapaxes(0, 1))


@pytest.mark.parametrize("format", FORMATS)
def test_attention_over_the_cache_is_attention_over_its_floats(rng, format):
    key, value = tokens(rng, 2, 100)
    cache = KVCache.init(2, 128, HEADS, DIM, format=format, dtype=jnp.float32, window=WINDOWS.get(format))
    cache = append(cache, key, value, jnp.array([100, 9]))
    query = jnp.asarray(rng.normal(size=(2, 4, DIM)), jnp.float32)
    k, v = (np.asarray(x, np.float64).repeat(2, axis=1) for x in dequantize(cache))
    for b, length in enumerate((100, 9)):
        scores = np.einsum("nh,nsh->ns", np.asarray(query[b], np.float64), k[b, :, :length]) / np.sqrt(DIM)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = np.einsum("ns,nhs->nh", p / p.sum(axis=1, keepdims=True), v[b, :, :, :length])
        np.testing.assert_allclose(attend(cache, query)[b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_static_scales(rng, format):
    """A token has its head's scale: larger ones than in calibration are clipped, what is not finite shows."""
    key, value = tokens(rng, 1, 8)
    absmax = jnp.array([1.0, 9.0]), jnp.array([2.0, 9.0])
    cache = KVCache.init(
        1, 32, HEADS, DIM, format=format, dtype=jnp.float32, window=0, key_absmax=absmax[0], value_absmax=absmax[1]
    )
    cache = append(cache, key, value)
    got = np.asarray(dequantize(cache)[0]), np.asarray(dequantize(cache)[1]).swapaxes(2, 3)
    for x, original, largest in zip(got, (key, value), absmax, strict=True):
        largest = np.asarray(largest)[None, :, None, None]
        clipped = np.clip(np.asarray(original).swapaxes(1, 2), -largest, largest)
        step = largest / 254 if format == "int8" else np.maximum(np.abs(clipped), largest / 448 * 2**-6) / 16
        assert (np.abs(x[:, :, :8] - clipped) <= step * 1.001).all()
    assert (np.abs(np.asarray(key)[..., 0, :]) > 1).any()
    assert np.isnan(attend(append(cache, key.at[0, 3, 0, 5].set(jnp.inf), value), jnp.ones((1, 4, DIM)))).any()


def test_layers_scan_over_stacked_caches(rng):
    key, value = tokens(rng, 2, 8)
    one = KVCache.init(2, 32, HEADS, DIM)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), one)
    _, stacked = jax.lax.scan(lambda _, cache: (None, cache.append(key, value)), None, stacked)
    expected = one.append(key, value)
    for got, leaf in zip(jax.tree.leaves(stacked), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got[2], leaf)


def test_bytes_per_token():
    """2 K H codes, and the scales as documented."""
    expected = {"float": 4 * 2 * 128, "int8": 2 * 2 * 128 + 16, "float8_e4m3fn": 2 * 2 * 128 + 16}
    expected |= {"int4": 5 * 2 * 2 * 128 / 8, "int2": 3 * 2 * 2 * 128 / 8}  # 32 bits of scale and minimum for 32 codes
    for format in FORMATS:
        assert KVCache.init(2, 64, 2, 128, format=format).bytes_per_token == expected[format]


@pytest.mark.parametrize("format", FORMATS)
def test_a_value_that_is_not_finite_is_not_hidden(rng, format):
    key, value = tokens(rng, 1, 40)
    cache = KVCache.init(1, 64, HEADS, DIM, format=format, dtype=jnp.float32, window=WINDOWS.get(format))
    broken = append(cache, key.at[0, 3, 0, 5].set(jnp.inf), value)
    assert np.isnan(attend(broken, jnp.ones((1, 4, DIM)))).any()
    broken = append(cache, key, value.at[0, 3, 0, 5].set(jnp.nan))
    assert np.isnan(attend(broken, jnp.ones((1, 4, DIM)))).any()
    # 0 times NaN is NaN: what is left of it in released memory must not be among the values.
    stores = broken.value, broken.value_scale, broken.value_offset, broken.recent_value
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in stores if x is not None)


def test_bad_input_is_named(rng):
    with pytest.raises(ValueError, match="format must be one of"):
        KVCache.init(1, 64, 2, 32, format="int3")
    with pytest.raises(ValueError, match="groups of 32"):
        KVCache.init(1, 70, 2, 32, format="int4")
    with pytest.raises(ValueError, match="window must be"):
        KVCache.init(1, 64, 2, 32, format="int2", window=0)
    with pytest.raises(ValueError, match="groups of 32"):
        KVCache.init_paged(1, 64, 2, 32, pages=4, page_size=16, format="int4")
    with pytest.raises(ValueError, match="value_absmax: static scales"):
        KVCache.init(1, 64, 2, 32, key_absmax=jnp.ones(2))
    with pytest.raises(ValueError, match="key_absmax: static scales"):
        KVCache.init(1, 64, 2, 32, format="int4", key_absmax=jnp.ones(2), value_absmax=jnp.ones(2))
    cache = KVCache.init(2, 64, HEADS, DIM)
    key, value = tokens(rng, 2, 3)
    with pytest.raises(ValueError, match="value must be floating"):
        cache.append(key, value[:, :2])
    with pytest.raises(ValueError, match="key must be floating"):
        cache.append(key[..., :16], value)
    with pytest.raises(ValueError, match="counts must be"):
        cache.append(key, value, jnp.ones((2,)))
    assert dataclasses.replace(cache).capacity == 64
