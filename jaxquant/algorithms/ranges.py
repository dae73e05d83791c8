"""Static activation ranges: one scale for a product's inputs or for each channel, chosen from what calibration saw.

Every method but minmax and the moving average works on the histogram of the inputs, or of a channel's samples. The
candidates of the searches are the full range times 0.01, 0.02, ..., 1.

A scale for each channel cannot be divided out of a sum over channels, so it is multiplied into the weight's rows, and
the inputs meet `pre_scale`, its reciprocal, and then one scale of 1.

Differs from the papers in:
1. KL (Migacz 2017) is TensorRT's search over 2048 bins of |x|; an asymmetric range is cut on both sides by its
   threshold.
2. MSE and cosine (EasyQuant, Wu et al. 2020) compare the inputs with their own rounding, not the product's outputs.
3. ADMM (Leng et al. 2018) is its inner problem only: scale and codes by alternating least squares.

References:
    Migacz 2017, "8-bit Inference with TensorRT", GTC. Wu et al. 2020, "EasyQuant", arXiv:2006.16669. Leng et al. 2018,
    "Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM", arXiv:1707.09870. Krishnamoorthi 2018
    (moving averages), arXiv:1806.08342.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.algorithms._statistics import BINS, Statistics, histogram_of, require
from jaxquant.arrays._numerics import decode, encode, find_scale, range_to_scale
from jaxquant.arrays._spec import PerChannel, PerGroup, PerTensor, TensorSpec

CANDIDATES = 100
CHANNELS = 64  # whose histograms are searched at once
ITERATIONS = 30  # of alternating least squares: it stops moving after a few


def range_needs(spec: TensorSpec) -> frozenset[str]:
    """Names the statistics that a static activation's range is found from.

    Args:
        spec: the activation's spec.

    Returns:
        Names out of `jaxquant.algorithms._statistics.NEEDS`; none for a dynamic activation. Samples stand in for the
        histogram once a `pre_scale` has changed the inputs.

    >>> range_needs(TensorSpec("int8", PerTensor(), static=True))
    frozenset({'range'})
    """
    if not spec.static:
        return frozenset()
    if spec.range in ("absmax", "minmax"):
        return frozenset({"range"})
    if isinstance(spec.granularity, PerChannel):
        return frozenset({"range", "samples"})
    if spec.range == "moving_average":
        return frozenset({"range", "moving_average"})
    return frozenset({"range", "histogram", "samples"})


def activation_scale(stats: Statistics, spec: TensorSpec) -> tuple[jax.Array, jax.Array | None]:
    """Chooses the static scale of a product's inputs.

    Args:
        stats: statistics of the inputs, `pre_scale` included.
        spec: the activation's spec; its `range` names the method.

    Returns:
        (scale scalar, zero point scalar or None).

    Raises:
        ValueError: the spec is not per tensor, or KL is asked for a format that is not an integer.

    >>> from jaxquant.algorithms._statistics import init_statistics, update_statistics
    >>> spec = TensorSpec("int8", PerTensor(), grid="restricted", static=True)
    >>> stats = update_statistics(init_statistics({"range"}, 1), jnp.asarray([[-127.0], [3.0]]))
    >>> activation_scale(stats, spec)[0].item()
    1.0
    """
    if not isinstance(spec.granularity, PerTensor):
        raise ValueError(
            f"a static activation takes PerTensor() or PerChannel(), got {spec.granularity}; leave static=False for"
            " others"
        )
    low, high = jnp.min(require(stats, "low")), jnp.max(require(stats, "high"))
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if spec.range == "moving_average" and stats.average is not None:
        low, high = jnp.minimum(stats.average[0], 0.0), jnp.maximum(stats.average[1], 0.0)
    if spec.range in ("absmax", "minmax", "moving_average"):
        return range_to_scale(low, high, spec)
    return _choose(low, high, *_histogram(stats), spec)


def channel_scales(stats: Statistics, spec: TensorSpec) -> jax.Array:
    """Chooses a static scale for each channel of a product's inputs.

    Args:
        stats: statistics of the inputs.
        spec: the activation's spec, symmetric; its `range` names the method.

    Returns:
        [K] float32; 1 for channels that never fired.

    Raises:
        ValueError: moving averages, which are gathered over all channels.

    >>> from jaxquant.algorithms._statistics import init_statistics, update_statistics
    >>> spec = TensorSpec("int8", PerChannel(), grid="restricted", static=True)
    >>> stats = update_statistics(init_statistics({"range"}, 2), jnp.asarray([[-127.0, 254.0]]))
    >>> channel_scales(stats, spec).tolist()
    [1.0, 2.0]
    """
    if spec.range == "moving_average":
        raise ValueError("range='moving_average' is gathered over all channels, not for each; take PerTensor()")
    low, high = jnp.minimum(require(stats, "low"), 0.0), jnp.maximum(require(stats, "high"), 0.0)
    if spec.range in ("absmax", "minmax"):
        return range_to_scale(low, high, spec)[0].astype(jnp.float32)
    seen = require(stats, "priority") >= 0

    def one(channel: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        low, high, values = channel
        return _choose(low, high, *histogram_of(values, seen), spec)[0].astype(jnp.float32)

    scales = jax.lax.map(one, (low, high, require(stats, "samples").T), batch_size=CHANNELS)
    return jnp.where(high > low, scales, 1.0)


def _choose(
    low: jax.Array, high: jax.Array, counts: jax.Array, exponent: jax.Array, spec: TensorSpec
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point of values with a histogram, by the methods that need one."""
    values = jnp.ldexp((jnp.arange(BINS, dtype=jnp.float32) + 0.5 - BINS // 2) / (BINS // 2), exponent)
    if spec.range == "percentile":
        low, high = _cut(low, high, percentile_threshold(counts, exponent, spec.percentile))
    elif spec.range == "kl":
        if not spec.format.is_integer:
            raise ValueError(
                f"range='kl' counts the levels of an integer, got {spec.qtype!r}; take 'mse' or 'percentile'"
            )
        low, high = _cut(low, high, kl_threshold(counts, exponent, 2 ** (spec.format.bits - 1)))
    elif spec.range in ("mse", "cosine"):
        factor = _search_factor(values, counts, low, high, spec)
        low, high = low * factor, high * factor
    scale, zero_point = range_to_scale(low, high, spec)
    return (_alternate(values, counts, scale, zero_point, spec) if spec.range == "admm" else scale), zero_point


def _histogram(stats: Statistics) -> tuple[jax.Array, jax.Array]:
    """The histogram gathered, or that of the samples where a `pre_scale` has made it void."""
    if stats.histogram is not None and stats.exponent is not None:
        return stats.histogram, stats.exponent
    samples, priority = require(stats, "samples"), require(stats, "priority")
    return histogram_of(samples, jnp.broadcast_to(jnp.expand_dims(priority >= 0, 1), samples.shape))


def _cut(low: jax.Array, high: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(low, -threshold), jnp.minimum(high, threshold)


def _fold(counts: jax.Array) -> jax.Array:
    """Counts of |x| in BINS / 2 bins."""
    return counts[BINS // 2 :] + counts[: BINS // 2][::-1]


def percentile_threshold(counts: jax.Array, exponent: jax.Array, percentile: float) -> jax.Array:
    """The end of the first bin of |x| up to which at least `percentile` percent of the inputs lie.

    Args:
        counts: [BINS] histogram over [-2^e, 2^e).
        exponent: e.
        percentile: in (0, 100].

    Returns:
        float32 scalar.
    """
    total = jnp.cumsum(_fold(counts))
    place = jnp.sum(total < percentile / 100 * total[-1]).astype(jnp.float32)
    return jnp.ldexp((place + 1) / (BINS // 2), exponent)


def kl_threshold(counts: jax.Array, exponent: jax.Array, levels: int) -> jax.Array:
    """The threshold of |x| at which clipping and `levels` levels lose the least information.

    For each threshold of i bins, P is the histogram with all beyond added to its last bin, Q the histogram merged to
    `levels` levels and spread evenly over the bins that were not empty; the least KL(P || Q) wins.

    Args:
        counts: [BINS] histogram over [-2^e, 2^e).
        exponent: e.
        levels: of the magnitude, 128 for int8.

    Returns:
        float32 scalar.
    """
    folded = _fold(counts)
    bins = BINS // 2
    place = jnp.arange(bins)

    def divergence(i):
        inside = jnp.where(place < i, folded, 0.0)
        p = inside + jnp.where(place == i - 1, jnp.sum(folded) - jnp.sum(inside), 0.0)
        level = jnp.minimum(place * levels // i, levels - 1)
        filled = (inside > 0).astype(jnp.float32)
        merged = jnp.zeros(levels).at[level].add(inside)
        members = jnp.zeros(levels).at[level].add(filled)
        q = (merged / jnp.maximum(members, 1.0))[level] * filled
        p, q = p / jnp.maximum(jnp.sum(p), 1.0), q / jnp.maximum(jnp.sum(q), 1.0)
        terms = jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1.0)) - jnp.log(jnp.maximum(q, 1e-9))), 0.0)
        return jnp.sum(terms)

    candidates = jnp.arange(levels, bins + 1)
    best = candidates[jnp.argmin(jax.lax.map(divergence, candidates, batch_size=32))]
    return jnp.ldexp(best.astype(jnp.float32) / bins, exponent)


def _round(values: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: TensorSpec) -> jax.Array:
    grid = scale.reshape(1)
    zero = None if zero_point is None else zero_point.reshape(1)
    return decode(encode(values, grid, zero, spec), grid, zero, spec)


def _search_factor(
    values: jax.Array, counts: jax.Array, low: jax.Array, high: jax.Array, spec: TensorSpec
) -> jax.Array:
    """The part of the range whose rounding is nearest to the inputs, by squared error or by cosine."""

    def loss(factor):
        rounded = _round(values, *range_to_scale(low * factor, high * factor, spec), spec)
        if spec.range == "mse":
            return jnp.sum(counts * jnp.square(rounded - values))
        norms = jnp.sqrt(jnp.sum(counts * jnp.square(values)) * jnp.sum(counts * jnp.square(rounded)))
        return -jnp.sum(counts * values * rounded) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)

    factors = jnp.arange(CANDIDATES, 0, -1, dtype=jnp.float32) / CANDIDATES
    return factors[jnp.argmin(jax.lax.map(loss, factors))]


def _alternate(
    values: jax.Array, counts: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: TensorSpec
) -> jax.Array:
    """Alternates the best codes for a scale and the least-squares scale for the codes."""

    def refit(scale, _):
        wide = scale.astype(jnp.float32)
        levels = _round(values, scale, zero_point, spec) / wide
        power = jnp.sum(counts * levels * levels)
        best = jnp.sum(counts * values * levels) / jnp.where(power > 0, power, 1.0)
        return jnp.where((power > 0) & (best > 0), best, wide).astype(scale.dtype), None

    return jax.lax.scan(refit, scale, None, length=ITERATIONS)[0]


def fake_quantize_activation(x: jax.Array, spec: TensorSpec) -> jax.Array:
    """Rounds an activation as a product would see it, ranges taken from the activation itself.

    Args:
        x: [T, K] float32.
        spec: the activation's spec; a static one is rounded per tensor.

    Returns:
        [T, K] float32.
    """
    if isinstance(spec.granularity, PerTensor):
        grid = (1, 1)
    elif isinstance(spec.granularity, PerGroup):
        grid = (x.shape[0], x.shape[1] // spec.granularity.size)
    else:
        grid = (x.shape[0], 1)
    spec = dataclasses.replace(spec, range="absmax")
    scale, zero_point = find_scale(x, grid, spec)
    return decode(encode(x, scale, zero_point, spec), scale, zero_point, spec)
