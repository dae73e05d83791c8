"""The explicit door: products against NumPy in float64, integer products exactly, lookups exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.arrays._qarray import QArray, dequantize_array, from_codes, quantize_array
from jaxquant.arrays._spec import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, TensorSpec
from jaxquant.products._grouped import ragged_dot
from jaxquant.products._lookup import take
from jaxquant.products._ops import dot_general
from jaxquant.tracing._quantized import einsum


def weight(rng, shape, spec, axis=-2):
    return jax.jit(quantize_array, static_argnums=(1, 2))(jnp.asarray(rng.normal(size=shape), jnp.float32), spec, axis)


def exact(q: QArray) -> np.ndarray:
    return np.asarray(jax.jit(dequantize_array)(q), np.float64)


def activation(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def run(x, q, numbers=(((1,), (0,)), ((), ())), dtype=None):
    """One program instead of one for each operation."""
    return dot_general(x, q, numbers, dtype)


BATCHED = (((2,), (1,)), ((0,), (0,)))


def assert_close(got, want, terms, dtype=jnp.float32):
    """float32 sums of `terms` products of size one, in any order, then one rounding to `dtype`: eps sqrt(terms) each
    way and a factor of 8 for the largest of many results."""
    scale = 8 * np.sqrt(terms) * max(1.0, np.abs(want).max() / np.sqrt(terms))
    allowed = scale * (float(jnp.finfo(jnp.float32).eps) * np.sqrt(terms) + float(jnp.finfo(dtype).eps) / 8)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=allowed, rtol=0)


def weight_only(granularity, qtype="int4", pad=False):
    return QuantSpec(TensorSpec(qtype, granularity, pad=pad))


GRIDS = [PerTensor(), PerChannel(), PerGroup(16), PerBlock((16, 8))]
CONTRACTIONS = [  # the weight contracts its last axis but one, so some of these sum over scales, not over groups
    ("mk,kn->mn", (7, 64), (64, 24)),
    ("mk,nk->mn", (40, 64), (48, 64)),
    ("bmk,bkn->bmn", (3, 40, 64), (3, 64, 24)),
    ("abk,bkn->ban", (5, 3, 64), (3, 64, 24)),
    ("mhd,hdn->mn", (2, 4, 16), (4, 16, 24)),
    ("mdh,hdn->nm", (2, 16, 4), (4, 16, 24)),
    ("mk,khn->mhn", (33, 64), (64, 16, 8)),
    ("k,kn->n", (64,), (64, 8)),
]


PAIRS = [(grid, CONTRACTIONS[(i + 2 * j) % 8]) for i, grid in enumerate(GRIDS) for j in range(4)]


@pytest.mark.parametrize(("grid", "contraction"), PAIRS, ids=str)
def test_any_grid_against_any_contraction(rng, grid, contraction):
    subscripts, x_shape, w_shape = contraction
    x_names, w_names = subscripts.split("->")[0].split(",")
    q, x = weight(rng, w_shape, weight_only(grid, "uint4"), -2), activation(rng, *x_shape)
    terms = np.prod([n for n, name in zip(w_shape, w_names, strict=True) if name in x_names])
    assert_close(einsum(subscripts, x, q), np.einsum(subscripts, np.asarray(x, np.float64), exact(q)), terms)


FORMATS = ["w8a16", "w4a16", "w4a16-asym", "w3a16", "w2a16", "fp8", "nf4", "mxfp4", "int16", "uint8", "int5", "uint7"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_against_float64(rng, name):
    rows, dtype = [(1, jnp.float32), (64, jnp.bfloat16)][FORMATS.index(name) % 2]
    spec = PRESETS.get(name) or weight_only(PerGroup(32), name)
    if isinstance(spec.weight.granularity, PerGroup):
        spec = dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, granularity=PerGroup(32)))
    q, x = weight(rng, (96, 24), dataclasses.replace(spec, activation=None)), activation(rng, rows, 96, dtype=dtype)
    got = run(x, q, dtype=jnp.float32)
    # levels of nf4 are no bfloat16 numbers: each code is rounded once more, as each x has been
    assert_close(got, np.asarray(x, np.float64) @ exact(q), 96, dtype if name == "nf4" else jnp.float32)


def test_codes_enter_a_fused_product_bit_for_bit(rng):
    """At these sizes XLA's CPU backend fuses unpacking, product, scale and sum, and saturated a conversion in it."""
    q, x = weight(rng, (32, 160), weight_only(PerGroup(16))), activation(rng, 16, 32)
    assert_close(run(x, q), np.asarray(x, np.float64) @ exact(q), 32)


def oracle(x, q, spec):
    """Dynamic quantization of x by NumPy in float64 (the restricted grid), and the exact product of its codes."""
    x = np.asarray(x, np.float64)
    axis = None if isinstance(spec.granularity, PerTensor) else -1
    scale = np.float64(np.float32(np.abs(x).max(axis=axis, keepdims=True)) / np.float32(127.0))
    return np.clip(np.round(np.float32(x) / np.float32(scale)), -128, 127) * scale @ exact(q)


@pytest.mark.parametrize(("granularity", "rows"), [(PerToken(), 1), (PerTensor(), 70)])
@pytest.mark.parametrize("qtype", ["int4", "uint4", "uint8"])
def test_integer_products_round_x_once_and_no_more(rng, granularity, qtype, rows):
    spec = TensorSpec("int8", granularity, grid="restricted")
    q = weight(rng, (64, 24), QuantSpec(TensorSpec(qtype, PerGroup(16)), spec))
    x = activation(rng, rows, 64)
    got = run(x, q)
    assert_close(got, oracle(x, q, spec), 64)
    jaxpr = str(jax.make_jaxpr(lambda x: dot_general(x, q, (((1,), (0,)), ((), ()))))(x))
    assert "preferred_element_type=int32" in jaxpr


@pytest.mark.parametrize("weight_type", ["int8", "uint8", "uint4"])
def test_asymmetric_activations_and_static_scales(rng, weight_type):
    spec = QuantSpec(TensorSpec(weight_type, PerGroup(16)), TensorSpec("uint8", PerTensor(), static=True))
    q = weight(rng, (64, 24), spec)
    q = dataclasses.replace(q, act_scale=jnp.full((1, 1), 0.03), act_zero_point=jnp.full((1, 1), 100, jnp.uint8))
    x = activation(rng, 7, 64)
    codes = np.clip(np.round(np.float32(x) / np.float32(0.03)) + 100, 0, 255)
    want = (codes - 100) * np.float64(np.float32(0.03)) @ exact(q)
    assert_close(run(x, q), want, 64)
    x = activation(rng, 3, 5, 64)  # one static scale for each expert
    experts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), q)
    experts = dataclasses.replace(experts, act_scale=jnp.asarray([0.03, 0.02, 0.05]).reshape(3, 1, 1))
    got = run(x, experts, BATCHED)
    for expert, step in enumerate((0.03, 0.02, 0.05)):
        codes = np.clip(np.round(np.float32(x[expert]) / np.float32(step)) + 100, 0, 255)
        assert_close(got[expert], (codes - 100) * np.float64(np.float32(step)) @ exact(q), 64)


def test_activation_groups(rng):
    spec = QuantSpec(TensorSpec("int4", PerGroup(32)), TensorSpec("int8", PerGroup(16), grid="restricted"))
    q, x = weight(rng, (64, 24), spec), activation(rng, 70, 64)
    blocks = np.asarray(x, np.float64).reshape(70, 4, 16)
    scale = np.float64(np.float32(np.abs(blocks).max(-1, keepdims=True)) / np.float32(127))
    rounded = (np.round(np.float32(blocks) / np.float32(scale)) * scale).reshape(70, 64)
    assert_close(run(x, q), rounded @ exact(q), 64)


@pytest.mark.parametrize("act", ["int8", None])
def test_pre_scale_and_input_order(rng, act):
    spec = QuantSpec(TensorSpec("int4", PerGroup(16)), act and TensorSpec(act, PerToken(), grid="restricted"))
    q = weight(rng, (3, 64, 24), spec)
    factors, orders = rng.uniform(0.5, 2, (3, 64)), np.stack([rng.permutation(64) for _ in range(3)])
    q = from_like(q, pre_scale=jnp.asarray(factors, jnp.float32), perm=jnp.asarray(orders, jnp.int32))
    bare = from_like(q, pre_scale=None, perm=None)
    x = activation(rng, 3, 5, 64)
    got = run(x, q, BATCHED)
    rows = run(x[1], jax.tree.map(lambda leaf: leaf[1], q))
    sorted_x = [(np.asarray(x[e], np.float64) * np.float32(factors[e]))[:, orders[e]] for e in range(3)]
    for e in range(3):
        part = jax.tree.map(lambda leaf, e=e: leaf[e], bare)
        want = sorted_x[e] @ exact(part) if act is None else oracle(np.float32(sorted_x[e]), part, spec.activation)
        assert_close(got[e], want, 64)
    np.testing.assert_allclose(rows, got[1], rtol=1e-5, atol=1e-4)
    if act is None:
        whole = np.einsum("ebk,ekn->ebn", np.asarray(x, np.float64), exact(q))
        assert_close(got, whole, 64)


def from_like(q, **leaves):
    """A QArray with other leaves, through the builder that gives them the weight's rank."""
    from jaxquant.arrays._qarray import codes_of

    spec = QuantSpec(TensorSpec(q.qtype), q.activation)
    return from_codes(codes_of(q), q.scale, q.zero_point, spec, q.axis, q.shape, q.dtype, **leaves)


def test_padded_groups_are_exact(rng):
    q = weight(rng, (3, 50, 24), weight_only(PerGroup(16), pad=True))
    x = activation(rng, 3, 40, 50)
    want = np.einsum("ebk,ekn->ebn", np.asarray(x, np.float64), exact(q))
    assert_close(run(x, q, BATCHED), want, 50)
    y = activation(rng, 3, 5, 24)  # the padded axis free
    want = np.einsum("ebn,ekn->ebk", np.asarray(y, np.float64), exact(q))
    assert_close(run(y, q, (((2,), (2,)), ((0,), (0,)))), want, 24)


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "w4a16-asym", "fp8"])
def test_ragged_rows_are_those_of_their_expert(rng, name):
    spec = PRESETS[name]
    if isinstance(spec.weight.granularity, PerGroup):
        spec = dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, granularity=PerGroup(16)))
    q, x = weight(rng, (3, 64, 24), spec), activation(rng, 9, 64)
    got = jax.jit(ragged_dot)(x, q, jnp.asarray([4, 0, 3]))
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 7))):
        want = run(x[rows], jax.tree.map(lambda leaf, e=expert: leaf[e], q))
        np.testing.assert_allclose(got[rows], want, rtol=1e-5, atol=1e-4)  # the same products, added in another order
    np.testing.assert_array_equal(got[7:], 0)


@pytest.mark.parametrize(
    ("qtype", "axis"),
    [("int2", -1), ("int3", -2), ("int4", -2), ("uint6", -1), ("int8", -2), ("nf4", -2), ("float8_e4m3fn", -1)],
)
def test_lookups_are_exact_along_every_axis(rng, qtype, axis):
    q = weight(rng, (40, 24), weight_only(PerGroup(8), qtype), axis)
    table, rows = dequantize_array(q), jnp.asarray([[0, 39], [-1, 17]])
    look = jax.jit(lambda q: (take(q, rows), take(q, rows, axis=1), take(q, jnp.asarray([40, -41]))))
    by_row, by_column, outside = look(q)
    np.testing.assert_array_equal(by_row, table[rows])
    np.testing.assert_array_equal(by_column, jnp.take(table, rows, axis=1))
    assert np.isnan(outside).all()


def test_the_peak_of_a_grouped_product_holds_no_float_copy_of_the_weight(rng):
    q = weight(rng, (1024, 512), weight_only(PerGroup(32)))
    x = activation(rng, 64, 1024)
    held = run.lower(x, q).compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * q.size / 2


def test_refusals_say_why(rng):
    q = weight(rng, (64, 24), weight_only(PerChannel()))
    with pytest.raises(NotImplementedError, match="one side must be quantized"):
        dot_general(q, q, (((0,), (0,)), ((), ())))
    two = from_like(q, pre_scale=jnp.ones((64, 24)))
    with pytest.raises(NotImplementedError, match="pre_scale"):
        run(jnp.ones((2, 64)), two)
    with pytest.raises(NotImplementedError, match=r"\[E, K, N\]"):
        ragged_dot(jnp.ones((2, 64)), q, jnp.asarray([2]))
