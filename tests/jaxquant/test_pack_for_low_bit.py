"""Weights of other widths than four bits, packed for a kernel that multiplies float activations."""

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS, PerGroup, QuantSpec, TensorSpec

SPECS = {name: PRESETS[name] for name in ("w8a16", "w3a16", "w3a16-asym", "w2a16", "nf4")} | {
    "fp8": QuantSpec(TensorSpec("float8_e4m3fn")),
    "w8 in groups": QuantSpec(TensorSpec("int8", PerGroup(64), scale_dtype="bfloat16")),
    "w2-asym": QuantSpec(TensorSpec("uint2", PerGroup(64), scale_dtype="bfloat16")),
}


@pytest.fixture
def tolerance():
    # XLA reads a packed weight rounded to x's dtype, a plain one in values so rounded (NF4's levels are) and scales;
    # both round their result: at most half an eps of bfloat16 of its own value each, four halves in the norm.
    return 2 * 2.0**-8


@pytest.fixture
def kernel():
    return "low_bit_matmul", "low_bit_fragments"


def weight(rng, shape, name):
    return quantize_array(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_every_format_is_packed_exactly_and_multiplied(rng, activation, assert_same, agrees_by_kernel, name):
    q = weight(rng, (256, 100), name)
    assert_same(jq.pack_for(jq.pack_for(q, "h200"), "plain"), q)
    agrees_by_kernel(lambda w, x: x @ w, q, activation(2, 256))


def test_siblings_of_one_format_are_one_launch(rng, activation):
    weights = [jq.pack_for(weight(rng, (128, 64), name), "h200") for name in ("w8a16", "w8a16", "fp8")]
    fn = jq.quantized(lambda w, x: [x @ part for part in w])
    assert str(jax.make_jaxpr(fn)(weights, activation(2, 128))).count("custom_vjp_call[") == 2


def test_batches_are_unpacked_and_say_so(rng, activation, implementations):
    q = jq.pack_for(weight(rng, (3, 128, 64), "w8a16"), "h200")
    ((name, reason),) = implementations(lambda w, x: jnp.einsum("etd,edh->eth", x, w), q, activation(3, 2, 128))
    assert name == "xla"
    assert reason.endswith("the grouped kernel takes no int8 weights with float activations")
