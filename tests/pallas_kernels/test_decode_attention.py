import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import Cache, Config, decode_attention, default_config, supports
from pallas_kernels.decode_attention.config import SHARED_MEMORY_BYTES, shared_memory


def operands(rng, batch=3, heads=6, kv_heads=2, tokens=48, head_dim=64):
    q = jnp.asarray(rng.normal(size=(batch, heads, head_dim)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(batch, kv_heads, tokens, head_dim)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(batch, kv_heads, head_dim, tokens)), jnp.float32)
    return q, k, v


def codes(rng, shape):
    scale = rng.uniform(0.01, 0.05, size=shape[:3])
    return jnp.asarray(rng.integers(-127, 128, size=shape), jnp.int8), jnp.asarray(scale, jnp.float32)


def exact(q, k, v, lengths):
    """Attention in float64; v transposed as the cache holds it."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    out = np.zeros(q.shape)
    for b, length in enumerate(np.asarray(lengths)):
        for n in range(q.shape[1]):
            scores = k[b, n, :length] @ q[b, n] / np.sqrt(q.shape[2])
            p = np.exp(scores - scores.max(initial=-np.inf))
            out[b, n] = v[b, n, :, :length] @ p / max(p.sum(), 1e-300)
    return out


# float32 sums of 64 products and 48 weights of order 1: a few dozen roundings of 2**-24 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_float_cache_of_ragged_lengths(rng):
    q, k, v = operands(rng)
    lengths = jnp.array([48, 1, 0])
    np.testing.assert_allclose(decode_attention(q, k, v, lengths), exact(q, k, v, lengths), **CLOSE)


def test_8_bit_cache_is_attention_over_the_dequantized(rng):
    q, k, _ = operands(rng)
    lengths = jnp.array([17, 48, 33])
    (k_codes, k_scale), (v_codes, v_scale) = codes(rng, k.shape), codes(rng, k.shape)
    v_codes = v_codes.swapaxes(2, 3)
    floats = k_codes.astype(jnp.float32) * k_scale[..., None], v_codes.astype(jnp.float32) * v_scale[:, :, None]
    out = decode_attention(q, k_codes, v_codes, lengths, k_scale=k_scale, v_scale=v_scale)
    np.testing.assert_allclose(out, exact(q, *floats, lengths), **CLOSE)


def test_pages_in_any_order(rng):
    q, k, v = operands(rng)
    lengths = jnp.array([40, 16, 3])
    pages = rng.permutation(9)
    table = jnp.asarray(pages.reshape(3, 3), jnp.int32)
    place = jnp.argsort(jnp.asarray(pages))
    k_pages = k.reshape(3, 2, 3, 16, 64).swapaxes(1, 2).reshape(9, 2, 16, 64)[place]
    v_pages = v.reshape(3, 2, 64, 3, 16).transpose(0, 3, 1, 2, 4).reshape(9, 2, 64, 16)[place]
    out = decode_attention(q, k_pages, v_pages, lengths, page_table=table)
    np.testing.assert_allclose(out, exact(q, k, v, lengths), **CLOSE)


def test_what_lies_past_the_length_does_not_matter(rng):
    q, k, v = operands(rng)
    lengths = jnp.array([5, 48, 20])
    past = jnp.arange(48)[None] >= lengths[:, None]
    dirty = jnp.where(past[:, None, :, None], jnp.nan, k), jnp.where(past[:, None, None], jnp.nan, v)
    np.testing.assert_array_equal(decode_attention(q, *dirty, lengths), decode_attention(q, k, v, lengths))
    beyond = decode_attention(q, k, v, jnp.array([99, 48, 49]))
    np.testing.assert_array_equal(beyond, decode_attention(q, k, v, jnp.array([48, 48, 48])))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 4096), (16, 4096), (16, 32768), (64, 8192), (128, 8192)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.uint8])
def test_the_default_configuration_fits(batch, tokens, dtype):
    q = jax.ShapeDtypeStruct((batch, 32, 128), jnp.bfloat16)
    shape = jax.ShapeDtypeStruct
    cache = Cache(shape((batch, 8, tokens, 128), dtype), shape((batch, 8, 128, tokens), dtype))
    if dtype == jnp.uint8:
        packed = shape((batch, 8, tokens // 2, 128), dtype), shape((batch, 8, 64, tokens), dtype)
        recent = shape((batch, 8, 128, 128), jnp.bfloat16)
        cache = Cache(*packed, recent_k=recent, recent_v=recent)
    config = default_config(q, cache)
    assert supports(q, cache, config) is None
    assert shared_memory(q, cache, config) <= SHARED_MEMORY_BYTES
    assert batch * 8 * config.split >= 132 or config.split == 8  # no multiprocessor idles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 3, 64))}, "agree in head_dim"),
        ({"v": jnp.ones((2, 2, 16, 64))}, "v must be k transposed"),
        ({"lengths": jnp.ones((3,), jnp.int32)}, "lengths must be"),
        ({"k_scale": jnp.ones((2, 2, 16))}, "k_scale must be given for 8-bit"),
        ({"page_table": jnp.zeros((3, 1), jnp.int32)}, "page_table must be"),
        ({"implementation": "triton"}, "implementation must be"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v = jnp.ones((2, 4, 64)), jnp.ones((2, 2, 16, 64)), jnp.ones((2, 2, 64, 16))
    given = {"q": q, "k": k, "v": v, "lengths": jnp.ones((2,), jnp.int32)} | change
    with pytest.raises(ValueError, match=message):
        decode_attention(**given)


def test_refusals_say_why():
    q, k = jnp.ones((1, 4, 96), jnp.bfloat16), jnp.ones((1, 2, 64, 96), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="head_dim must be one of"):
        decode_attention(q, k, k.swapaxes(2, 3), jnp.array([3]), implementation="mosaic_gpu")
    cache = Cache(k, k.swapaxes(2, 3))
    assert "bfloat16 or float16" in supports(q.astype(jnp.float32), cache, Config())
    with pytest.raises(ValueError, match="split must be"):
        Config(split=9)
