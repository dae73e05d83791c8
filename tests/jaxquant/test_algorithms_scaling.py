"""AWQ and SmoothQuant against float64 oracles, and the laws of chains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms._apply import needed_statistics, quantize_weight
from jaxquant.algorithms._statistics import init_statistics, update_statistics
from jaxquant.algorithms._transform import WeightState, chain
from jaxquant.algorithms.awq import awq
from jaxquant.algorithms.gptq import gptq
from jaxquant.algorithms.ranges import fake_quantize_activation
from jaxquant.algorithms.smoothquant import smoothquant
from jaxquant.arrays._qarray import codes_of, dequantize_array, quantize_array
from jaxquant.arrays._spec import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, TensorSpec

# the restricted grid puts no element on a tie, so that float32 and float64 round alike but for rare near-ties
W4 = QuantSpec(TensorSpec("int4", PerGroup(16), grid="restricted"))
W8A8 = QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerToken()))


def problem(rng, channels=64, outputs=24, tokens=256):
    """Inputs of which a few channels are outliers, as behind a language model's norms."""
    x = rng.standard_normal((tokens, channels)) @ (np.eye(channels) + 0.3 * rng.standard_normal((channels, channels)))
    x[:, rng.choice(channels, 4, replace=False)] *= 20
    return x.astype(np.float32), (rng.standard_t(6, (channels, outputs)) * 0.03).astype(np.float32)


@jax.jit
def gather(x):
    return update_statistics(init_statistics({"hessian", "mean_abs", "absmax", "samples"}, x.shape[-1]), x)


def round_oracle(w, size=16):
    """Symmetric 4-bit groups, in float64."""
    blocks = w.reshape(-1, size, w.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True) / 7
    return (np.clip(np.round(blocks / scale), -8, 7) * scale).reshape(w.shape)


def awq_oracle(x, w):
    """Equation 4 of the paper with llm-awq's grid and AutoAWQ's duo scaling: each candidate's factors and loss."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    blocks = np.abs(w).reshape(-1, 16, w.shape[1])
    activity = np.abs(x).mean(0)
    magnitude = (blocks / (blocks.max(1, keepdims=True) + 1e-6)).reshape(w.shape).mean(1)
    factors = [np.ones(len(w))]
    for ratio in np.arange(20) / 20:
        s = np.maximum(activity**ratio / (magnitude ** (1 - ratio) + 1e-4), 1e-4)
        factors.append(s / np.sqrt(s.max() * s.min()))
    losses = [np.sum((x @ (round_oracle(w * s[:, None]) / s[:, None] - w)) ** 2) for s in factors]
    return np.array(factors), np.array(losses)


def assert_oracles_factor(pre_scale, error, x, w):
    """The factor is one of the oracle's candidates, and none has a lower loss."""
    factors, losses = awq_oracle(x, w)
    distance = np.abs(1 / np.asarray(pre_scale).ravel() / factors - 1).max(1)
    chosen = np.argmin(distance)
    assert distance[chosen] < 1e-4  # float32 powers and means are good to 1e-5; candidates are 1e-2 apart
    # a near-tie may round the other way in float32: one of 1536 codes moves a loss by less than 1 %
    assert losses[chosen] <= 1.01 * losses.min()
    power = np.sum((x.astype(np.float64) @ w) ** 2)
    assert error == pytest.approx(losses[chosen] / power, rel=0.01)


def test_awq_finds_the_oracles_factor(rng):
    x, w = problem(rng)
    q, report = quantize_weight(jnp.asarray(w), W4, awq(clip=False), gather(x))
    assert_oracles_factor(q.pre_scale, report["error"], x, w)


def test_awq_and_clipping_never_lose(rng):
    """Each takes the best of what it tries, nothing among it; one group a column, so that no error crosses groups."""
    x, w = problem(rng)
    stats, w, spec = gather(x), jnp.asarray(w), QuantSpec(TensorSpec("int4", grid="restricted"))
    scaled = quantize_weight(w, spec, awq(clip=False), stats)[1]
    clipped = quantize_weight(w, spec, awq(), stats)[1]
    assert clipped["error"] < scaled["error"] < scaled["error_rtn"]


def test_awq_takes_a_downstream_objective(rng):
    x, w = problem(rng)

    def first_output_only(rounded, state):
        deviation = (rounded - state.weight)[:, :1]
        return jnp.sum(deviation * (state.stats.hessian @ deviation))

    stats, weight = gather(x), jnp.asarray(w)
    q, _ = quantize_weight(weight, W4, awq(clip=False, objective=first_output_only), stats)
    default, _ = quantize_weight(weight, W4, awq(clip=False), stats)
    errors = [np.sum((x @ (np.asarray(dequantize_array(a)) - w))[:, 0] ** 2) for a in (q, default)]
    assert errors[0] <= errors[1] * (1 + 1e-3)  # float32 losses order candidates this well


def test_awq_state_keeps_the_product(rng):
    x, w = problem(rng)
    state = awq(clip=False).apply(WeightState(jnp.asarray(w), gather(x)), W4)
    assert state.codes is None
    again = (x * np.asarray(state.pre_scale)) @ np.asarray(state.weight)
    np.testing.assert_allclose(again, x @ w, atol=1e-5 * np.abs(x).max() * np.abs(w).max() * 64)


def test_smoothquant_factor_is_the_papers(rng):
    x, w = problem(rng)
    q, _ = quantize_weight(jnp.asarray(w), W8A8, smoothquant(alpha=0.6), gather(x))
    factor = np.abs(x).max(0) ** 0.6 / np.abs(w).max(1) ** 0.4
    factor = factor / np.exp(np.mean(np.log(factor)))
    np.testing.assert_allclose(1 / q.pre_scale.ravel(), factor, rtol=1e-5)


def test_smoothquant_of_alpha_zero_changes_nothing(rng):
    x, w = problem(rng)
    q, _ = quantize_weight(jnp.asarray(w), W8A8, smoothquant(alpha=0.0), gather(x))
    assert np.all(q.pre_scale == 1)
    np.testing.assert_array_equal(codes_of(q), codes_of(quantize_array(jnp.asarray(w), W8A8)))


@pytest.mark.parametrize("activation", [PerToken(), PerTensor()])
def test_smoothquant_search_lowers_the_error_of_the_integer_product(rng, activation):
    x, w = problem(rng)
    spec = QuantSpec(TensorSpec("int8", PerChannel()), TensorSpec("int8", activation))

    def error(transform):
        q, report = quantize_weight(jnp.asarray(w), spec, transform, gather(x))
        inputs = fake_quantize_activation(jnp.asarray(x) * q.pre_scale.T, spec.activation)
        bare = dataclasses.replace(q, pre_scale=None)
        return np.sum((np.asarray(inputs) @ np.asarray(dequantize_array(bare)) - x @ w) ** 2), float(report["alpha"])

    searched, alpha = error(smoothquant())
    unchanged, _ = error(smoothquant(alpha=0.0))
    assert 0 < alpha < 1
    # exp(-1.45 +- 0.18) of it by token, exp(-2.2 +- 0.22) for the tensor: exp(-0.22) is seven deviations away
    assert searched < 0.8 * unchanged


def test_chain_threads_statistics_in_closed_form(rng):
    """Smoothing and then GPTQ equals GPTQ on recalibrated smoothed inputs."""
    x, w = problem(rng)
    q, _ = quantize_weight(jnp.asarray(w), W4, chain(smoothquant(alpha=0.5), gptq(rounds=0)), gather(x))
    factor = np.asarray(q.pre_scale).ravel()
    again, _ = quantize_weight(jnp.asarray(w / factor[:, None]), W4, gptq(rounds=0), gather(x * factor))
    # The two Hessians differ in the last bits, so that a near-tie may flip, which changes its column: one in a hundred.
    same = np.all(np.asarray(codes_of(q)) == np.asarray(codes_of(again)), axis=0)
    assert same.mean() >= 0.5


def test_chain_of_awq_and_gptq_beats_awq(rng):
    """Its error is exp(-1.6 +- 0.2) of AWQ's: eight deviations."""
    x, w = problem(rng)
    errors = [
        float(quantize_weight(jnp.asarray(w), W4, t, gather(x))[1]["error"])
        for t in (awq(clip=False), chain(awq(clip=False), gptq()))
    ]
    assert errors[1] < errors[0]


def test_chain_laws():
    assert chain(awq(), chain(gptq())).needs == awq().needs | gptq().needs
    assert chain(awq(), gptq()) == chain(awq(), gptq())
    assert needed_statistics(None, W4) == frozenset()


def test_awq_of_a_stack_finds_each_ones_factor(rng):
    problems = [problem(rng) for i in range(2)]
    stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[gather(x) for x, _ in problems])
    weights = jnp.stack([w for _, w in problems])
    stack, reports = quantize_weight(weights, W4, awq(clip=False), stats, batch_dims=1)
    for pre_scale, error, (x, w) in zip(stack.pre_scale, reports["error"], problems, strict=True):
        assert_oracles_factor(pre_scale, error, x, w)


def test_alpha_is_checked():
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.5"):
        smoothquant(alpha=1.5)
