"""8-bit weights packed for a kernel that multiplies codes by codes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS, PerBlock, PerGroup, PerTensor, PerToken, QuantSpec, TensorSpec

BLOCKS = [
    QuantSpec(TensorSpec(qtype, PerBlock((128, 128))), TensorSpec(qtype, PerGroup(128)))
    for qtype in ("int8", "float8_e4m3fn")
]
STATIC = QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerToken(), static=True))


@pytest.fixture
def tolerance():
    # Both products are of the same codes but where the two roundings of a token's scale, an eps of float32 apart,
    # take a tie to different sides; and each result is rounded to bfloat16 once.
    return 2.0**-8


@pytest.fixture
def kernel():
    return "int8_matmul", "int8_k_major"


def weight(rng, shape, spec="w8a8", axis=-2, scale=1.0, **changes):
    w = jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)
    spec = PRESETS[spec] if isinstance(spec, str) else spec
    return dataclasses.replace(quantize_array(w, spec, axis=axis), **changes)


@pytest.mark.parametrize("spec", ["w8a8", "w8a8-tensor", "fp8"])
def test_packing_is_inverted_bit_for_bit(rng, assert_same, spec):
    q = weight(rng, (2, 200, 100), spec)
    packed = jq.pack_for(q, "h200")
    assert packed.qvalue.shape == (2, 128, 256)
    assert_same(jq.pack_for(packed, "plain"), q)


@pytest.mark.parametrize("spec", ["w8a8", "w8a8-tensor", "fp8"])
def test_products_of_every_format(rng, activation, agrees_by_kernel, spec):
    agrees_by_kernel(lambda w, x: x @ w, weight(rng, (200, 100), spec), activation(2, 3, 200))


@pytest.mark.parametrize("grid", ["restricted", "power", "signed"])
def test_grids_of_the_activation(rng, activation, agrees_by_kernel, grid):
    spec = QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerToken(), grid=grid))
    agrees_by_kernel(lambda w, x: x @ w, weight(rng, (128, 64), spec), activation(5, 128))


@pytest.mark.parametrize("spec", BLOCKS, ids=lambda spec: spec.weight.qtype)
def test_blocks_of_scales(rng, activation, assert_same, agrees_by_kernel, spec):
    q = weight(rng, (2, 256, 384), spec, scale=0.1)
    assert q.scale.shape == (2, 2, 3)
    assert_same(jq.pack_for(jq.pack_for(q, "h200"), "plain"), q)
    agrees_by_kernel(lambda w, x: x @ w[1], q, activation(5, 256))


@pytest.mark.parametrize("granularity", [PerToken(), PerTensor()], ids=["token", "tensor"])
def test_asymmetric_activations(rng, activation, agrees_by_kernel, granularity):
    spec = QuantSpec(TensorSpec("int8"), TensorSpec("uint8", granularity))
    agrees_by_kernel(lambda w, x: x @ w, weight(rng, (200, 100), spec), activation(2, 3, 200) + 1)


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape", "axis"),
    [
        ("btd,dnh->btnh", (2, 3, 128), (128, 2, 64), (-3,)),
        ("btnh,nhd->btd", (2, 3, 2, 128), (2, 128, 64), (-3, -2)),
        ("btd,ndh->btnh", (2, 3, 128), (3, 128, 128), (-2,)),
        ("gecd,edh->gech", (2, 3, 4, 128), (3, 128, 64), (-2,)),
        ("btd,vd->btv", (2, 3, 128), (96, 128), (-1,)),
    ],
)
def test_einsums_of_models(rng, activation, agrees_by_kernel, subscripts, x_shape, w_shape, axis):
    q = weight(rng, w_shape, rng.choice(["w8a8", "w8a8-tensor", "fp8"]), axis=axis)
    agrees_by_kernel(lambda w, x: jnp.einsum(subscripts, x, w), q, activation(*x_shape))


def test_static_scales_and_factors(rng, activation, agrees_by_kernel):
    factors = jnp.asarray(rng.uniform(0.5, 2, (128, 1)), jnp.float32)
    q = weight(rng, (128, 64), STATIC, pre_scale=factors, act_scale=jnp.full((1, 1), 0.03, jnp.float32))
    agrees_by_kernel(lambda w, x: x @ w, q, activation(5, 128))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_results_of_other_dtypes(rng, activation, agrees_by_kernel, dtype):
    q = weight(rng, (128, 64))
    agrees_by_kernel(lambda w, x: jnp.matmul(x, w, preferred_element_type=dtype), q, activation(5, 128))


def test_stacks_are_scanned_and_indexed(rng, activation, agrees_by_kernel):
    q, x = weight(rng, (3, 128, 128), scale=0.1), activation(2, 128)
    agrees_by_kernel(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], q, x)
    agrees_by_kernel(lambda w, x: x @ w[1], q, x)
    agrees_by_kernel(lambda w, x: x @ w.reshape(3, 128, 2, 64)[2].reshape(128, 128), q, x)


def test_products_of_one_activation_quantize_it_once(rng, activation):
    params = {name: jq.pack_for(weight(rng, (128, 64)), "h200") for name in "qkv"}
    fn, x = jq.quantized(lambda p, x: [x @ w for w in p.values()]), activation(2, 128)
    three, one = (str(jax.make_jaxpr(fn)(p, x)).count("reduce_max") for p in (params, {"q": params["q"]}))
    assert three == one > 0  # a maximum for each platform


def test_gradient_passes_straight_through(rng, activation, assert_close):
    q, x, slope = weight(rng, (128, 64)), activation(3, 128), activation(3, 64)
    loss = lambda x, w: jnp.sum(jq.quantized(lambda w, x: x @ w)(w, x) * slope)  # noqa: E731
    assert_close(jax.grad(loss)(x, jq.pack_for(q, "h200")), jax.grad(loss)(x, q))


def test_what_the_kernel_does_not_take_says_so(rng, activation, implementations):
    grouped = QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerGroup(64)))
    ragged = QuantSpec(TensorSpec("int8", PerBlock((64, 128))), TensorSpec("int8", PerGroup(128)))
    for spec in (grouped, ragged):
        assert jq.pack_for(weight(rng, (128, 256), spec), "h200").layout == "plain"
    packed, x = jq.pack_for(weight(rng, (3, 128, 64)), "h200"), activation(2, 128)
    ((name, reason),) = implementations(lambda w, x: jnp.einsum("td,ndh->tnh", x, w), packed, x)
    assert name == "xla"
    assert reason.endswith("its 64 outputs do not fill tiles of 128, so that matrices do not lie side by side")


def test_checkpoints_keep_the_layout(rng, assert_same, tmp_path):
    q = jq.pack_for({"w": weight(rng, (2, 128, 64), "fp8")}, "h200")
    jq.save(tmp_path / "packed", q)
    assert_same(jq.load(tmp_path / "packed"), q)
