import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from experiments.kv_accuracy import WINDOW, eight_bits, hadamard, kivi, nf4, rounded_attention
from jaxquant.arrays._qtypes import NF4_LEVELS


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_all_positions_at_once_are_what_a_decode_loop_gives(rng, format):
    """Of 200 tokens, 96 have left the rings at the last one, and none at the 100th."""
    q, k, v = (jnp.asarray(rng.normal(size=(1, 200, heads, 32)), jnp.float32) for heads in (4, 2, 2))
    rounding = functools.partial(eight_bits, format="int8") if format == "int8" else functools.partial(kivi, bits=4)
    got = jax.jit(lambda *x: rounded_attention(rounding, WINDOW, *x, causal=True))(q, k, v)
    cache = jq.KVCache.init(1, 256, 2, 32, format=format, dtype=jnp.float32)

    @jax.jit
    def attend(count):
        return cache.append(k, v, count[None]).attend(jax.lax.dynamic_index_in_dim(q, count - 1, 1, keepdims=False))

    for count in (100, 200):
        np.testing.assert_allclose(got[:, count - 1], attend(jnp.int32(count)), rtol=0, atol=1e-5)  # float32 sums


def test_nf4_and_the_basis(rng):
    x = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)
    largest = np.abs(np.asarray(x)).max(axis=0).astype(np.float16).astype(np.float32)
    levels = np.asarray(NF4_LEVELS)[:, None, None] * largest
    got, given = np.asarray(nf4(x)), np.asarray(x)
    np.testing.assert_allclose(np.abs(levels - got).min(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.abs(got - given), np.abs(levels - given).min(axis=0), atol=1e-6)  # or its equal
    np.testing.assert_allclose(hadamard(64) @ hadamard(64).T, np.eye(64), atol=1e-5)
