import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import MODES, Config, attention, supports
from pallas_kernels.attention.cases import CORRECTNESS, Case
from pallas_kernels.attention.quantize import (
    E4M3,
    INT8,
    keys_mean,
    quantize_keys,
    quantize_queries,
    quantize_values,
)
from pallas_kernels.attention.reference import Masking, auto_mode
from pallas_kernels.attention.tiles import key_tiles

OP = importlib.import_module("pallas_kernels.attention")


def operands(rng, case: Case, biased: bool = False, dtype=np.float32):
    q = rng.normal(size=(case.batch, case.tokens, case.heads, case.head_dim))
    k, v = rng.normal(size=(2, case.batch, case.kv_tokens, case.kv_heads, case.head_dim))
    if biased:
        channels = (case.batch, 1, case.kv_heads, case.head_dim)
        k = k + 8 * rng.normal(size=channels)
        v = v * np.where(rng.uniform(size=channels) < 0.05, 20.0, 1.0)
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def options(case: Case) -> dict:
    return {key: jnp.array(value) if key.endswith("lengths") else value for key, value in case.options.items()}


def e4m3(x):
    """NumPy's values rounded to e4m3."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(E4M3), np.float64)


def exact(q, k, v, case: Case, *, bias=0.0, mask=True, rounded=False):
    """Attention in float64, or with P and V rounded to e4m3 around exact scores."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = case.heads // case.kv_heads
    if rounded:
        step = np.abs(v).max(axis=1, keepdims=True) / 448
        v = e4m3(v / step) * step
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(case.head_dim) + bias
    query, key = np.arange(case.tokens)[:, None], np.arange(case.kv_tokens)[None]
    window = case.options.get("window", (None, None))
    left, right = window if isinstance(window, tuple) else (window, window)
    seen = np.broadcast_to(mask, scores.shape).copy()
    if left is not None:
        seen &= key >= query - left
    if right is not None:
        seen &= key <= query + right
    if case.options.get("causal"):
        seen &= key <= query
    for name, token in (("query_lengths", query), ("kv_lengths", key)):
        if name in case.options:
            seen &= token < np.array(case.options[name])[:, None, None, None]
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    total = p.sum(axis=-1).transpose(0, 2, 1)[..., None]
    if rounded:
        p = e4m3(p * 448) / 448
    return np.einsum("bnts,bsnh->btnh", p, v) / np.where(total == 0, 1, total)


def error(out, ref) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - ref) / np.linalg.norm(ref))


@pytest.mark.parametrize("name", CORRECTNESS)
def test_modes_approach_exact_attention(rng, name):
    """Every mode computes the masked softmax attention of float64 up to its own rounding."""
    case = CORRECTNESS[name]
    qkv = operands(rng, case)
    ref = exact(*qkv, case)
    # An 8-bit float's rounding errs by at most 1/16 of a value, and about 1/40 in the mean, in each operand; int8 of
    # normal values less. Two roundings in each product: all modes stay under 5/64 in norm, the float product far under.
    run = jax.jit(lambda *x: [attention(*x, mode=mode, **options(case)) for mode in MODES])
    for mode, out in zip(MODES, run(*qkv), strict=True):
        assert error(out, ref) < (1 / 64 if mode == "int8_f16" else 5 / 64), mode


@pytest.mark.parametrize("biased", [False, True])
def test_int8_scores_cost_little_beside_8_bit_weights(rng, biased):
    """Int8 scores around fp8 P V, and around float P V, on plain inputs and on biased K and outlier V channels."""
    case = Case(1, 512, 512, 4, 4, 128)
    qkv = operands(rng, case, biased)
    ref = exact(*qkv, case)
    bound = error(exact(*qkv, case, rounded=True), ref)
    # Of draws, the ratio is 1.045 +- 0.002, +- 0.007 where few channels make up the norm: seven deviations and more.
    assert error(attention(*qkv, mode="int8_fp8"), ref) < 1.1 * bound
    # 1.1e-2 is SageAttention's own error, per block of 128 x 64: +- 2e-4, +- 6e-4 where few channels make up the norm.
    assert error(attention(*qkv, mode="int8_f16"), ref) < 1.55e-2


def test_smoothing_makes_a_channel_bias_of_keys_invisible(rng):
    case = Case(1, 64, 96, 2, 2, 64)
    _, k, _ = operands(rng, case)
    shift = jnp.asarray(50 * rng.normal(size=(1, 1, 2, 64)), jnp.float32)
    plain, shifted = (quantize_keys(x, INT8, 32) for x in (k, k + jnp.broadcast_to(shift, k.shape)))
    np.testing.assert_allclose(plain.scale, shifted.scale, rtol=1e-4)  # float32 rounding of values 50 times larger
    assert np.abs(np.asarray(plain.codes, np.int32) - np.asarray(shifted.codes, np.int32)).max() <= 1


@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_codes_and_scales_reproduce_the_operands(rng, dtype):
    case = Case(2, 50, 70, 4, 2, 64)
    q, k, v = operands(rng, case)
    relative = 1 / 254 if dtype == INT8 else 1 / 16  # of the group's absmax, and of the value itself
    codes, scale = quantize_queries(q, 0.125, dtype)
    expected = np.asarray(q) * 0.125 * np.log2(np.e)
    got = np.asarray(codes, np.float32) * np.asarray(scale)[..., None]
    assert np.abs(got - expected).max() <= relative * np.abs(expected).max() * 1.001
    keys = quantize_keys(k, dtype, 32)
    assert keys.codes.shape == (2, 2, 96, 64)
    assert keys.scale.shape == (2, 2, 3, 8)
    scale = np.asarray(keys.scale)[:, :, :, [t % 8 for t in range(32)]].reshape(2, 2, 96)
    assert len(np.unique(scale[0, 0])) == 3 * 4
    got = np.asarray(keys.codes, np.float32) * scale[..., None]
    expected = (np.asarray(k) - np.asarray(k).mean(axis=1, keepdims=True)).transpose(0, 2, 1, 3)
    assert np.abs(got[:, :, :70] - expected).max() <= relative * np.abs(expected).max() * 1.001
    assert not got[:, :, 70:].any()
    values = quantize_values(v, dtype, 32)
    assert values.codes.shape == (2, 2, 64, 96)
    assert values.block_scale.shape == (2, 2, 3)
    got = dequantized(values, 32)
    assert np.abs(got[..., :70] - np.asarray(v).transpose(0, 2, 3, 1)).max() <= relative * np.abs(v).max() * 1.001
    assert not got[..., 70:].any()


def dequantized(values, block: int):
    """Values [B, N, H, S] of their codes."""
    step = np.asarray(values.scale)[..., None] * np.repeat(values.block_scale, block, axis=2)[:, :, None]
    return np.asarray(values.codes, np.float32) * step


def test_values_that_no_sample_shows_are_not_clipped(rng):
    """Neither a token far larger than the sampled ones, nor a channel that is zero in all of these."""
    v = rng.normal(size=(1, 1024, 2, 64)).astype(np.float32)
    v[0, 5] *= 1000
    v[0, ::8, 1, :8] = 0  # the sampled tokens
    values = quantize_values(jnp.asarray(v), E4M3, 128)
    expected = v.transpose(0, 2, 3, 1)
    # Half a step of e4m3, of the value or, where it is not normal, of the smallest normal: 2^-15 of the largest code,
    # which is of a channel that counts for at least 1/64 of the block's largest.
    blocks = np.abs(expected).reshape(1, 2, 64, 8, 128).max(axis=(2, 4))
    smallest = np.repeat(blocks, 128, axis=2)[:, :, None] * 2.0**-18 * 64
    assert (np.abs(dequantized(values, 128) - expected) <= np.abs(expected) / 16 * 1.001 + smallest).all()


def test_a_sample_of_tokens_removes_the_bias_of_keys(rng):
    """The mean of a long head is taken over evenly spaced tokens, of the valid ones only."""
    k = jnp.asarray(rng.normal(size=(2, 2048, 1, 64)) + 30, jnp.float32)
    k = k.at[1, 100:].set(jnp.nan)
    mean = keys_mean(k, jnp.array([2048, 100]))
    # The mean of n normals errs by n ** -0.5; 7 of that, in one of 64 channels, happens once in 6 billion runs.
    assert np.abs(np.asarray(mean[0]) - 30).max() < 7 * 128**-0.5
    assert np.abs(np.asarray(mean[1]) - 30).max() < 7 * 7**-0.5


def test_tokens_past_the_length_change_nothing(rng):
    """Even NaN there: they reach neither the mean of the keys nor a scale."""
    case = Case(2, 40, 64, 2, 2, 64)
    q, k, v = operands(rng, case)
    lengths = jnp.array([40, 64])
    past = (jnp.arange(64)[None] >= lengths[:, None])[..., None, None]
    for mode in ("int8_fp8", "int8_int8", "fp8"):
        clean = attention(q, k, v, kv_lengths=lengths, mode=mode)
        dirty = attention(q, jnp.where(past, jnp.nan, k), jnp.where(past, jnp.nan, v), kv_lengths=lengths, mode=mode)
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (70, 0), (5, 300), (0, 0)])
@pytest.mark.parametrize(("tokens", "keys"), [(256, 256), (100, 391), (391, 100)])
def test_key_tiles_cover_what_is_visible(window, tokens, keys):
    """No visible key outside [begin, end), and nothing to mask inside [full_begin, full_end)."""
    left, right = window
    for first in range(0, tokens, 128):
        aligned = keys % 64 == 0
        begin, full_begin, full_end, end = (
            int(x)
            for x in key_tiles(jnp.int32(first), 128, jnp.int32(tokens), jnp.int32(keys), window, 64, aligned=aligned)
        )
        assert 0 <= begin <= full_begin <= full_end <= end <= -(-keys // 64)
        query, key = np.arange(first, first + 128)[:, None], np.arange(-(-keys // 64) * 64)[None]
        seen = (key < keys) & (key >= query - (left if left is not None else 10**6))
        seen &= key <= query + (right if right is not None else 10**6)
        tiles = seen.reshape(128, -1, 64)
        assert tiles[:, full_begin:full_end].all()
        valid = tiles[query[:, 0] < tokens]
        assert not valid[:, :begin].any()
        assert not valid[:, end:].any()


def test_a_window_wider_than_the_tokens_hides_nothing(rng):
    """However wide: the sum of a position and the largest int32 would be negative."""
    case = Case(1, 24, 40, 2, 2, 64)
    qkv = operands(rng, case)
    for window, narrow in ((2**31 - 1, None), ((2**40, 3), (None, 3)), ((23, 39), None)):
        np.testing.assert_array_equal(attention(*qkv, window=window), attention(*qkv, window=narrow))


def test_mask_and_bias_take_the_xla_route(rng):
    case = Case(1, 48, 80, 4, 2, 64)
    qkv = operands(rng, case)
    mask = rng.uniform(size=(1, 1, 48, 80)) < 0.5
    bias = rng.normal(size=(1, 4, 48, 80))
    out = attention(*qkv, mask=jnp.asarray(mask), bias=jnp.asarray(bias, jnp.float32), mode="int8_f16")
    assert error(out, exact(*qkv, case, mask=mask, bias=bias)) < 1 / 64
    with pytest.raises(NotImplementedError, match="boolean mask"):
        attention(*qkv, mask=jnp.asarray(mask), implementation="mosaic_gpu")


def test_the_gradient_is_the_float_operations(rng):
    case = Case(1, 32, 32, 2, 1, 64)
    qkv = operands(rng, case)
    ours = jax.grad(lambda x: (attention(*x, causal=True) * qkv[0]).sum())(qkv)
    theirs = jax.grad(lambda x: (jax.nn.dot_product_attention(*x, is_causal=True) * qkv[0]).sum())(qkv)
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_no_visible_key_gives_zeros_and_nan_is_not_hidden(rng):
    case = Case(2, 16, 16, 1, 1, 64)
    q, k, v = operands(rng, case)
    out = attention(q, k, v, kv_lengths=jnp.array([0, 16]), query_lengths=jnp.array([16, 3]))
    assert not np.asarray(out[0]).any()
    assert not np.asarray(out[1, 3:]).any()
    assert np.asarray(out[1, :3]).any()
    for i in range(3):
        broken = [q, k, v]
        broken[i] = broken[i].at[0, 2, 0, 5].set(jnp.nan)
        assert np.isnan(attention(*broken)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 9, 2, 64)}, "k and v must have the same shape"),
        ({"q": (2, 8, 4)}, "q must be"),
        ({"q": (2, 8, 3, 64)}, "must be a multiple"),
        ({"q": (1, 8, 4, 64)}, "batch and head_dim"),
        ({"mode": "int4"}, "mode must be"),
        ({"implementation": "triton"}, "implementation must be"),
        ({"window": -1}, "window must be whole"),
        ({"window": (3, 0.5)}, "window must be whole"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"kv_lengths": jnp.ones((3,), jnp.int32)}, "kv_lengths must be"),
        ({"mask": jnp.ones((2, 4, 8, 8), jnp.float32)}, "mask must be boolean"),
        ({"bias": jnp.ones((8, 8), jnp.float32)}, "bias must be broadcastable"),
    ],
)
def test_bad_input_is_named(change, message):
    shapes = {"q": (2, 8, 4, 64), "k": (2, 8, 2, 64), "v": (2, 8, 2, 64)}
    arrays = {name: jnp.ones(change.get(name, shape)) for name, shape in shapes.items()}
    others = {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(ValueError, match=message):
        attention(**arrays, **others)


def test_refusals_say_why():
    q = jnp.ones((1, 8, 1, 256), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="head_dim must be at most 128"):
        attention(q, q, q, implementation="mosaic_gpu")
    small = jnp.ones((1, 8, 1, 64))
    assert "bfloat16 or float16" in supports(small, small, small, Masking(), "int8_fp8", Config())
    half = small.astype(jnp.bfloat16)
    assert "shared memory" in supports(half, half, half, Masking(), "int8_f16", Config(block_kv=256, stages=8))
    with pytest.raises(ValueError, match="warpgroups must be from 1 to 4"):
        Config(warpgroups=5)


@pytest.mark.parametrize(
    ("head_dim", "keys", "window", "mode"),
    [
        (128, 8192, (None, None), "int8_fp8"),
        (128, 2048, (None, None), "f16_fp8"),
        (96, 8192, (None, 0), "int8_fp8"),
        (128, 4096, (None, 0), "f16_fp8"),  # half of them, on the average
        (128, 8192, (1000, 0), "f16_fp8"),
        (128, 8192, (4000, 1000), "int8_fp8"),
        (64, 8192, (None, None), "f16_fp8"),
    ],
)
def test_auto_takes_the_faster_mode(head_dim, keys, window, mode):
    assert auto_mode(head_dim, keys, window) == mode


@pytest.mark.parametrize("gain", [1, 8])
def test_scores_in_float16_cost_nothing_beside_8_bit_weights(rng, gain):
    """At head_dim 64, where keys are smoothed for them, on biased inputs too; also where a few keys get all weight."""
    case = Case(1, 256, 512, 4, 4, 64)
    q, k, v = operands(rng, case, biased=True)
    q = gain * q
    ref = exact(q, k, v, case)
    bound = error(exact(q, k, v, case, rounded=True), ref)
    # Of draws, 0.97 to 1.03: the channels that make up the norm are few.
    assert error(attention(q, k, v, mode="f16_fp8"), ref) < 1.1 * bound
