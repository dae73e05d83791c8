"""Products of one activation: found in a program, evaluated together, one launch of a kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.tracing._siblings import in_steps


@pytest.fixture
def tolerance():
    return 0.0  # a launch of several weights computes what one of each does


def families(fn, *args):
    """The sizes of the steps of more than one product; that an equation comes after what it needs is checked."""
    body = jax.make_jaxpr(fn)(*args).jaxpr
    steps = list(in_steps(body.eqns))
    order = [eqn for step in steps for eqn in step]
    assert sorted(map(id, order)) == sorted(map(id, body.eqns))
    known = {*body.invars, *body.constvars}
    for step in steps:
        needed = {atom for eqn in step for atom in eqn.invars if not hasattr(atom, "val")}
        assert needed <= known
        known.update(var for eqn in step for var in eqn.outvars)
    return [len(step) for step in steps if len(step) > 1]


def launches(fn, *args):
    """Products of the int4 kernel in a quantized program."""
    return str(jax.make_jaxpr(jq.quantized(fn))(*args)).count("custom_vjp_call[")


def test_siblings_are_found_between_other_equations(activation):
    w, x = activation(8, 8), activation(2, 8)

    def attention(w, x):
        q = jnp.tanh(x @ w) + 1
        k = jnp.sin(x @ (w * 2).T)
        return (q * k) @ w + (x.astype(jnp.float32) @ w.astype(jnp.float32)).astype(x.dtype)

    assert families(attention, w, x) == [2]


def test_products_that_need_one_another_are_no_siblings(activation):
    w, x = activation(8, 8), activation(2, 8)
    assert families(lambda w, x: x @ (w * jnp.sum(x @ w)), w, x) == []
    assert families(lambda w, x: x @ w + (x @ w) @ w, w, x) == [2]


def test_conversions_of_one_activation_are_one(activation):
    w, x = activation(8, 8), activation(2, 8)
    half = lambda x: x.astype(jnp.float16)  # noqa: E731
    assert families(lambda w, x: half(x) @ half(w) + half(x) @ half(w + 1), w, x) == [2]
    assert families(lambda w, x: half(x) @ half(w) + (x @ (w + 1)).astype(jnp.float16), w, x) == []


def test_effects_keep_their_order(activation, capfd):
    w, x = activation(8, 8), activation(2, 8)

    def talkative(w, x):
        first = x @ w
        jax.debug.print("first", ordered=True)
        second = x @ (w + 1)
        jax.debug.print("second", ordered=True)
        return first + second

    assert families(talkative, w, x) == [2]
    jax.block_until_ready(jax.jit(jq.quantized(talkative))(jq.quantize(w, jq.QuantConfig.preset("w8a16")), x))
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["first", "second"]


def packed(w, preset="w4a16", **options):
    return jq.pack_for(jq.quantize(w, jq.QuantConfig.preset(preset, **options)), "h200")


def apart(fns, *args):
    """The results of functions each in a program of its own."""
    return [jax.jit(jq.quantized(fn))(*args) for fn in fns]


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym", "w4a8", "w8a8", "w8a8-tensor", "fp8"])
def test_siblings_are_one_launch_with_the_same_results(activation, assert_close, preset):
    params = packed({name: activation(128, size) for name, size in (("q", 128), ("k", 64), ("v", 64))}, preset)
    fns = [lambda p, x, name=name: {name: x @ p[name]} for name in "qkv"]
    only = [{name: params[name]} for name in "qkv"]
    together = lambda p, x: {name: x @ p[name] for name in "qkv"}  # noqa: E731
    x = activation(3, 128)
    got = jax.jit(jq.quantized(together))(params, x)
    for fn, alone, name in zip(fns, only, "qkv", strict=True):
        assert_close(got[name], jax.jit(jq.quantized(fn))(alone, x)[name])
    assert launches(together, params, x) == 1


def test_weights_that_are_not_alike_are_launched_apart(activation):
    params = {"q": packed(activation(128, 64)), "k": packed(activation(128, 64), group_size=64)}
    params |= {"v": packed(activation(128, 64), "w4a16-asym"), "o": packed(activation(128, 64))}
    assert launches(lambda p, x: [x @ p[name] for name in "qkvo"], params, activation(3, 128)) == 3


def test_attention_of_flax_is_two_launches(activation, rng):
    """Its projections convert the input each for itself and reshape and add between the products."""
    model, x = (
        nn.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16, qkv_features=256),
        jnp.float32(activation(1, 5, 128)),
    )
    params = model.init(jax.random.key(int(rng.integers(2**31))), x)
    config = jq.QuantConfig.preset("w4a16", group_size=64)
    qparams = jq.pack_for(jq.quantize(params, config, apply_fn=model.apply, batches=[(x,)]), "h200")
    assert launches(model.apply, qparams, x) == 2
    explained = jq.explain(model.apply, qparams, x)
    assert [row[5] for row in explained.rows] == ["int4_matmul"] * 4
    got, want = jq.quantized(model.apply)(qparams, x), model.apply(jq.dequantize(qparams), x)
    # Four products deep, each rounded to bfloat16 in other places.
    assert np.linalg.norm(got - want) <= 4 * 2.0**-8 * np.linalg.norm(want)


@pytest.mark.parametrize("preset", ["w4a16", "w8a8"])
def test_siblings_of_a_scanned_layer(activation, preset):
    params = packed({"gate": activation(2, 128, 128), "up": activation(2, 128, 128)}, preset)

    def scanned(p, x):
        return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["gate"]) * (x @ p["up"]), None), x, p)[0]

    assert launches(scanned, params, activation(3, 128)) == 1


def test_gradient_of_siblings(activation, assert_close):
    params, x = packed({"gate": activation(128, 64), "up": activation(128, 64)}), activation(3, 128)
    terms = [lambda x, n=name: jnp.sum(jq.quantized(lambda p, x: x @ p)(params[n], x)) for name in params]
    both = lambda x: jnp.sum(jq.quantized(lambda p, x: x @ p["gate"] + x @ p["up"])(params, x))  # noqa: E731
    # The two terms of dx are rounded, and their sum: half an eps each.
    want = sum(jax.grad(term)(x).astype(jnp.float32) for term in terms)
    got = jax.grad(both)(x).astype(jnp.float32)
    assert jnp.linalg.norm(got - want) <= 2 * 2.0**-8 * jnp.linalg.norm(want)
