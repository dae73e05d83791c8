from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq


def model(params, x, attention):
    """Two attentions; the second one's values alternate in sign, so that their weighted sum nearly cancels."""
    plain = attention(x, x, x, causal=True)
    signs = jnp.where(jnp.arange(x.shape[1]) % 2 == 0, 1.0, -1.0)[None, :, None, None] * params["size"]
    return plain + attention(0.01 * x, 0.01 * x, x * 0.02 + signs)


@pytest.fixture
def batches(rng):
    return [jnp.asarray(rng.normal(size=(1, 64, 2, 32)), jnp.float32) for _ in range(2)]


def test_each_attention_gets_the_fastest_mode_that_it_bears(batches):
    chosen = jq.choose_attention_modes(model, {"size": jnp.float32(1.0)}, batches, minimum=0.99)
    assert chosen.modes == ("auto", "int8_f16")
    first, second = chosen.cosines
    assert 0.99 < first["auto"] < first["int8_f16"] <= 1
    assert second["auto"] < 0.99 < second["int8_f16"]


def test_cosines_are_over_all_batches(batches):
    q = jnp.concatenate(batches)
    got = jq.choose_attention_modes(lambda _, x, attend: attend(x, x, x), None, batches, modes=["int8_int8"])
    exact = np.asarray(jax.nn.dot_product_attention(q, q, q), np.float64).ravel()
    out = np.concatenate([np.asarray(jq.attention(x, x, x, mode="int8_int8")) for x in batches])
    out = out.astype(np.float64).ravel()
    expected = exact @ out / np.sqrt((exact @ exact) * (out @ out))
    assert got.cosines[0]["int8_int8"] == pytest.approx(expected, abs=1e-5)  # sums of 4096 float32 products


def test_the_chosen_modes_run_in_turn(batches):
    chosen = jq.AttentionModes(("int8_int8", "int8_f16"), ({}, {}))
    x, params = batches[0], {"size": jnp.float32(1.0)}
    modes = iter(chosen.modes)
    expected = model(params, x, lambda q, k, v, **options: jq.attention(q, k, v, mode=next(modes), **options))
    run = jax.jit(lambda params, x: model(params, x, chosen.attention()))
    np.testing.assert_allclose(run(params, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="more than the 1 times"):
        model(params, x, jq.AttentionModes(("int8_f16",), ({},)).attention())


def test_where_none_is_close_enough_the_closest_is_taken(batches):
    chosen = jq.choose_attention_modes(model, {"size": jnp.float32(1.0)}, batches[:1], minimum=1.1)
    assert chosen.modes == ("int8_f16", "int8_f16")


def test_bad_input_is_named(batches):
    with pytest.raises(ValueError, match="at least one mode"):
        jq.choose_attention_modes(model, {"size": 1.0}, batches, modes=())
    with pytest.raises(ValueError, match="none was given"):
        jq.choose_attention_modes(model, {"size": 1.0}, [])
    with pytest.raises(ValueError, match="none was given, or apply_fn calls"):
        jq.choose_attention_modes(lambda params, x, attention: x, {}, batches)
    with pytest.raises(ValueError, match="implementation"):
        jq.choose_attention_modes(lambda p, x, attend: attend(x, x, x, implementation="xla"), {}, batches)


class Layers(nn.Module):
    """Two causal attentions of Flax, the mask an array of numbers as Flax makes it."""

    attention: Callable

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        for _ in range(2):
            layer = nn.MultiHeadDotProductAttention(
                num_heads=2, attention_fn=self.attention, dropout_rate=0.1, deterministic=True
            )
            x = x + layer(x, mask=mask)
        return x


def test_modes_of_a_linen_model(rng):
    """The mask reaches every attention: without it, the first tokens would see the last ones."""
    x = jnp.asarray(rng.normal(size=(1, 48, 64)), jnp.float32)
    plain = Layers(nn.dot_product_attention)
    params = plain.init(jax.random.key(0), x)
    chosen = jq.choose_attention_modes(lambda params, x, attention: Layers(attention).apply(params, x), params, [x])
    assert len(chosen.modes) == 2
    for attention in (chosen.attention(), jq.attention):
        out, expected = Layers(attention).apply(params, x), plain.apply(params, x)
        # e4m3 weights and values err by 5/64 of an attention's output at most (tests/pallas_kernels); the two layers'
        # outputs are no larger than their residual stream.
        assert float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)) < 5 / 32


def test_attention_of_an_nnx_module(rng):
    x = jnp.asarray(rng.normal(size=(1, 48, 64)), jnp.float32)
    layers = [
        nnx.MultiHeadAttention(2, 64, decode=False, attention_fn=f, rngs=nnx.Rngs(0))
        for f in (nnx.dot_product_attention, jq.attention)
    ]
    expected, out = (layer(x, is_causal=True) for layer in layers)
    assert float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)) < 5 / 64


def test_weights_are_neither_dropped_nor_sown(batches):
    x = batches[0]
    with pytest.raises(ValueError, match="does not drop weights"):
        jq.attention(x, x, x, dropout_rate=0.1, deterministic=False)
    with pytest.raises(ValueError, match="does not sow"):
        jq.attention(x, x, x, module=object())
