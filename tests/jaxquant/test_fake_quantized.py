"""Training through quantization: the numbers are those of the quantized model, the gradients those of the float one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.arrays._spec import PRESETS


class Model(nn.Module):
    """A lookup, a stack under scan, an expert einsum, a convolution and a head."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 32, dtype=self.dtype, name="table")(tokens)
        stack = self.param("stack", nn.initializers.lecun_normal(), (2, 32, 32)).astype(self.dtype)
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, stack)
        experts = self.param("experts", nn.initializers.lecun_normal(), (3, 32, 16)).astype(self.dtype)
        x = jnp.einsum("btk,ekn->btn", x, experts)
        x = nn.Conv(32, (3,), dtype=self.dtype, name="conv")(x)
        return nn.Dense(8, dtype=self.dtype, name="out")(x)


def grouped(preset, size):
    spec = PRESETS[preset]
    weight = dataclasses.replace(spec.weight, granularity=jq.PerGroup(size))
    return dataclasses.replace(spec, weight=weight)


def make_config(preset):
    spec = grouped(preset, 16) if "a16" in preset else PRESETS[preset]
    return jq.QuantConfig(spec, (jq.Rule("table/embedding", spec), jq.Rule("conv/kernel", PRESETS["w8a16"])))


@pytest.mark.parametrize(("preset", "dtype"), [("w4a16", "float32"), ("w3a16-asym", "bfloat16"), ("w8a8", "float32")])
def test_forward_is_the_quantized_models_bit_for_bit(rng, preset, dtype):
    model, config = Model(jnp.dtype(dtype)), make_config(preset)
    tokens = jnp.asarray(rng.integers(0, 11, (2, 7)))
    params = model.init(jax.random.key(int(rng.integers(1 << 30))), tokens)["params"]

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    trained = jax.jit(jq.fake_quantized(apply, config))(params, tokens)
    served = jax.jit(jq.quantized(apply))(jq.quantize(params, config), tokens)
    np.testing.assert_array_equal(trained, served)
    assert np.any(np.asarray(trained) != np.asarray(apply(params, tokens)))


@pytest.mark.parametrize("preset", ["w4a16", "w8a8"])
def test_gradients_pass_straight_through(rng, preset):
    config = jq.QuantConfig(grouped(preset, 16) if preset == "w4a16" else PRESETS[preset])
    w, x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 5), (7, 32), (7, 5)))
    fn = jq.fake_quantized(lambda p, x: x @ p["kernel"], config)
    pull = jax.vjp(fn, {"kernel": w}, x)[1]
    to_params, to_x = pull(jnp.asarray(y))
    rounded = np.asarray(jq.dequantize(jq.quantize({"kernel": w}, config))["kernel"], np.float64)
    # eps sqrt(K) times the norms bounds a float32 sum of K terms; 4 leaves room for the scales' own products.
    bound = 4 * np.finfo(np.float32).eps * np.sqrt(32) * np.linalg.norm(y)
    np.testing.assert_allclose(to_x, y @ rounded.T, rtol=0, atol=bound * np.linalg.norm(rounded))
    np.testing.assert_allclose(to_params["kernel"], x.astype(np.float64).T @ y, rtol=0, atol=bound * np.linalg.norm(x))


def test_training_beats_rounding_afterwards(rng, lenient_jax):  # optax promotes dtypes
    config = jq.QuantConfig(grouped("w2a16", 32))
    # Inputs of rank 6 leave 58 directions in which rounding errors may cancel: training finds some, rounding cannot.
    x = jnp.asarray(rng.standard_normal((256, 6)) @ rng.standard_normal((6, 64)) / 8, jnp.float32)
    target = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    params, goal = {"kernel": target}, x @ target

    def apply(params, x):
        return x @ params["kernel"]

    def loss(fn, params):
        return jnp.mean(jnp.square(fn(params, x) - goal))

    train, optimizer = jq.fake_quantized(apply, config), optax.adam(optax.cosine_decay_schedule(0.01, 150))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(lambda p: loss(train, p))(params), state)
        return optax.apply_updates(params, updates), state

    rounded = loss(jq.quantized(apply), jq.quantize(params, config))
    for _ in range(150):
        params, state = step(params, state)
    assert loss(jq.quantized(apply), jq.quantize(params, config)) < 0.5 * rounded  # 0.08 to 0.22 of it in 8 draws


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_weight_that_is_not_finite_is_not_hidden(bad):
    fn = jq.fake_quantized(lambda p, x: x @ p["kernel"], jq.QuantConfig(grouped("w4a16", 16)))
    w = jnp.ones((32, 4)).at[3, 2].set(bad)
    assert np.all(np.isnan(fn({"kernel": w}, jnp.ones((1, 32)))))


def test_refusals_name_the_parameter():
    def fn(p, x):
        return x @ p["kernel"]

    params, x = {"kernel": jnp.ones((24, 4))}, jnp.ones((1, 24))
    with pytest.raises(TypeError, match="config must be a QuantConfig"):
        jq.fake_quantized(fn, PRESETS["w4a16"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"algorithm='gptq'.*algorithm=None"):
        jq.fake_quantized(fn, jq.QuantConfig.preset("w4a16", algorithm=jq.gptq()))
    with pytest.raises(ValueError, match=r"kernel: .*128.*Rule\('kernel', None\)"):
        jq.fake_quantized(fn, jq.QuantConfig.preset("w4a16"))(params, x)
    static = jq.QuantSpec(jq.TensorSpec("int8"), jq.TensorSpec("int8", jq.PerTensor(), static=True))
    with pytest.raises(NotImplementedError, match=r"kernel: a static activation scale"):
        jq.fake_quantized(fn, jq.QuantConfig(static))(params, x)
