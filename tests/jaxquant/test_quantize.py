"""`quantize` as users call it: what it gives back, what it costs, and what it says of bad input."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant._quantize import _quantize_checked

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = jq.QuantConfig.preset("w4a16", group_size=16)


def matrix(rng, *shape):
    return rng.standard_normal(shape or (64, 24)).astype(np.float32)


# What it gives back.


def test_numpy_memory_mapped_and_device_leaves_give_the_same_codes(rng, tmp_path):
    w = matrix(rng)
    mapped = np.memmap(tmp_path / "w", np.float32, "w+", shape=w.shape)
    mapped[:] = w
    params = {"numpy": w, "mapped": mapped, "device": jnp.asarray(w)}
    first, *others = jax.tree.leaves(jq.quantize(params, CONFIG), is_leaf=lambda leaf: isinstance(leaf, jq.QArray))
    for other in others:
        for mine, its in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mine, its)


def test_leaves_that_stay_are_the_caller_s_own(rng):
    params = {"kernel": matrix(rng), "bias": matrix(rng, 24), "steps": np.arange(6).reshape(2, 3), "none": None}
    qparams = jq.quantize(params, CONFIG)
    assert isinstance(qparams["kernel"], jq.QArray)
    assert all(qparams[name] is params[name] for name in ("bias", "steps", "none"))


def test_float0_and_integer_leaves_stay_with_a_reason(rng):
    tangent = np.zeros((16, 16), jax.dtypes.float0)
    params = {"kernel": matrix(rng), "tangent": tangent, "table": np.ones((16, 16), np.int32)}
    qparams = jq.quantize(params, CONFIG)
    assert qparams["tangent"] is tangent
    del qparams["tangent"]  # which no program takes as an input
    explanation = jq.explain(lambda p, x: x @ p["kernel"], qparams, jnp.ones((2, 64)))
    assert explanation.left == (("table", "int32[16, 16]", "dtype int32 is not floating"),)
    with pytest.raises(ValueError, match=r"tangent: rule 'tangent' asks to quantize .*float0.*Rule\(pattern, None\)"):
        jq.quantize(params, jq.QuantConfig(rules=(jq.Rule("tangent", CONFIG.default),)))


@pytest.mark.parametrize("preset", ["w8a16", "w4a16", "w4a16-asym", "w3a16", "w8a8", "fp8", "nf4", "mxfp4"])
def test_an_all_zero_channel_comes_back_as_zeros(rng, preset):
    w = matrix(rng, 128, 24)
    w[:, 7] = 0
    restored = jq.dequantize(jq.quantize({"kernel": w}, jq.QuantConfig.preset(preset)))["kernel"]
    np.testing.assert_array_equal(restored[:, 7], 0)
    assert np.all(np.any(np.asarray(restored) != 0, axis=0) == (np.arange(24) != 7))


def test_each_shape_and_spec_is_compiled_once(rng):
    shape = (48, int(rng.integers(40, 4000)))  # not one that another test has compiled
    params = {f"layer_{i}": {"kernel": matrix(rng, *shape)} for i in range(4)}
    before = _quantize_checked._cache_size()
    jq.quantize(params, CONFIG)
    assert _quantize_checked._cache_size() == before + 1


PEAK = """
import numpy as np, jaxquant as jq
from experiments.memory import peak_bytes, reset_peak
config = jq.QuantConfig.preset("w4a16")
def tree(layers): return {str(i): {"kernel": np.ones((3072, 3072), np.float32)} for i in range(layers)}
jq.quantize(tree(1), config)
params = tree(8)
reset_peak()
before = peak_bytes()
result = jq.quantize(params, config)
print((peak_bytes() - before - jq.summary(result).nbytes) / params["0"]["kernel"].nbytes)
"""


def test_the_peak_beside_the_result_is_one_leaf_of_eight():
    command = [sys.executable, "-c", PEAK]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    # one leaf and its codes before they are packed; leaves are large enough for the allocator to give each back
    assert float(shown) < 1.5, shown


# What it says of bad input: the parameter, and the remedy.


def refused(params, config, *words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        jq.quantize(params, config)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(rng, bad):
    w = matrix(rng)
    w[5, 3] = bad
    good = matrix(rng)
    words = ("layer/kernel: 1 of 1536 values are NaN or Inf, the first at index (5, 3)", "Rule('layer/kernel', None)")
    refused({"first": {"kernel": good}, "layer": {"kernel": w}}, CONFIG, *words)


def test_an_unmatched_rule_names_the_nearest_paths(rng):
    config = jq.QuantConfig(CONFIG.default, rules=(jq.Rule("layer/kernl", None),))
    refused({"layer": {"kernel": matrix(rng)}}, config, "rule 'layer/kernl' matches no parameter", "layer/kernel")


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_a_rule_on_another_dtype(rng, dtype):
    config = jq.QuantConfig(rules=(jq.Rule("kernel", CONFIG.default),))
    words = (f"kernel: rule 'kernel' asks to quantize a leaf of dtype {dtype}", "Rule(pattern, None)")
    refused({"kernel": matrix(rng).astype(dtype)}, config, *words)


def test_a_leaf_that_is_no_array(rng):
    with pytest.raises(TypeError, match=r"name: arrays are accepted, got str; leave it with Rule\('name', None\)"):
        jq.quantize({"kernel": matrix(rng), "name": "model"}, CONFIG)


@pytest.mark.parametrize("config", ["w4a16", CONFIG.default, None])
def test_a_config_that_is_none(rng, config):
    with pytest.raises(TypeError, match=r"config: a QuantConfig is accepted, got .*QuantConfig\.preset\('w4a16'\)"):
        jq.quantize({"kernel": matrix(rng)}, config)


def test_under_jit(rng):
    with pytest.raises(TypeError, match=r"layer/kernel: quantize reads its weights, .*; call it outside"):
        jax.jit(lambda params: jq.quantize(params, CONFIG))({"layer": {"kernel": matrix(rng)}})


@pytest.mark.parametrize("empty", [{}, [], None])
def test_an_empty_tree(empty):
    refused(empty, CONFIG, "the parameter tree has no leaves", "pass the parameters themselves")


def test_a_group_that_does_not_divide_and_padding(rng):
    params = {"layer": {"kernel": matrix(rng, 100, 24)}}
    words = ("layer/kernel: ", "size 16", "length 100", "10, 20, 25, 50", "pad=True", "Rule('layer/kernel', None)")
    refused(params, CONFIG, *words)
    padded = jq.quantize(params, jq.QuantConfig.preset("w4a16", group_size=16, pad=True))
    assert jq.dequantize(padded)["layer"]["kernel"].shape == (100, 24)


@pytest.mark.parametrize("shape", [(0, 24), (64, 0)])
def test_an_axis_of_zero_size(shape):
    config = jq.QuantConfig(rules=(jq.Rule("kernel", CONFIG.default),))
    refused({"kernel": np.ones(shape, np.float32)}, config, "kernel: shape", "zero size", "Rule('kernel', None)")


def test_nothing_is_touched_before_everything_is_checked(rng):
    """The last leaf is wrong, so the first is never computed: an object that cannot be read says so."""

    class Unreadable:
        shape, dtype, ndim = (64, 24), np.dtype("float32"), 2

        def __array__(self, *args, **kwargs):
            raise AssertionError("read")

    refused({"a": Unreadable(), "z": matrix(rng, 100, 24)}, CONFIG, "z: ")
