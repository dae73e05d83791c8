"""Outlier channels, compensation of input errors, learned rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms._apply import quantize_weight
from jaxquant.algorithms._statistics import init_statistics, update_statistics
from jaxquant.algorithms._transform import WeightState, chain
from jaxquant.algorithms.compensation import compensate
from jaxquant.algorithms.gptq import gptq
from jaxquant.algorithms.learned_rounding import (
    falling_rates,
    initial,
    learned_rounding,
    soft_weight,
    start_from,
    train,
)
from jaxquant.algorithms.llm_int8 import llm_int8, salient
from jaxquant.algorithms.rtn import apply_rtn, rtn
from jaxquant.arrays._outliers import OutlierArray, dequantize_outliers, dequantize_weight, split_activation
from jaxquant.arrays._qarray import codes_of, dequantize_array, quantize_array
from jaxquant.arrays._spec import PRESETS, PerGroup, QuantSpec, TensorSpec

W4 = QuantSpec(TensorSpec("int4", PerGroup(16)))
W8 = PRESETS["w8a8"]


def problem(rng, channels=64, outputs=12, tokens=256):
    x = rng.standard_normal((tokens, channels)) @ (np.eye(channels) + 0.3 * rng.standard_normal((channels, channels)))
    return (0.5 * x).astype(np.float32), (rng.standard_normal((channels, outputs)) * 0.05).astype(np.float32)


@jax.jit
def gather(x):
    return update_statistics(init_statistics({"hessian", "absmax", "mean_abs"}, x.shape[-1]), x)


def test_llm_int8_keeps_channels_above_the_threshold(rng):
    x, w = problem(rng)
    x = np.clip(x, -5, 5)  # the threshold is 6: no other channel may pass it by chance
    x[5, 7], x[9, 50] = 30, -40
    q, report = quantize_weight(jnp.asarray(w), W8, llm_int8(capacity=0.05), gather(x))
    assert isinstance(q, OutlierArray)
    assert q.index.shape == (4, 1)
    above = np.flatnonzero(np.abs(x).max(0) > 6)
    assert set(above) == {7, 50}
    assert set(np.asarray(q.index).ravel()) == {7, 50, 64}
    assert report["outliers"] == 2
    assert report["outliers_left"] == 0
    dense = np.asarray(dequantize_outliers(q))
    np.testing.assert_array_equal(dense[[7, 50]], w[[7, 50]])
    assert not np.any(codes_of(q.base)[jnp.asarray([7, 50])])
    base, outliers = split_activation(jnp.asarray(x), q.index.ravel())
    product = base @ dequantize_array(q.base) + outliers @ q.rows
    np.testing.assert_allclose(product, x @ dense, atol=64 * 1.2e-7 * np.abs(x).max() * np.abs(w).max() * 64)


def test_llm_int8_reports_outliers_that_do_not_fit(rng):
    x, w = problem(rng)
    x = np.clip(x, -5, 5)
    x[0, :10] = 100
    _, report = quantize_weight(jnp.asarray(w), W8, llm_int8(capacity=0.05), gather(x))
    assert (report["outliers"], report["outliers_left"]) == (4, 6)


def test_salient_channels_and_gptq(rng):
    """A channel that is large and goes by itself cannot be made up for: its rounding is nearly all of the error.

    Beside it the rest is some 0.007, so that its 12 errors would all have to be small: one run in 10^12.
    """
    x, w = problem(rng)
    x[:, 20] = 100 * rng.standard_normal(len(x))
    alone = gptq(rounds=0)  # refitted scales would fit that one channel
    q, report = quantize_weight(jnp.asarray(w), W4, chain(salient(fraction=0.01), alone), gather(x))
    assert q.index.item() == 20
    assert report["dead"] == 1
    bare, _ = quantize_weight(jnp.asarray(w), W4, alone, gather(x))
    kept, stretched = (np.sum((x @ (np.asarray(dense) - w)) ** 2) for dense in map(dequantize_weight, (q, bare)))
    assert kept < stretched


def test_outliers_of_a_stack_with_heads(rng):
    x, w = problem(rng)
    x[:, 33] *= 50
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), gather(x))
    stack = jnp.asarray(np.stack([w, 2 * w])).reshape(2, 4, 16, 12)
    q, _ = quantize_weight(stack, W4, salient(), stats, axis=(-3, -2), batch_dims=1)
    assert q.rows.shape == (2, 1, 1, 12)
    assert q.index.shape == (2, 1, 1, 1)
    np.testing.assert_array_equal(dequantize_outliers(q).reshape(2, 64, 12)[:, 33], np.stack([w[33], 2 * w[33]]))
    assert q.nbytes == q.base.nbytes + 2 * 12 * 4 + 2 * 4
    assert q.shape == (2, 4, 16, 12)


def test_one_outlier_container_a_chain(rng):
    x, w = problem(rng)
    with pytest.raises(ValueError, match="only one of"):
        quantize_weight(jnp.asarray(w), W8, chain(salient(), llm_int8()), gather(x))


def cross_statistics(x, x_float, residual=None):
    needs = {"hessian", "cross"} | (set() if residual is None else {"residual"})
    empty = init_statistics(needs, x.shape[1], 0 if residual is None else residual.shape[1])
    extra = {} if residual is None else {"residual": jnp.asarray(residual)}
    return update_statistics(empty, jnp.asarray(x), x_float=jnp.asarray(x_float), **extra)


def test_full_compensation_is_least_squares(rng):
    """At strength 1 the weight is the ridge regression of the float outputs on the quantized inputs."""
    x_float, w = problem(rng)
    x = (x_float + 0.3 * rng.standard_normal(x_float.shape)).astype(np.float32)
    residual = rng.standard_normal((256, 12)).astype(np.float32) * 0.1
    stats = cross_statistics(x, x_float, residual)
    state = compensate(strength=1.0, residual=1.0, damping=1e-3).apply(WeightState(jnp.asarray(w), stats), W4)
    wide = x.astype(np.float64)
    hessian = wide.T @ wide
    target = x_float.astype(np.float64) @ w - wide @ w + residual
    expected = w + np.linalg.solve(hessian + 1e-3 * np.mean(np.diag(hessian)) * np.eye(64), wide.T @ target)
    # H is conditioned to about 1e3 by its damping: float32 solves lose three of seven digits
    np.testing.assert_allclose(state.weight, expected, atol=1e-3 * np.abs(expected).max())


def test_compensation_lowers_the_error_against_float_outputs(rng):
    """Full strength lowers it by 0.15 more than the default, and that by 0.28: each eleven deviations or more."""
    x_float, w = problem(rng)
    x = (x_float + 0.3 * rng.standard_normal(x_float.shape)).astype(np.float32)
    stats = cross_statistics(x, x_float)

    def error(transform):
        q, _ = quantize_weight(jnp.asarray(w), W4, transform, stats)
        return np.sum((x @ np.asarray(dequantize_array(q)) - x_float @ w) ** 2)

    assert error(chain(compensate(strength=1.0), gptq())) < error(chain(compensate(), gptq())) < error(gptq())


def test_equal_inputs_need_no_compensation(rng):
    x, w = problem(rng)
    state = compensate().apply(WeightState(jnp.asarray(w), cross_statistics(x, x)), W4)
    np.testing.assert_array_equal(state.weight, w)


FEW = 16  # tokens for 64 channels: in the other directions rounding errors cost nothing, so that there is much to gain


@pytest.mark.parametrize(("qtype", "optimizer"), [("int3", "sign"), ("uint4", "adam")])
def test_learned_rounding_lowers_the_error(rng, qtype, optimizer):
    """Of the error 0.6 goes, 0.07 more or less: 0.1 of it is seven deviations away."""
    x, w = problem(rng, tokens=FEW)
    spec = QuantSpec(TensorSpec(qtype, PerGroup(16), range="mse", scale_dtype="bfloat16"))
    transform = learned_rounding(output="layer", steps=100, optimizer=optimizer)
    q, report = quantize_weight(jnp.asarray(w), spec, transform, gather(x))
    assert report["error"] < 0.9 * report["error_rtn"]
    assert q.scale.dtype == jnp.bfloat16


def test_learned_rounding_never_loses_to_its_start(rng):
    x, w = problem(rng)
    start = quantize_weight(jnp.asarray(w), W4, gptq(), gather(x))[1]["error"]
    learned = chain(gptq(), learned_rounding(output="layer", steps=20))
    trained = quantize_weight(jnp.asarray(w), W4, learned, gather(x))[1]["error"]
    assert trained <= start * (1 + 1e-5)


def start_of(state, spec):
    return start_from(state.weight, state.codes, state.scale, state.zero_point, spec.weight.format)


@pytest.mark.parametrize("qtype", ["int4", "uint3"])
def test_untrained_rounding_is_the_start(rng, qtype):
    _, w = problem(rng)
    spec = QuantSpec(TensorSpec(qtype, PerGroup(16)))
    state = apply_rtn(WeightState(jnp.asarray(w), init_statistics((), 64)), spec)
    start = start_of(state, spec)
    np.testing.assert_allclose(
        soft_weight(initial(start), start), dequantize_array(quantize_array(jnp.asarray(w), spec)), rtol=1e-6
    )


def test_rounding_trains_on_any_objective(rng):
    """A nonlinear function of the layer's output, as a block's, goes down: by 0.65, and 0.03 more or less."""
    x, w = problem(rng, tokens=FEW)
    state = apply_rtn(WeightState(jnp.asarray(w), gather(x)), W4)
    start = start_of(state, W4)
    target = jnp.tanh(jnp.asarray(x @ w))

    def loss(rounding):
        return jnp.mean(jnp.square(jnp.tanh(jnp.asarray(x) @ soft_weight(rounding, start)) - target))

    trained = jax.jit(lambda r: train(loss, r, "sign", falling_rates(0.01, 60)))(initial(start))
    assert loss(trained) < 0.9 * loss(initial(start))


def test_refusals(rng):
    x, w = problem(rng)
    with pytest.raises(ValueError, match="integer codes, got 'nf4'"):
        quantize_weight(jnp.asarray(w), QuantSpec(TensorSpec("nf4", PerGroup(16))), learned_rounding(), gather(x))
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 2"):
        compensate(strength=2)
    with pytest.raises(ValueError, match="capacity must lie"):
        llm_int8(capacity=0)
    with pytest.raises(ValueError, match="accepted: 'sign', 'adam'"):
        learned_rounding(optimizer="sgd")
    with pytest.raises(ValueError, match="accepted: 'block', 'layer'"):
        learned_rounding(output="model")
    with pytest.raises(ValueError, match=r"learned_rounding: strength must lie in \[0, 1\], got 2"):
        learned_rounding(strength=2)
    with pytest.raises(ValueError, match="cuts=0; all must be positive"):
        learned_rounding(cuts=0)
    with pytest.raises(ValueError, match="learned_rounding trains on the outputs of a block"):
        chain(learned_rounding(), gptq())


def test_rtn_is_quantize_array(rng):
    _, w = problem(rng)
    spec = dataclasses.replace(W4, weight=dataclasses.replace(W4.weight, range="mse"))
    q, _ = quantize_weight(jnp.asarray(w), spec, rtn())
    nearest = quantize_array(jnp.asarray(w), spec)
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    for ours, theirs in zip(jax.tree.leaves(q), jax.tree.leaves(nearest), strict=True):
        np.testing.assert_array_equal(ours, theirs)
