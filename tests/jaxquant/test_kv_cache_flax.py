"""A quantized cache as a variable of a Flax `cache` collection, against Flax's own decoding attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq


class CachedAttention(nn.Module):
    """`nn.MultiHeadDotProductAttention(decode=True)` for one token at a time, its cache quantized."""

    num_heads: int
    capacity: int
    format: str = "int8"

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        sizes = x.shape[0], self.capacity, self.num_heads, features // self.num_heads
        query, key, value = (
            nn.DenseGeneral((self.num_heads, sizes[3]), name=name)(x) for name in ("query", "key", "value")
        )
        init = lambda: jq.KVCache.init(*sizes, format=self.format, dtype=x.dtype)  # noqa: E731
        cache = self.variable("cache", "kv", init)
        if not self.is_initializing():
            cache.value = cache.value.append(key, value)
        out = cache.value.attend(query[:, 0])[:, None]
        return nn.DenseGeneral(features, axis=(-2, -1), name="out")(out)


@pytest.mark.parametrize(("format", "step"), [("float", 0.0), ("int8", 1 / 254), ("int4", 0.0)])
def test_a_flax_cache_collection_may_hold_it(rng, format, step):
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.float32)
    flax = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    state = flax.init(jax.random.key(0), x)
    ours = CachedAttention(num_heads=2, capacity=32, format=format)
    cache = ours.init(jax.random.key(0), x[:, :1])["cache"]
    steps = [
        jax.jit(
            lambda cache, x, model=model: model.apply({"params": state["params"], "cache": cache}, x, mutable=["cache"])
        )
        for model in (flax, ours)
    ]
    expected_cache = state["cache"]
    for at in range(5):
        expected, held = steps[0](expected_cache, x[:, at : at + 1])
        got, ours_held = steps[1](cache, x[:, at : at + 1])
        expected_cache, cache = held["cache"], ours_held["cache"]
        # Half a step of values and of keys; scores are of order 1, and so is what a change of them does to the output.
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=(1e-5 + 8 * step) * scale)
    np.testing.assert_array_equal(cache["kv"].lengths, [5, 5])  # recent tokens of int4 are exact: so is its output
