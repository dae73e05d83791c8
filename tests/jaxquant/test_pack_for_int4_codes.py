"""int4 weights packed for the codes of activations: W4A8."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS, PerGroup, PerToken, QuantSpec, TensorSpec

FP8 = QuantSpec(TensorSpec("int4", PerGroup(64)), TensorSpec("float8_e4m3fn", PerToken()))
STATIC = QuantSpec(TensorSpec("int4", PerGroup(64)), TensorSpec("int8", PerToken(), static=True))


@pytest.fixture
def tolerance():
    # Both products are of the same codes, with sums of groups in another order; each result is rounded to bfloat16
    # once, half an eps of its size each.
    return 2.0**-7


@pytest.fixture
def kernel():
    return "int4_matmul", "int4_byte_fragments"


def weight(rng, shape, spec, axis=-2, **changes):
    w = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    return dataclasses.replace(quantize_array(w, spec, axis=axis), **changes)


@pytest.mark.parametrize("spec", [PRESETS["w4a8"], PRESETS["w4a8-channel"], FP8], ids=["group", "channel", "fp8"])
def test_every_format_is_packed_exactly_and_multiplied(rng, activation, assert_same, agrees_by_kernel, spec):
    q = weight(rng, (256, 100), spec)
    assert_same(jq.pack_for(jq.pack_for(q, "h200"), "plain"), q)
    agrees_by_kernel(lambda w, x: x @ w, q, activation(2, 3, 256))


def test_static_scales_and_factors(rng, activation, agrees_by_kernel):
    factors = jnp.asarray(rng.uniform(0.5, 2, (128, 1)), jnp.float32)
    q = weight(rng, (128, 64), STATIC, pre_scale=factors, act_scale=jnp.full((1, 1), 0.03, jnp.float32))
    agrees_by_kernel(lambda w, x: x @ w, q, activation(5, 128))


def test_float32_results_are_not_rounded(rng, activation, agrees_by_kernel):
    q = weight(rng, (128, 64), PRESETS["w4a8"])
    agrees_by_kernel(lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32), q, activation(5, 128))


def test_gradient_passes_straight_through(rng, activation, assert_close):
    q, x, slope = weight(rng, (128, 64), PRESETS["w4a8"]), activation(3, 128), activation(3, 64)
    loss = lambda x, w: jnp.sum(jq.quantized(lambda w, x: x @ w)(w, x) * slope)  # noqa: E731
    assert_close(jax.grad(loss)(x, jq.pack_for(q, "h200")), jax.grad(loss)(x, q))


def test_zero_points_stay_plain(rng):
    spec = QuantSpec(TensorSpec("uint4", PerGroup(64)), TensorSpec("int8", PerToken()))
    q = weight(rng, (128, 64), spec)
    assert jq.pack_for(q, "h200").layout == "plain"
