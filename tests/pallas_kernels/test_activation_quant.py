import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activation_quant import activation_quant, supports
from pallas_kernels.activation_quant.mosaic_gpu import quantize_groups, quantize_tokens
from pallas_kernels.activation_quant.reference import LIMITS, LOWEST, activation_quant_reference


def rows(rng, m, k, dtype="float32"):
    """Rows of very different sizes, one of zeros."""
    x = rng.normal(size=(m, k)) * np.exp(3 * rng.normal(size=(m, 1)))
    x[0] = 0.0
    return jnp.asarray(x, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("group", [None, 32])
def test_codes_are_the_nearest(rng, group, x_dtype, dtype):
    x = rows(rng, 5, 96, x_dtype).reshape(5, 1, 96)
    codes, scale = activation_quant(x, dtype, group_size=group)
    assert codes.shape == x.shape
    assert codes.dtype == jnp.dtype(dtype)
    assert scale.shape == (5, 1, 96 // (group or 96))
    assert scale.dtype == jnp.float32
    groups = np.asarray(x, np.float64).reshape(*scale.shape, -1)
    absmax = np.abs(groups).max(-1)
    np.testing.assert_allclose(scale, np.where(absmax == 0, 1, absmax / LIMITS[dtype]), rtol=2.0**-22)
    back = np.asarray(codes, np.float64).reshape(groups.shape) * np.asarray(scale, np.float64)[..., None]
    # Half a step of int8; half an eps (2^-4) of e4m3, or half its smallest step, 2^-9. The scale and the quotient are
    # float32.
    step = 0.5 if dtype == "int8" else np.maximum(np.abs(groups) / np.asarray(scale)[..., None] * 2.0**-4, 2.0**-10)
    assert (np.abs(back - groups) <= step * np.asarray(scale, np.float64)[..., None] * (1 + 2.0**-14)).all()


def test_ties_go_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]])
    codes, scale = activation_quant(x, jnp.int8)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]


def test_limit_uses_all_levels():
    codes, scale = activation_quant(jnp.asarray([[-255.0, 255.0]]), jnp.int8, limit=127.5)
    assert float(scale[0, 0]) == 2.0
    assert codes.tolist() == [[-128, 127]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_nan_and_infinity_does_not_hide(rng, bad):
    x = rows(rng, 3, 256).at[1, 200].set(bad)
    codes, scale = activation_quant(x, jnp.int8, group_size=128)
    assert np.isfinite(np.asarray(scale)[[0, 0, 1, 2, 2], [0, 1, 0, 0, 1]]).all()
    back = codes.astype(jnp.float32)[1, 200] * scale[1, 1]
    assert np.isnan(back) if np.isnan(bad) else back >= 1e38 / 127


def test_norm_and_factors_are_applied_first(rng):
    x, weight, factor = rows(rng, 4, 128), *(jnp.asarray(rng.uniform(0.5, 2, 128), jnp.bfloat16) for _ in range(2))
    wide = np.asarray(x, np.float64)
    values = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6)
    values = values * np.asarray(weight, np.float64) * np.asarray(factor, np.float64)
    codes, scale = activation_quant(x, jnp.int8, norm_weight=weight, pre_scale=factor, epsilon=1e-6)
    back = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
    assert (np.abs(back - values) <= np.asarray(scale, np.float64) * (0.5 + 127 * 2.0**-20)).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("m", "k", "group", "gain", "epsilon"),
    [(3, 384, 384, False, None), (2, 1024, 1024, True, 1e-6), (20, 256, 128, True, 1e-6), (5, 128, 128, False, None)],
)
def test_kernels_in_the_interpreter(rng, m, k, group, gain, epsilon, dtype):
    """The same arithmetic in the same order as the reference, but for the sum of a norm."""
    x = rows(rng, m, k, "bfloat16")
    gain = jnp.asarray(rng.uniform(0.5, 2, k), jnp.float32) if gain else None
    limit = LIMITS[dtype]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        if group == k and k > 128:
            codes, scale = quantize_tokens(x, gain, dtype, limit, epsilon)
        else:
            wide = x.astype(jnp.float32)
            inverse = None if epsilon is None else jax.lax.rsqrt(jnp.mean(wide * wide, axis=1) + epsilon)
            codes, scale = quantize_groups(x, gain, inverse, dtype, limit)
    want_codes, want_scale = activation_quant_reference(x, gain, jnp.dtype(dtype), group, limit, epsilon)
    np.testing.assert_allclose(scale, want_scale, rtol=0 if epsilon is None else k * 2.0**-23)
    differing = np.asarray(codes).view(np.uint8) != np.asarray(want_codes).view(np.uint8)
    assert not differing.any() if epsilon is None else differing.mean() <= 1e-2


@pytest.mark.parametrize("m", [3, 70])
def test_scales_of_a_group_are_stored_in_whole_blocks(m):
    """A contiguous store knows no bounds: 64 scales at the end of a shorter row would run into the next."""
    jaxpr = jax.make_jaxpr(lambda x: quantize_groups(x, None, None, jnp.int8, 127.0))(jnp.zeros((m, 256)))
    scales = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.shape[:1] == (2,)]
    assert scales[0] == (2, -(-m // 64) * 64)


def test_vmap_is_the_loop(rng):
    x = jnp.stack([rows(rng, 3, 128) for _ in range(2)])
    factors = jnp.asarray(rng.uniform(0.5, 2, (2, 128)), jnp.float32)
    for got, want in zip(
        jax.vmap(lambda x: activation_quant(x, jnp.int8))(x), activation_quant(x, jnp.int8), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    quantize = lambda x, factor: activation_quant(x, jnp.int8, pre_scale=factor)  # noqa: E731
    looped = [quantize(*pair) for pair in zip(x, factors, strict=True)]
    for got, *want in zip(jax.vmap(quantize)(x, factors), *looped, strict=True):
        np.testing.assert_array_equal(got, jnp.stack(want))


def test_no_gradient_passes(rng):
    grad = jax.grad(lambda x: activation_quant(x, jnp.int8)[1].sum())(rows(rng, 2, 128))
    np.testing.assert_array_equal(grad, 0)


def test_empty_and_refusals():
    codes, scale = activation_quant(jnp.zeros((0, 128)), jnp.int8)
    assert codes.shape == (0, 128)
    assert scale.shape == (0, 1)
    x = jnp.zeros((2, 96))
    with pytest.raises(NotImplementedError, match="K = 96"):
        activation_quant(x, jnp.int8, implementation="mosaic_gpu")
    assert supports(4096, 64, jnp.bfloat16) is not None
    assert supports(4096, 128, jnp.bfloat16) is None
    with pytest.raises(TypeError, match="int16"):
        activation_quant(x, jnp.int16)
    with pytest.raises(TypeError, match="x must be"):
        activation_quant(jnp.zeros((2, 96), jnp.int8), jnp.int8)
    with pytest.raises(ValueError, match="group_size=64"):
        activation_quant(x, jnp.int8, group_size=64)
    with pytest.raises(ValueError, match="pre_scale has shape"):
        activation_quant(x, jnp.int8, pre_scale=jnp.ones(2))
    with pytest.raises(ValueError, match="epsilon"):
        activation_quant(x, jnp.int8, norm_weight=jnp.ones(96))
    assert LOWEST["int8"] == -128.0
