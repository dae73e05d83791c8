"""What calibration remembers of the inputs of one product: pure accumulation, merging and closed-form rescaling.

Every function is for one matrix; experts and scan stacks `vmap` it. Fields that nobody needs stay None, at no cost.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp

BINS = 4096  # a power-of-two range wastes at most half of them
SAMPLES = 256  # rows kept of each product's inputs
MOMENTUM = 0.9  # of the moving average of ranges, per batch (Krishnamoorthi 2018, arXiv:1806.08342)

# What an algorithm may ask for.
NEEDS = (
    "absmax", "mean_abs", "range", "moving_average", "histogram", "samples", "hessian", "cross", "residual", "block"
)  # fmt: skip
FLOAT_NEEDS = frozenset({"cross", "residual", "block"})  # of these, what compares with the float model


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the inputs x [T, K] that meet one weight.

    Attributes:
        count: float32 scalar: tokens seen, each by its weight.
        absmax: [K] greatest |x| of each channel.
        sum_abs: [K] sum of |x|.
        low: [K] least x.
        high: [K] greatest x.
        average: [2] moving averages of each batch's least and greatest x.
        histogram: [BINS] counts of x over [-2^e, 2^e).
        exponent: int32 scalar e.
        samples: [SAMPLES, K] rows drawn uniformly.
        priority: [SAMPLES] the random numbers that drew them; -1 where there is no row yet.
        hessian: [K, K] sum of x^T x.
        cross: [K, K] sum of x^T x_float: x beside what the float model would have had there.
        residual: [K, N] sum of x^T r: x beside what the output should make up for.
    """

    count: jax.Array
    absmax: jax.Array | None = None
    sum_abs: jax.Array | None = None
    low: jax.Array | None = None
    high: jax.Array | None = None
    average: jax.Array | None = None
    histogram: jax.Array | None = None
    exponent: jax.Array | None = None
    samples: jax.Array | None = None
    priority: jax.Array | None = None
    hessian: jax.Array | None = None
    cross: jax.Array | None = None
    residual: jax.Array | None = None

    @property
    def mean_abs(self) -> jax.Array:
        """[K] mean of |x|."""
        return require(self, "sum_abs") / jnp.maximum(self.count, 1.0)


jax.tree_util.register_dataclass(
    Statistics, data_fields=[field.name for field in dataclasses.fields(Statistics)], meta_fields=[]
)


def require(stats: Statistics, field: str) -> jax.Array:
    """Reads a field that must have been gathered.

    Raises:
        ValueError: it was not.
    """
    value = getattr(stats, field)
    if value is None:
        raise ValueError(
            f"statistics: {field!r} was not gathered; name what needs it in the transform's `needs`, one of"
            f" {', '.join(NEEDS)}"
        )
    return value


def init_statistics(needs: Collection[str], channels: int, outputs: int = 0) -> Statistics:
    """Makes the statistics of zero tokens.

    Args:
        needs: names out of `NEEDS`.
        channels: K.
        outputs: N, for `"residual"` only.

    Returns:
        Statistics whose asked-for fields are arrays.

    Raises:
        ValueError: an unknown name.

    >>> init_statistics({"hessian"}, 8).hessian.shape
    (8, 8)
    """
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ValueError(f"init_statistics: unknown needs {', '.join(unknown)}; accepted: {', '.join(NEEDS)}")
    fields: dict[str, jax.Array] = {}
    zeros, square = jnp.zeros(channels), (channels, channels)
    if "absmax" in needs:
        fields["absmax"] = zeros
    if "mean_abs" in needs:
        fields["sum_abs"] = zeros
    if "range" in needs:
        fields |= {"low": jnp.full(channels, jnp.inf), "high": jnp.full(channels, -jnp.inf)}
    if "moving_average" in needs:
        fields["average"] = jnp.zeros(2)
    if "histogram" in needs:
        fields |= {"histogram": jnp.zeros(BINS), "exponent": jnp.asarray(-126, jnp.int32)}
    if "samples" in needs:
        fields |= {"samples": jnp.zeros((SAMPLES, channels)), "priority": jnp.full(SAMPLES, -1.0)}
    if "hessian" in needs:
        fields["hessian"] = jnp.zeros(square)
    if "cross" in needs:
        fields["cross"] = jnp.zeros(square)
    if "residual" in needs:
        fields["residual"] = jnp.zeros((channels, outputs))
    return Statistics(jnp.zeros(()), **fields)


def update_statistics(
    stats: Statistics,
    x: jax.Array,
    *,
    weights: jax.Array | None = None,
    x_float: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> Statistics:
    """Adds the inputs of one batch.

    Args:
        stats: what was gathered so far.
        x: [T, K], any floating dtype; products of bfloat16 inputs are accumulated in float32.
        weights: [T] importance of each token, zero for those that never reached this weight (an expert's padding); None
            counts each once.
        x_float: [T, K] the float model's inputs here, where `"cross"` is gathered.
        residual: [T, N] what the product's output should make up for, where `"residual"` is gathered.

    Returns:
        The new statistics.

    >>> stats = init_statistics({"absmax"}, 2)
    >>> update_statistics(stats, jnp.asarray([[1.0, -3.0]])).absmax.tolist()
    [1.0, 3.0]
    """
    here = jnp.ones(x.shape[0]) if weights is None else weights.astype(jnp.float32)
    seen = jax.lax.expand_dims(here > 0, [1])
    wide = x.astype(jnp.float32)
    magnitude = jnp.abs(wide)
    new: dict[str, jax.Array] = {"count": stats.count + jnp.sum(here)}
    if stats.absmax is not None:
        new["absmax"] = jnp.maximum(stats.absmax, jnp.max(jnp.where(seen, magnitude, 0.0), 0))
    if stats.sum_abs is not None:
        new["sum_abs"] = stats.sum_abs + jnp.sum(jax.lax.expand_dims(here, [1]) * magnitude, 0)
    low, high = jnp.where(seen, wide, jnp.inf), jnp.where(seen, wide, -jnp.inf)
    if stats.low is not None and stats.high is not None:
        new |= {"low": jnp.minimum(stats.low, jnp.min(low, 0)), "high": jnp.maximum(stats.high, jnp.max(high, 0))}
    if stats.average is not None:
        ends = jnp.stack([jnp.min(low), jnp.max(high)])
        moved = jnp.where(stats.count > 0, MOMENTUM * stats.average + (1 - MOMENTUM) * ends, ends)
        new["average"] = jnp.where(jnp.any(seen), moved, stats.average)
    if stats.histogram is not None and stats.exponent is not None:
        counted = histogram_of(jnp.where(seen, wide, 0.0), jnp.broadcast_to(seen, wide.shape))
        new |= _add_histograms((stats.histogram, stats.exponent), counted)
    if stats.samples is not None and stats.priority is not None:
        key = jax.random.fold_in(jax.random.key(0), stats.count.astype(jnp.int32))
        drawn = jnp.where(here > 0, jax.random.uniform(key, here.shape), -1.0)
        new |= _keep_samples((stats.samples, stats.priority), (wide, drawn))
    if stats.hessian is not None:
        new["hessian"] = stats.hessian + _product(x, weights, x)
    if stats.cross is not None:
        new["cross"] = stats.cross + _product(x, weights, _given(x_float, "x_float", "cross"))
    if stats.residual is not None:
        new["residual"] = stats.residual + _product(x, weights, _given(residual, "residual", "residual"))
    return dataclasses.replace(stats, **new)


def _given(x: jax.Array | None, name: str, need: str) -> jax.Array:
    if x is None:
        raise ValueError(f"update_statistics: {need!r} is gathered, so {name} must be passed")
    return x


def _product(x: jax.Array, weights: jax.Array | None, y: jax.Array) -> jax.Array:
    """x^T diag(weights) y in float32; only float32 inputs pay for exact products."""
    y = y.astype(x.dtype)
    if weights is not None:
        y = y * jax.lax.expand_dims(weights.astype(x.dtype), [1])
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jnp.einsum("tk,tn->kn", x, y, precision=precision, preferred_element_type=jnp.float32)


def histogram_of(x: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts values over the smallest power-of-two range that holds them all.

    Args:
        x: float32 values of any shape.
        seen: bool of the same shape: which of them count.

    Returns:
        ([BINS] float32 counts over [-2^e, 2^e), int32 scalar e).

    >>> histogram_of(jnp.asarray([0.0, 3.0]), jnp.asarray([True, True]))[1].item()
    2
    """
    exponent = jnp.maximum(jnp.frexp(jnp.max(jnp.abs(x)))[1].astype(jnp.int32), -126)
    place = jnp.floor(jnp.ldexp(x, -exponent) * (BINS // 2)).astype(jnp.int32) + BINS // 2
    counts = jnp.zeros(BINS, jnp.int32).at[jnp.clip(place, 0, BINS - 1)].add(seen.astype(jnp.int32))
    return counts.astype(jnp.float32), exponent


def _add_histograms(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    """Sums two histograms exactly: a range that doubles k times merges 2^k neighbouring bins."""
    exponent = jnp.maximum(a[1], b[1])
    centred = jnp.arange(BINS, dtype=jnp.int32) - BINS // 2
    total = jnp.zeros(BINS)
    for counts, own in (a, b):
        place = (centred >> jnp.minimum(exponent - own, 31)) + BINS // 2
        total = total.at[place].add(counts)
    return {"histogram": total, "exponent": exponent}


def _keep_samples(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    """Keeps the rows of greatest random priority: a uniform sample of the union, whatever the order of batches."""
    priority, place = jax.lax.top_k(jnp.concatenate([a[1], b[1]]), SAMPLES)
    rows = jnp.concatenate([a[0], b[0]])[place]
    return {"samples": jnp.where(jax.lax.expand_dims(priority >= 0, [1]), rows, 0.0), "priority": priority}


def merge_statistics(a: Statistics, b: Statistics) -> Statistics:
    """Joins the statistics of two sets of tokens (batches, devices, uses of a tied weight).

    Args:
        a: statistics.
        b: statistics of other tokens with the same fields.

    Returns:
        What one pass over both would have given; moving averages, which depend on the order of batches, are averaged by
        count, and samples are drawn again.

    >>> one = update_statistics(init_statistics({"absmax"}, 1), jnp.ones((2, 1)))
    >>> merge_statistics(one, one).count.item()
    4.0
    """
    summed = ("count", "sum_abs", "hessian", "cross", "residual")
    new = {name: getattr(a, name) + getattr(b, name) for name in summed if getattr(a, name) is not None}
    if a.absmax is not None and b.absmax is not None:
        new["absmax"] = jnp.maximum(a.absmax, b.absmax)
    if a.low is not None and b.low is not None:
        new["low"] = jnp.minimum(a.low, b.low)
    if a.high is not None and b.high is not None:
        new["high"] = jnp.maximum(a.high, b.high)
    if a.average is not None and b.average is not None:
        new["average"] = (a.average * a.count + b.average * b.count) / jnp.maximum(a.count + b.count, 1.0)
    if a.histogram is not None and b.histogram is not None and a.exponent is not None and b.exponent is not None:
        new |= _add_histograms((a.histogram, a.exponent), (b.histogram, b.exponent))
    if a.samples is not None and b.samples is not None and a.priority is not None and b.priority is not None:
        new |= _keep_samples((a.samples, a.priority), (b.samples, b.priority))
    return dataclasses.replace(a, **new)


def rescale_statistics(stats: Statistics, factor: jax.Array) -> Statistics:
    """Gives the statistics of `x * factor` in closed form, so that a chain of algorithms calibrates once.

    Args:
        stats: statistics of x.
        factor: [K] positive float32 factors of the channels.

    Returns:
        Statistics of the scaled inputs. Histogram and moving averages, which mix channels, are dropped; samples remain.

    >>> stats = update_statistics(init_statistics({"hessian"}, 2), jnp.ones((4, 2)))
    >>> rescale_statistics(stats, jnp.asarray([1.0, 2.0])).hessian.tolist()
    [[4.0, 8.0], [8.0, 16.0]]
    """
    new = {name: getattr(stats, name) for name in ("absmax", "sum_abs", "low", "high", "samples")}
    new = {name: value * _like(factor, value) for name, value in new.items() if value is not None}
    if stats.residual is not None:
        new["residual"] = stats.residual * jax.lax.expand_dims(factor, [1])
    outer = jax.lax.expand_dims(factor, [1]) * jax.lax.expand_dims(factor, [0])
    new |= {name: getattr(stats, name) * outer for name in ("hessian", "cross") if getattr(stats, name) is not None}
    return dataclasses.replace(stats, average=None, histogram=None, exponent=None, **new)


def _like(factor: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.broadcast_to(factor, value.shape)
