"""Weights quantized by slices have the bits of weights quantized whole, and are dequantized to the same bits."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxquant._slices
from jaxquant import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantConfig,
    QuantSpec,
    Rule,
    TensorSpec,
    dequantize,
    quantize,
)
from jaxquant._slices import dequantized, plan_slices, quantize_slices
from jaxquant.storage._mapped import mapped_array, mapping_of

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(jaxquant._slices, "SLICE_BYTES", 4096)


def whole(weight, spec, axis):
    return quantize({"w": weight}, QuantConfig(rules=(Rule("w", spec, axis),)))["w"]


def assert_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (b.shape, b.dtype, np.asarray(b).tobytes())


# Each has to be cut where it says: along an output axis with scales of its own, or else (shared) in two passes.
CUTS = {
    "one scale for the matrix": ("int8", PerTensor(), (61, 200), (-2,), (-1, True)),
    "one scale and zero point": ("uint4", PerTensor(), (61, 200), (-2,), (-1, True)),
    "one scale, all axes contracted": ("int8", PerTensor(), (200, 61), (-2, -1), (-2, True)),
    "one scale for each expert": ("float8_e4m3fn", PerTensor(), (2, 96, 91), (-2,), (-1, True)),
    "small experts": ("int8", PerTensor(), (23, 16, 8), (-2,), (-3, False)),
    "one scale for each row": ("int8", PerTensor(), (301, 60), (-1,), (-2, False)),
    "blocks": ("float8_e4m3fn", PerBlock((32, 32)), (96, 224), (-2,), (-1, False)),
    "outputs": ("int3", PerChannel(), (65, 210), (-2,), (-1, False)),
    "outputs in front": ("int4", PerGroup(20), (307, 60), (-1,), (-2, False)),
    "padded groups": ("int4", PerGroup(32), (100, 90), (-2,), (-1, False)),
    "heads": ("nf4", PerGroup(32), (64, 3, 55), (-3,), (-1, False)),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_bits_of_the_whole(rng, tmp_path, name):
    dtype = np.dtype(rng.choice([np.float32, BF16]))
    qtype, granularity, shape, axis, expected = CUTS[name]
    spec = QuantSpec(TensorSpec(qtype, granularity, scale_dtype=dtype.name, pad="padded" in name))
    weight = (rng.normal(size=shape) * rng.lognormal(size=shape[-1])).astype(dtype)
    cut = plan_slices(jax.ShapeDtypeStruct(shape, dtype), spec, axis)
    assert (cut.dim, cut.shared) == expected
    assert len(cut.starts()) > 1
    want = whole(weight, spec, axis)
    got = quantize_slices("w", weight, spec, axis, cut)
    assert_bits(got, want)
    assert_bits(dequantized(got), dequantize(want))
    assert mapping_of(dequantized(got, tmp_path)) is not None
    assert_bits(dequantized(got, tmp_path), dequantize(want))


def test_ranges_that_are_searched_need_all_that_shares_a_scale():
    weight = jax.ShapeDtypeStruct((64, 512), np.float32)
    for find in ("mse", "percentile"):
        assert plan_slices(weight, QuantSpec(TensorSpec("int8", PerTensor(), range=find)), (-2,)) is None
        assert plan_slices(weight, QuantSpec(TensorSpec("int8", PerChannel(), range=find)), (-2,)) is not None
    assert plan_slices(jax.ShapeDtypeStruct((8, 8), np.float32), QuantSpec(TensorSpec("int8")), (-2,)) is None
    assert plan_slices(jax.ShapeDtypeStruct((9999,), np.float32), QuantSpec(TensorSpec("int8")), (-1,)) is None


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()])
def test_what_is_not_finite_is_found_at_its_place(rng, granularity):
    weight = rng.normal(size=(64, 200)).astype(np.float32)
    weight[5, 190] = np.nan
    spec = QuantSpec(TensorSpec("int8", granularity))
    cut = plan_slices(jax.ShapeDtypeStruct(weight.shape, weight.dtype), spec, (-2,))
    with pytest.raises(ValueError, match=r"w: 1 of 12800 values are NaN or Inf, the first at index \(5, 190\)"):
        quantize_slices("w", weight, spec, (-2,), cut)


def test_input_factors_and_order_are_sliced_too(rng):
    q = whole(rng.normal(size=(96, 120)).astype(np.float32), QuantSpec(TensorSpec("int4", PerGroup(32))), (-2,))
    perm = rng.permutation(96).astype(np.int32)[:, None]
    q = dataclasses.replace(q, perm=perm, pre_scale=rng.lognormal(size=(96, 1)).astype(np.float32))
    assert_bits(dequantized(jax.tree.map(np.asarray, q)), dequantize(q))


def test_a_mapped_array_is_there_after_its_memory_was_given_back(tmp_path, rng):
    numbers = rng.normal(size=(3, 500)).astype(BF16)
    array = mapped_array(tmp_path, numbers.shape, numbers.dtype)
    array[...] = numbers
    jaxquant._slices.forget_pages(array)
    np.testing.assert_array_equal(array, numbers)
    assert not list(tmp_path.iterdir())
