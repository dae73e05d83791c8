"""Static activation ranges, each against its definition in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms._apply import needed_statistics, quantize_weight
from jaxquant.algorithms._statistics import BINS, init_statistics, update_statistics
from jaxquant.algorithms.ranges import activation_scale, channel_scales, fake_quantize_activation, kl_threshold
from jaxquant.algorithms.smoothquant import smoothquant
from jaxquant.arrays._spec import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, TensorSpec

EPS = float(jnp.finfo(jnp.float32).eps)
NEEDS = {"range", "moving_average", "histogram", "samples"}
update = jax.jit(update_statistics)
choose = jax.jit(activation_scale, static_argnames="spec")


def heavy_tailed(rng, tokens=400, channels=8):
    return rng.standard_t(4, (tokens, channels)).astype(np.float32)


def gather(x):
    return update(init_statistics(NEEDS, x.shape[1]), jnp.asarray(x))


def spec_of(method, qtype="int8", **kwargs):
    return TensorSpec(qtype, PerTensor(), range=method, grid="restricted", static=True, **kwargs)


def centres_and_counts(x):
    """The histogram that every method but minmax works on."""
    exponent = np.frexp(np.abs(x).max())[1]
    edges = np.linspace(-1, 1, BINS + 1) * 2.0**exponent
    return (edges[1:] + edges[:-1]) / 2, np.histogram(x, edges)[0], 2.0**exponent


def round_to(values, scale):
    return np.clip(np.round(values / scale), -128, 127) * scale


def test_minmax(rng):
    x = heavy_tailed(rng)
    scale, zero_point = choose(gather(x), spec_of("minmax"))
    assert zero_point is None
    assert scale == pytest.approx(np.abs(x).max() / 127, rel=2 * EPS)
    scale, zero_point = choose(gather(np.abs(x) + 1), TensorSpec("uint8", PerTensor(), static=True))
    assert zero_point == 0  # the range includes zero
    assert scale == pytest.approx((np.abs(x).max() + 1) / 255, rel=2 * EPS)


def test_moving_average_ignores_one_wild_batch(rng):
    quiet, wild = heavy_tailed(rng), heavy_tailed(rng) * 100
    stats = update(gather(quiet), jnp.asarray(wild))
    expected = max(abs(0.9 * f(quiet) + 0.1 * f(wild)) for f in (np.min, np.max)) / 127
    assert choose(stats, spec_of("moving_average"))[0] == pytest.approx(expected, rel=8 * EPS)


def test_percentile(rng):
    x = heavy_tailed(rng)
    scale, _ = choose(gather(x), spec_of("percentile", percentile=99.0))
    _, _, top = centres_and_counts(x)
    threshold = np.quantile(np.abs(x), 0.99, method="inverted_cdf")
    rounding = 2 * EPS * threshold
    # the end of the bin that holds the quantile
    assert -rounding <= float(scale) * 127 - threshold <= top / (BINS // 2) + rounding


def test_kl_equals_tensorrts_search(rng):
    x = heavy_tailed(rng)
    _, counts, top = centres_and_counts(x)
    folded = counts[BINS // 2 :] + counts[: BINS // 2][::-1]
    losses, magnitudes = {}, {}
    for i in range(128, BINS // 2 + 1):
        p = folded[:i].astype(float)
        p[-1] += folded[i:].sum()
        level = np.arange(i) * 128 // i
        counted, used = np.bincount(level, folded[:i]), np.bincount(level, folded[:i] > 0)
        q = np.where(folded[:i] > 0, (counted / np.maximum(used, 1))[level], 0.0)
        p, q = p / p.sum(), q / max(q.sum(), 1)
        seen = p > 0
        terms = p[seen] * (np.log(p[seen]) - np.log(np.maximum(q[seen], 1e-9)))
        losses[i], magnitudes[i] = np.sum(terms), np.sum(np.abs(terms))
    found = kl_threshold(jnp.asarray(counts, jnp.float32), jnp.asarray(int(np.log2(top)), jnp.int32), 128)
    place = round(float(found) / top * (BINS // 2))
    # Sums of up to 2048 float32 terms, of the one found and of the least, and their logarithms' own rounding.
    best = min(losses, key=losses.get)
    slack = sum(BINS // 2 * EPS / 2 * magnitudes[i] + 4 * EPS for i in (place, best))
    assert losses[place] <= losses[best] + slack
    assert choose(gather(x), spec_of("kl"))[0] * 127 == pytest.approx(min(float(found), np.abs(x).max()), rel=4 * EPS)


@pytest.mark.parametrize("method", ["mse", "cosine"])
def test_searched_factor_is_the_best_of_a_hundred(rng, method):
    x = heavy_tailed(rng)
    values, counts, _ = centres_and_counts(x)

    def loss(scale):
        rounded = np.clip(np.round(values / scale), -8, 7) * scale
        if method == "mse":
            return np.sum(counts * (rounded - values) ** 2) / np.sum(counts * values**2)
        norms = np.sqrt(np.sum(counts * values**2) * np.sum(counts * rounded**2))
        return 1 - np.sum(counts * values * rounded) / norms

    best = min(loss(np.abs(x).max() * f / 100 / 7) for f in range(1, 101))
    found = loss(float(choose(gather(x), spec_of(method, "int4"))[0]))
    assert found <= best + 1e-5  # float32 sums of 4096 bins
    assert found < loss(np.abs(x).max() / 7)  # with 15 levels the tails are cut


def test_admm_alternates_to_a_least_squares_scale(rng):
    x = heavy_tailed(rng)
    values, counts, _ = centres_and_counts(x)
    scale = np.abs(x).max() / 127
    for _ in range(30):
        levels = np.clip(np.round(values / scale), -128, 127)
        scale = np.sum(counts * values * levels) / np.sum(counts * levels**2)
    found = float(choose(gather(x), spec_of("admm"))[0])
    errors = [np.sum(counts * (round_to(values, s) - values) ** 2) for s in (found, scale, np.abs(x).max() / 127)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)  # float32 may stop at a neighbouring fixed point
    assert errors[0] <= errors[2] * (1 + 4 * EPS)  # no step raises it; a first scale that is fixed stays


def test_samples_stand_in_after_a_pre_scale(rng):
    x = heavy_tailed(rng, tokens=200)
    x[:, 3] *= 50
    spec = QuantSpec(TensorSpec("int8"), spec_of("mse"))
    transform = smoothquant(alpha=0.5)
    assert needed_statistics(transform, spec) == {"absmax", "range", "histogram", "samples"}
    stats = update(init_statistics(needed_statistics(transform, spec), 8), jnp.asarray(x))
    w = rng.standard_normal((8, 5)).astype(np.float32)
    q, _ = quantize_weight(jnp.asarray(w), spec, transform, stats)
    smoothed = np.abs(x * np.asarray(q.pre_scale).T).max()
    assert q.act_scale.shape == (1, 1)
    assert 0.2 * smoothed <= q.act_scale.item() * 127 <= smoothed * (1 + 4 * EPS)


@pytest.mark.parametrize("method", ["absmax", "percentile", "kl", "mse", "cosine", "admm"])
def test_each_channels_scale_is_that_of_the_channel_alone(rng, method):
    x = heavy_tailed(rng, tokens=200, channels=3) * np.asarray([[1, 30, 0]], np.float32)
    spec = spec_of(method, percentile=99.0)
    scales = jax.jit(channel_scales, static_argnames="spec")(
        gather(x), dataclasses.replace(spec, granularity=PerChannel())
    )
    for channel in range(2):
        alone, _ = choose(gather(x[:, channel : channel + 1]), spec)
        assert scales[channel] == pytest.approx(float(alone), rel=16 * EPS)  # fewer rows than are sampled: all of them
    assert scales[2] == 1


def test_scales_by_channel_run_as_one_integer_product(rng):
    """Inputs are rounded by their channel's scale, which the weight's rows carry; by rule beside a dynamic weight."""
    x = heavy_tailed(rng, tokens=64, channels=32) * np.exp(2 * rng.standard_normal((1, 32))).astype(np.float32)
    params = {
        "a": rng.standard_normal((32, 24)).astype(np.float32),
        "b": rng.standard_normal((24, 8)).astype(np.float32),
    }
    weight = TensorSpec("int8", grid="restricted")
    static = QuantSpec(weight, TensorSpec("int8", PerChannel(), grid="restricted", static=True))
    dynamic = QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerToken()))
    config = jq.QuantConfig(static, rules=(jq.Rule("b", dynamic),), skip=())
    model = lambda p, x: (x @ p["a"], jnp.tanh(x @ p["a"]) @ p["b"])  # noqa: E731
    q = jq.quantize(params, config, apply_fn=model, batches=[jnp.asarray(x)])
    assert (q["a"].activation.granularity, q["a"].act_scale.item()) == (PerTensor(), 1)
    assert q["b"].act_scale is None
    step = np.abs(x).max(0) / 127
    np.testing.assert_allclose(q["a"].pre_scale.ravel(), 1 / step, rtol=4 * EPS)
    rows = params["a"] * step[:, None]
    scale = np.abs(rows).max(0) / 127
    codes = np.clip(np.round(rows / scale), -128, 127)
    expected = np.round(x.astype(np.float64) / step) @ codes * scale
    got, _ = jax.jit(jq.quantized(model))(q, jnp.asarray(x))
    # The integer product is exact; where a quotient lies half way, one code of each factor may differ, by a step.
    np.testing.assert_allclose(got, expected, atol=128 * scale.max(), rtol=1e-5)
    assert np.mean(np.isclose(got, expected, atol=1e-5 * np.abs(expected).max())) > 0.9


def test_static_scales_of_a_stack(rng):
    x = np.stack([heavy_tailed(rng), 3 * heavy_tailed(rng)])
    needs = {"range"}
    stats = jax.tree.map(lambda *a: jnp.stack(a), *[update(init_statistics(needs, 8), jnp.asarray(part)) for part in x])
    spec = QuantSpec(TensorSpec("int8"), spec_of("absmax"))
    q, _ = quantize_weight(jnp.ones((2, 8, 4)), spec, None, stats, batch_dims=1)
    np.testing.assert_allclose(q.act_scale.ravel(), np.abs(x).max((1, 2)) / 127, rtol=2 * EPS)


def test_fake_quantized_activation_bounds(rng):
    x = heavy_tailed(rng)
    for granularity, absmax in (
        (PerToken(), np.abs(x).max(1, keepdims=True)),
        (PerTensor(), np.abs(x).max()),
        (PerGroup(4), np.repeat(np.abs(x).reshape(-1, 2, 4).max(2), 4, axis=1)),
    ):
        rounded = fake_quantize_activation(jnp.asarray(x), TensorSpec("int8", granularity))
        assert np.all(np.abs(rounded - x) <= absmax / 255 * (1 + 1e-4))  # half a step of 2 absmax / 255


def test_refusals(rng):
    stats = gather(heavy_tailed(rng))
    with pytest.raises(ValueError, match=r"takes PerTensor\(\) or PerChannel\(\), got PerToken"):
        activation_scale(stats, TensorSpec("int8", PerToken(), static=True))
    with pytest.raises(ValueError, match="over all channels, not for each"):
        channel_scales(stats, TensorSpec("int8", PerChannel(), range="moving_average", static=True))
    with pytest.raises(ValueError, match="takes static=True and a symmetric format"):
        QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerChannel()))
    with pytest.raises(ValueError, match="levels of an integer"):
        activation_scale(stats, TensorSpec("float8_e4m3fn", PerTensor(), range="kl", static=True))
