"""Experts packed for the grouped kernel: unmodified ragged and batched products, `moe`, merged gate and up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.arrays._qarray import quantize_array

E, K, N = 5, 128, 64
SIZES = {"even": [4, 4, 4, 4, 4], "ragged": [1, 0, 7, 0, 9], "one expert": [0, 0, 17, 0, 0], "rest": [2, 0, 3, 0, 1]}


@pytest.fixture
def tolerance():
    # the roundings of test_pack_for: of the weight to x's dtype, of the result, twice
    return 2 * 2.0**-8


@pytest.fixture
def kernel():
    return "grouped_matmul", "int4_fragments"


def experts(rng, shape=(E, K, N), preset="w4a16", group=32, **changes):
    w = jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.bfloat16)
    q = quantize_array(w, jq.QuantConfig.preset(preset, group_size=group).default)
    return dataclasses.replace(q, **changes)


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym"])
@pytest.mark.parametrize("sizes", SIZES)
def test_an_unmodified_ragged_product_runs_in_the_grouped_kernel(rng, activation, agrees_by_kernel, preset, sizes):
    counts = jnp.asarray(SIZES[sizes], jnp.int32)
    agrees_by_kernel(lambda w, x: jax.lax.ragged_dot(x, w, counts), experts(rng, preset=preset), activation(20, K))


@pytest.mark.parametrize("preset", ["w8a8", "fp8", "w4a8"])
def test_activations_of_eight_bits_run_in_the_grouped_kernel(rng, activation, assert_close, implementations, preset):
    w = jnp.asarray(rng.normal(size=(E, K, N)) * K**-0.5, jnp.bfloat16)
    q = quantize_array(w, jq.QuantConfig.preset(preset).default)
    x, counts = activation(20, K), jnp.asarray(SIZES["ragged"], jnp.int32)
    fn = lambda w, x: jax.lax.ragged_dot(x, w, counts)  # noqa: E731
    packed = jq.pack_for(q, "h200")
    assert implementations(fn, packed, x) == [("grouped_matmul", "")]
    assert_close(jax.jit(jq.quantized(fn))(packed, x), jax.jit(jq.quantized(fn))(q, x))


def test_few_rows_read_their_own_experts_only(rng, activation, assert_close):
    """XLA's form for fewer rows than experts: NaN scales elsewhere do not reach the result."""
    q, x, sizes = experts(rng), activation(3, K), jnp.asarray([0, 2, 0, 1, 0], jnp.int32)
    hit = np.asarray(sizes) > 0
    spoilt = dataclasses.replace(q, scale=jnp.where(hit[:, None, None], q.scale, jnp.nan))
    wanted = np.stack([np.asarray(x[row], np.float64) @ np.asarray(jq.dequantize(q)[e], np.float64)
                       for row, e in enumerate((1, 1, 3))])  # fmt: skip
    assert_close(jq.ragged_dot(x, spoilt, sizes), wanted)


def test_factors_and_input_orders_are_each_expert_s_own(rng, activation, agrees_by_kernel):
    factors = jnp.asarray(rng.uniform(0.5, 2, (E, K, 1)), jnp.float32)
    order = jnp.asarray(np.stack([rng.permutation(K) for _ in range(E)])[:, :, None], jnp.int32)
    q, sizes = experts(rng, pre_scale=factors, perm=order), jnp.asarray(SIZES["ragged"], jnp.int32)
    agrees_by_kernel(lambda w, x: jax.lax.ragged_dot(x, w, sizes), q, activation(20, K))


@pytest.mark.parametrize("subscripts", ["gecd,edh->gech", "ecd,edh->ech"])
def test_batched_expert_einsums_are_one_grouped_product(rng, activation, agrees_by_kernel, subscripts):
    shape = (2, E, 3, K) if subscripts.startswith("g") else (E, 4, K)
    agrees_by_kernel(lambda w, x: jnp.einsum(subscripts, x, w), experts(rng), activation(*shape))


def test_dense_dispatch_stays_one_dense_product(rng, activation, assert_close, implementations):
    """Every token to every expert: the matrices lie side by side, and the dispatch weighs the results."""
    q, x = experts(rng), activation(6, K)
    gates = jax.nn.softmax(jnp.asarray(rng.normal(size=(6, E)), jnp.bfloat16))
    fn = lambda w, x: jnp.einsum("te,etn->tn", gates, jnp.einsum("tk,ekn->etn", x, w))  # noqa: E731
    packed = jq.pack_for(q, "h200")
    assert implementations(fn, packed, x) == [("int4_matmul", "")]
    assert_close(jax.jit(jq.quantized(fn))(packed, x), jax.jit(jq.quantized(fn))(q, x))


def test_the_gradient_of_rows_passes_the_kernel(rng, activation, assert_close):
    q, x, slope, sizes = experts(rng), activation(17, K), activation(17, N), jnp.asarray(SIZES["ragged"], jnp.int32)

    def loss(x, w):
        return jnp.sum(jq.ragged_dot(x, w, sizes) * slope)

    assert_close(jax.grad(loss)(x, jq.pack_for(q, "h200")), jax.grad(loss)(x, q))


@pytest.fixture
def layer(rng):
    """Draws (x [T, 128], logits [T, 5], gate, up, down), quantized."""

    def make(tokens, preset="w4a16"):
        group = 32 if preset == "w4a16" else None
        x = jnp.asarray(rng.normal(size=(tokens, 128)), jnp.bfloat16)
        logits = jnp.asarray(rng.normal(size=(tokens, E)), jnp.float32)
        shapes = ((E, 128, 64), (E, 128, 64), (E, 64, 128))
        return x, logits, *(experts(rng, shape, preset, group) for shape in shapes)

    return make


@pytest.mark.parametrize(("tokens", "preset"), [(1, "w4a16"), (9, "w4a16"), (9, "w8a8")])
def test_moe_on_packed_and_merged_experts_is_moe(layer, tokens, preset):
    x, logits, gate, up, down = layer(tokens, preset)
    run, routing = jax.jit(jq.moe, static_argnums=5), jq.Routing(per_token=2)
    wanted = run(x, logits, gate, up, down, routing)
    merged = jq.merge_gate_up(gate, up)
    packed = [jq.pack_for(w, "h200") for w in (gate, up, down, merged)]
    assert {w.layout for w in packed} == {"int4_fragments" if preset == "w4a16" else "int8_k_major"}
    for weights in ([*packed[:3]], [packed[3], None, packed[2]], [merged, None, down]):
        # three products in a row, each within the tolerance of one
        got, wide = (np.asarray(a, np.float64) for a in (run(x, logits, *weights, routing), wanted))
        assert np.linalg.norm(got - wide) <= 3 * 2 * 2.0**-8 * np.linalg.norm(wide)


def test_merging_refuses_what_cannot_be_one_weight(layer, rng):
    _, _, gate, up, down = layer(1)
    with pytest.raises(TypeError, match="two float arrays or two QArrays"):
        jq.merge_gate_up(gate, jq.dequantize(up))
    with pytest.raises(ValueError, match="equal formats and shapes"):
        jq.merge_gate_up(gate, down)
    factors = [jnp.asarray(rng.uniform(1, 2, (E, 128, 1)), jnp.float32) for _ in range(2)]
    scaled = [dataclasses.replace(w, pre_scale=f) for w, f in zip((gate, up), factors, strict=True)]
    with pytest.raises(ValueError, match="pre_scale of gate and up differ"):
        jq.merge_gate_up(*scaled)


def test_stacks_of_layers_are_scanned(rng, activation, assert_close, implementations):
    q, x, sizes = experts(rng, (3, E, K, K)), activation(17, K), jnp.asarray(SIZES["ragged"], jnp.int32)

    def layers(w, x):
        return jax.lax.scan(lambda x, w: (x + jax.lax.ragged_dot(x, w, sizes), None), x, w)[0]

    packed = jq.pack_for(q, "h200")
    assert implementations(layers, packed, x) == [("grouped_matmul", "")]
    assert_close(jax.jit(jq.quantized(layers))(packed, x), jax.jit(jq.quantized(layers))(q, x))
