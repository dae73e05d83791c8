"""The container: what it holds, what it weighs, and that slices, stacks and jit leave it intact."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.arrays._qarray import QArray, codes_of, dequantize_array, from_codes, pack_padded, quantize_array
from jaxquant.arrays._qtypes import QTYPES
from jaxquant.arrays._spec import PRESETS, PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, TensorSpec

W4 = QuantSpec(TensorSpec("int4", PerGroup(16), scale_dtype="bfloat16"))
UINT4 = QuantSpec(TensorSpec("uint4", PerGroup(16)))

quantize = jax.jit(quantize_array, static_argnums=(1, 2))
dequantize = jax.jit(dequantize_array)


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 0.05, shape).astype(np.float32)


@pytest.mark.parametrize("qtype", ["int2", "int3", "uint4", "int5", "uint6", "int7", "nf4"])
def test_codes_of_ragged_lengths_survive_packing(rng, qtype):
    spec, length = QuantSpec(TensorSpec(qtype)), int(rng.integers(1, 8))
    w = weight(rng, 8 + length, 5)
    q = quantize(w, spec, -2)
    assert q.shape == w.shape
    assert q.qvalue.shape == (2 * QTYPES[qtype].bits, 5)
    codes = jax.jit(codes_of)(q)
    assert codes.shape == w.shape
    np.testing.assert_array_equal(jax.jit(pack_padded, static_argnums=(1, 2))(codes, q.format, -2), q.qvalue)
    expected = quantize(np.pad(w, [(0, 8 - length), (0, 0)]), spec, -2)  # zeros change no range
    np.testing.assert_array_equal(dequantize(q), dequantize(expected)[: w.shape[0]])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((40,), (-1,)),
        ((40, 6), (-2,)),
        ((6, 40), (-1,)),
        ((40, 2, 3), (-3,)),
        ((4, 16, 6), (-3, -2)),
        ((2, 3, 3, 16, 6), (-4, -3, -2)),
    ],
)
@pytest.mark.parametrize("spec", [QuantSpec(TensorSpec("int3")), QuantSpec(TensorSpec("uint4", PerGroup(8)))])
def test_any_contracting_axes_are_the_flat_matrix(rng, shape, axis, spec):
    w = weight(rng, *shape)
    q = quantize(w, spec, axis)
    assert (q.shape, q.ndim, q.size, q.dtype) == (shape, len(shape), w.size, jnp.float32)
    kept = [dim for dim in range(w.ndim) if dim - w.ndim not in axis]
    order = [*[w.ndim + a for a in axis], *kept]
    flat = w.transpose(order).reshape(np.prod([shape[a] for a in axis]), -1)
    expected = np.asarray(dequantize(quantize(flat, spec, -2)))
    expected = expected.reshape([shape[dim] for dim in order]).transpose(np.argsort(order))
    np.testing.assert_array_equal(dequantize(q), expected)


def test_groups_run_on_over_contracting_axes(rng):
    w = weight(rng, 4, 8, 6)
    q = quantize(w, W4, (-3, -2))
    assert q.scale.shape == (2, 1, 6)
    np.testing.assert_array_equal(
        dequantize(q), np.asarray(dequantize(quantize(w.reshape(32, 6), W4, -2))).reshape(w.shape)
    )


@pytest.mark.parametrize(
    "spec", [W4, UINT4, QuantSpec(TensorSpec("int8", PerBlock((16, 3))))], ids=lambda s: s.weight.qtype
)
@pytest.mark.parametrize("shape", [(37, 6), (5, 6), (2, 37, 6)])
def test_padding_to_whole_groups_is_exactly_undone(rng, spec, shape):
    w = weight(rng, *shape)
    with pytest.raises(
        ValueError, match=rf"group size 16 does not divide the contracting length {shape[-2]};.*pad=True"
    ):
        quantize(w, spec, -2)
    padding = QuantSpec(dataclasses.replace(spec.weight, pad=True))
    q = quantize(w, padding, -2)
    missing = -shape[-2] % 16
    by_hand = quantize(np.pad(w, [*[(0, 0)] * (w.ndim - 2), (0, missing), (0, 0)]), spec, -2)
    assert (q.shape, q.padded) == (shape, shape[-2] + missing)
    np.testing.assert_array_equal(dequantize(q), np.asarray(dequantize(by_hand))[..., : shape[-2], :])
    assert q.nbytes == by_hand.nbytes
    assert q.bits > by_hand.bits


def test_padding_changes_nothing_where_groups_fit(rng, assert_same):
    w = weight(rng, 32, 6)
    assert_same(quantize(w, W4, -2), quantize(w, QuantSpec(dataclasses.replace(W4.weight, pad=True)), -2))


GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(16), PerBlock((16, 4))]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
def test_a_slice_of_a_stack_is_the_quantized_slice(rng, granularity, assert_same):
    spec, stack = QuantSpec(TensorSpec("uint3", granularity)), weight(rng, 3, 32, 8)
    q = quantize(stack, spec, -2)
    slices = [quantize(w, spec, -2) for w in stack]
    for i, expected in enumerate(slices):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], q), expected)
    assert_same(jax.tree.map(lambda *leaves: jnp.stack(leaves), *slices), q)
    assert_same(jax.jit(jax.vmap(functools.partial(quantize_array, spec=spec)))(stack), q)

    def step(_, layer):
        assert layer.shape == (32, 8)
        return _, dequantize_array(layer)

    _, scanned = jax.jit(lambda q: jax.lax.scan(step, 0, q))(q)
    np.testing.assert_array_equal(scanned, dequantize(q))
    np.testing.assert_array_equal(jax.jit(jax.vmap(dequantize_array))(q), scanned)


def test_two_stack_axes_slice_one_after_the_other(rng, assert_same):
    stack = weight(rng, 2, 3, 32, 8)
    q = quantize(stack, W4, -2)
    assert q.lead == (2, 3)
    assert_same(jax.tree.map(lambda leaf: leaf[1, 2], q), quantize(stack[1, 2], W4, -2))


def test_jit_returns_it_unchanged_and_traces_once(rng, assert_same):
    q = quantize(weight(rng, 32, 8), PRESETS["w8a8"], -2)
    traces = []

    @jax.jit
    def identity(q):
        traces.append(q)
        return q

    again = identity(identity(q))
    assert_same(again, q)
    assert len(traces) == 1
    assert again.activation == PRESETS["w8a8"].activation
    assert hash(jax.tree.structure(again)) == hash(jax.tree.structure(q))


def test_other_metadata_is_another_structure(rng):
    q = quantize(weight(rng, 32, 8), W4, -2)
    for change in ({"dtype": jnp.dtype(jnp.bfloat16)}, {"trailing": (31, 8)}, {"layout": "other"}, {"qtype": "nf4"}):
        assert jax.tree.structure(dataclasses.replace(q, **change)) != jax.tree.structure(q)


def test_bytes_are_those_of_the_buffers(rng):
    w = weight(rng, 256, 64)
    for name, spec in PRESETS.items():
        q = quantize(w, spec, -2)
        assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q)), name
    assert quantize(w, PRESETS["w4a16"], -2).bits == 4 + 16 / 128
    assert quantize(w, PRESETS["w4a16-asym"], -2).bits == 4 + (16 + 8) / 128
    assert quantize(w, PRESETS["w3a16"], -2).bits == 3 + 16 / 128
    assert quantize(w, PRESETS["w8a16"], -2).bits == 8 + 32 / 256
    assert quantize(w, PRESETS["w8a8-tensor"], -2).bits == 8 + 32 / w.size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_logical_dtype_comes_back(rng, dtype):
    w = weight(rng, 32, 8).astype(jnp.dtype(dtype))
    q = quantize(w, W4, -2)
    assert dequantize(q).dtype == q.dtype == jnp.dtype(dtype)
    wide = np.asarray(dequantize(quantize(w.astype(np.float32), W4, -2)))
    np.testing.assert_array_equal(dequantize(q), wide.astype(jnp.dtype(dtype)))


def with_leaves(q: QArray, spec: QuantSpec, **leaves: jax.Array) -> QArray:
    return from_codes(codes_of(q), q.scale, q.zero_point, spec, q.axis, q.shape, q.dtype, **leaves)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_pre_scale_and_input_order_are_in_the_float_weight(rng, lead):
    order, x = rng.permuted(np.tile(np.arange(32), (*lead, 1)), axis=-1), weight(rng, *lead, 5, 32)
    pre_scale, w = rng.uniform(0.5, 2, (*lead, 32)).astype(np.float32), weight(rng, *lead, 32, 8)
    q = quantize(w, W4, -2)
    rows = np.asarray(dequantize(q), np.float64)
    q = with_leaves(q, W4, pre_scale=jnp.asarray(pre_scale), perm=jnp.asarray(order, jnp.int32))
    assert all(leaf.shape == (*lead, 32, 1) for leaf in (q.pre_scale, q.perm))
    expected = np.take_along_axis(x * pre_scale[..., None, :], order[..., None, :], -1) @ rows
    got = x.astype(np.float64) @ np.asarray(dequantize(q), np.float64)
    # Both sides round one float32 product an element, over sums of 32 of them; pre_scale is at most 2.
    bound = 32 * 2 * 2.0**-24 * np.abs(x).max() * 2 * np.abs(rows).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)


def test_leaves_take_the_weight_rank(rng, assert_same):
    w = weight(rng, 2, 4, 8, 6)
    q, factors = quantize(w, W4, (-3, -2)), rng.uniform(0.5, 2, (2, 4, 8)).astype(np.float32)
    static = rng.uniform(size=2).astype(np.float32)
    scaled = with_leaves(q, W4, pre_scale=jnp.asarray(factors), act_scale=jnp.asarray(static))
    assert (scaled.pre_scale.shape, scaled.act_scale.shape) == ((2, 4, 8, 1), (2, 1, 1, 1))
    np.testing.assert_array_equal(scaled.act_scale.ravel(), static)
    np.testing.assert_array_equal(dequantize(scaled), np.asarray(dequantize(q)) * factors[..., None])
    assert_same(with_leaves(q, W4), q)


def test_a_kernel_layout_is_not_read_as_plain(rng):
    q = dataclasses.replace(quantize(weight(rng, 32, 8), W4, -2), layout="mosaic")
    with pytest.raises(ValueError, match="layout 'mosaic' is packed for a kernel"):
        dequantize_array(q)


def test_it_never_turns_into_a_float_array_by_itself(rng):
    q = quantize(weight(rng, 32, 8), W4, -2)
    with pytest.raises(TypeError):
        jnp.asarray(q)
    with pytest.raises(TypeError):
        q * 2.0
    with pytest.raises(TypeError):
        jnp.dot(jnp.ones((2, 32)), q)


def test_it_compares_and_hashes_by_identity(rng):
    q = quantize(weight(rng, 32, 8), W4, -2)
    other = jax.tree.map(jnp.copy, q)
    assert q == q
    assert q != other
    assert len({q, other}) == 2


def test_unflatten_takes_anything(rng):
    q = quantize(weight(rng, 32, 8), UINT4, -2)
    axes = jax.tree.map(lambda leaf: 0, q)
    assert (axes.qvalue, axes.scale, axes.zero_point, axes.pre_scale) == (0, 0, 0, None)
    assert repr(axes) == "QArray(uint4, qvalue=0, scale=0)"
    assert repr(q) == "QArray(uint4[32, 8], axis=(-2,), scale=[2, 8], plain)"
    assert "activation=int8" in repr(quantize(weight(rng, 32, 8), PRESETS["w8a8"], -2))


@pytest.mark.parametrize(
    ("shape", "dtype", "axis", "error", "message"),
    [
        ((32, 8), "int32", -2, TypeError, "dtype int32 cannot be quantized; floating dtypes"),
        ((32, 8), "bool", -2, TypeError, "dtype bool cannot be quantized"),
        ((0, 8), "float32", -2, ValueError, r"shape \(0, 8\) has no elements"),
        ((32, 0), "float32", -2, ValueError, r"shape \(32, 0\) has no elements"),
        ((32,), "float32", -2, ValueError, "distinct axes from -1 to -1 are accepted"),
        ((32, 8), "float32", 0, ValueError, "distinct axes from -2 to -1 are accepted"),
        ((32, 8), "float32", (-2, -2), ValueError, "distinct axes"),
        ((32, 8), "float32", (), ValueError, "distinct axes"),
        ((), "float32", -1, ValueError, "distinct axes"),
    ],
)
def test_what_is_no_weight_is_named(shape, dtype, axis, error, message):
    with pytest.raises(error, match=message):
        quantize_array(jnp.zeros(shape, dtype), W4, axis)
