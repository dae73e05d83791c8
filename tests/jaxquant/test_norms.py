"""RMSNorms found in programs, and quantized with the activation that they make."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from experiments.models.decoder import RMSNorm
from jaxquant.products import _rows
from jaxquant.tracing._interpreter import Frame, Region
from jaxquant.tracing._norms import rms_norm_of

SIZE = 128


def root(x, epsilon=1e-3):
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def wide(x):
    return x.astype(jnp.float32)


FORMS = {
    "gain last": lambda x, g: (wide(x) * root(wide(x))).astype(x.dtype) * g,
    "gain first": lambda x, g: ((wide(x) * wide(g)) * root(wide(x))).astype(x.dtype),
    "gain on the root": lambda x, g: (wide(x) * (root(wide(x)) * wide(g))).astype(x.dtype),
    "power": lambda x, g: wide(x) * jax.lax.rsqrt(jnp.mean(wide(x) ** 2, -1, keepdims=True) + 1e-3) * wide(g),
    "one and gain": lambda x, g: (wide(x) * root(wide(x)) * (1 + wide(g))).astype(x.dtype),
    "two gains": lambda x, g: (wide(x) * root(wide(x)) * wide(g)).astype(x.dtype) * g,
    "no gain": lambda x, g: wide(x) * root(wide(x)),
}
OTHERS = {
    "LayerNorm": lambda x, g: (wide(x) - jnp.mean(wide(x), -1, keepdims=True)) * root(wide(x)) * wide(g),
    "of another": lambda x, g: wide(x) * root(wide(x) + 1) * wide(g),
    "other axis": lambda x, g: wide(x) * jax.lax.rsqrt(jnp.mean(wide(x) ** 2, 0, keepdims=True) + 1e-3),
    "sum": lambda x, g: wide(x) * jax.lax.rsqrt(jnp.sum(wide(x) ** 2, -1, keepdims=True) + 1e-3),
    "twice": lambda x, g: wide(x) * root(wide(x)) * root(wide(x)),
    "a gain a token": lambda x, g: wide(x) * root(wide(x)) * wide(x)[:, :1],
    "a gain an element": lambda x, g: wide(x) * root(wide(x)) * jnp.sin(wide(x)),
    "no norm": lambda x, g: x * g,
}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(3, SIZE)) * 2, jnp.bfloat16)


@pytest.fixture
def gain(rng):
    return jnp.asarray(rng.uniform(0.5, 2, (1, SIZE)), jnp.bfloat16)


def found(fn, *args):
    """What `rms_norm_of` says of a function's result."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    frame = Frame(jaxpr.jaxpr, Region(), ())
    frame.values.update(zip(jaxpr.jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        outs = eqn.primitive.bind(*map(frame.read, eqn.invars), **eqn.params)
        frame.values.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs], strict=True))
        frame.makers.update((var, eqn) for var in eqn.outvars)
    return rms_norm_of(frame, jaxpr.jaxpr.outvars[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_it_is_found(x, gain, form):
    norm = found(FORMS[form], x, gain)
    assert norm is not None
    assert norm.source is x
    assert norm.epsilon == np.float32(1e-3)
    wide_x, weight = np.asarray(x, np.float64), 1.0 if norm.weight is None else np.asarray(norm.weight, np.float64)
    exact = wide_x / np.sqrt(np.mean(wide_x**2, -1, keepdims=True) + norm.epsilon) * weight
    got = np.asarray(FORMS[form](x, gain), np.float64)
    # The model rounds its result to bfloat16, and before the gain once more: half an eps of each value.
    assert np.linalg.norm(got - exact) <= 2.0**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("form", OTHERS)
def test_nothing_else_is_taken_for_one(x, gain, form):
    assert found(OTHERS[form], x, gain) is None


@pytest.mark.parametrize("norm", [RMSNorm(1e-5, jnp.bfloat16, jnp.bfloat16), nn.RMSNorm(dtype=jnp.bfloat16)])
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_norm_and_rounding_are_one_pass_for_all_siblings(rng, x, monkeypatch, norm, preset):
    calls = []

    def watched(x, **options):
        calls.append(options.get("epsilon"))
        return quantize(x, **options)

    quantize = _rows.activation_quant
    monkeypatch.setattr(_rows, "activation_quant", watched)
    weights = [jnp.asarray(rng.normal(size=(SIZE, n)), jnp.bfloat16) for n in (128, 64)]
    config = jq.QuantConfig.preset(preset)
    with jax.numpy_dtype_promotion("standard"):
        norm_params = norm.init(jax.random.key(0), x)
    params = {"norm": norm_params, "w": [jq.quantize(w, config) for w in weights]}

    def fn(p, x):
        with jax.numpy_dtype_promotion("standard"):  # Flax's promotes
            y = norm.apply(p["norm"], x)
        return [y @ w for w in p["w"]]

    packed = jq.pack_for(params, "h200")
    got, want = jq.quantized(fn)(packed, x), jq.quantized(fn)(params, x)
    assert calls == [pytest.approx(1e-5 if isinstance(norm, RMSNorm) else 1e-6)]
    for a, b in zip(got, want, strict=True):
        # The norm's result is rounded to bfloat16 in one program only, which moves some codes by one: an error of r in
        # a value of which codes are d apart moves it with probability r / d, by d. Here r is about 2^-9 and d 4 / 127
        # of its size: sqrt(r d) = 2^-7; twice that.
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.linalg.norm(a - b) <= 2.0**-6 * np.linalg.norm(b)
