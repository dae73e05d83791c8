"""Statistics: accumulation against NumPy, merging, closed-form rescaling, and the matrix form of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms._statistics import (
    BINS,
    MOMENTUM,
    NEEDS,
    SAMPLES,
    init_statistics,
    merge_statistics,
    rescale_statistics,
    update_statistics,
)
from jaxquant.arrays._matrix import (
    from_matrix,
    grid_from_matrix,
    matrix_form,
    rows_from_matrix,
    rows_to_matrix,
    to_matrix,
)
from jaxquant.arrays._numerics import expand_grid, find_scale, grid_shape
from jaxquant.arrays._spec import PerBlock, PerGroup, PerTensor, TensorSpec

WITHOUT_RESIDUAL = set(NEEDS) - {"residual", "cross"}
EPS = float(jnp.finfo(jnp.float32).eps)


def inputs(rng, tokens=37, channels=6):
    return rng.standard_normal((tokens, channels)) * np.exp(rng.standard_normal(channels))


update = jax.jit(update_statistics)


def gather(x, needs=WITHOUT_RESIDUAL, **kwargs):
    return update(init_statistics(needs, x.shape[1]), jnp.asarray(x, jnp.float32), **kwargs)


def sums_bound(x):
    """Summing T rounded products in any order errs by at most (T + 1) eps of the sum of magnitudes."""
    return (len(x) + 1) * EPS


def test_update_matches_numpy(rng):
    x = inputs(rng)
    stats = gather(x)
    assert stats.count == len(x)
    single = x.astype(np.float32)
    np.testing.assert_array_equal(stats.absmax, np.abs(single).max(0))
    np.testing.assert_array_equal(stats.low, single.min(0))
    np.testing.assert_array_equal(stats.high, single.max(0))
    np.testing.assert_array_equal(stats.average, [single.min(), single.max()])
    np.testing.assert_allclose(stats.mean_abs, np.abs(x).mean(0), rtol=sums_bound(x))
    magnitude = np.abs(x).T @ np.abs(x)
    assert np.all(np.abs(stats.hessian - x.T @ x) <= sums_bound(x) * magnitude)
    edges = np.linspace(-1, 1, BINS + 1) * 2.0 ** int(stats.exponent)
    np.testing.assert_array_equal(stats.histogram, np.histogram(single, edges)[0])


def test_merge_equals_one_pass(rng):
    x = inputs(rng, tokens=64)
    whole = gather(x)
    parts = jax.jit(merge_statistics)(gather(x[:5]), gather(x[5:]))
    for name in ("count", "absmax", "low", "high", "histogram", "exponent"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(parts.hessian, whole.hessian, atol=sums_bound(x) * np.abs(x).max() ** 2 * len(x))


def test_histogram_range_growth_is_exact(rng):
    small, large = inputs(rng) * 0.01, inputs(rng) * 100
    grown = update(gather(small, {"histogram"}), jnp.asarray(large, jnp.float32))
    both = np.concatenate([small, large]).astype(np.float32)
    edges = np.linspace(-1, 1, BINS + 1) * 2.0 ** int(grown.exponent)
    np.testing.assert_array_equal(grown.histogram, np.histogram(both, edges)[0])


def test_moving_average(rng):
    a, b = inputs(rng).astype(np.float32), inputs(rng).astype(np.float32)
    stats = update(gather(a, {"moving_average"}), jnp.asarray(b))
    expected = MOMENTUM * np.array([a.min(), a.max()]) + (1 - MOMENTUM) * np.array([b.min(), b.max()])
    np.testing.assert_allclose(stats.average, expected, rtol=4 * EPS)


def test_rescale_equals_recomputing(rng):
    x, factor = inputs(rng, tokens=300), np.exp(rng.standard_normal(6)).astype(np.float32)
    closed, again = rescale_statistics(gather(x), jnp.asarray(factor)), gather(x * factor)
    for name in ("absmax", "sum_abs", "low", "high", "samples"):
        np.testing.assert_allclose(getattr(closed, name), getattr(again, name), rtol=sums_bound(x), err_msg=name)
    magnitude = np.abs(x * factor).T @ np.abs(x * factor)
    assert np.all(np.abs(closed.hessian - again.hessian) <= 2 * sums_bound(x) * magnitude)
    assert closed.histogram is None
    assert closed.average is None


def test_weights_mask_tokens(rng):
    x, mask = inputs(rng), rng.integers(0, 2, 37)
    masked, kept = gather(x, weights=jnp.asarray(mask)), gather(x[mask > 0])
    for name in ("count", "absmax", "low", "high", "average", "histogram", "exponent"):
        np.testing.assert_array_equal(getattr(masked, name), getattr(kept, name), err_msg=name)
    np.testing.assert_allclose(masked.hessian, kept.hessian, atol=sums_bound(x) * len(x) * np.abs(x).max() ** 2)
    empty = gather(x, weights=jnp.zeros(37))
    assert empty.count == 0
    assert not np.any(empty.hessian)
    assert np.all(np.isfinite(empty.average))
    assert int(jnp.sum(empty.priority >= 0)) == 0


def test_samples_are_rows_seen(rng):
    x = inputs(rng, tokens=SAMPLES // 2).astype(np.float32)
    few = gather(x, {"samples"})
    taken = np.asarray(few.samples)[np.asarray(few.priority) >= 0]
    np.testing.assert_array_equal(np.sort(taken[:, 0]), np.sort(x[:, 0]))
    for _ in range(3):
        few = update(few, jnp.asarray(inputs(rng, tokens=SAMPLES), jnp.float32))
    assert few.samples.shape == (SAMPLES, 6)
    assert np.all(np.asarray(few.priority) >= 0)
    shares = np.isin(np.asarray(few.samples)[:, 0], x[:, 0]).mean()
    assert abs(shares - 1 / 7) < 6 * np.sqrt(1 / 7 * 6 / 7 / SAMPLES)  # six standard deviations of a fair draw


def test_bfloat16_inputs_accumulate_in_float32():
    x = jnp.ones((1000, 2), jnp.bfloat16)
    stats = update_statistics(init_statistics({"hessian"}, 2), x)
    assert stats.hessian.dtype == jnp.float32
    assert np.all(stats.hessian == 1000)


def test_cross_and_residual(rng):
    x, other, residual = inputs(rng), inputs(rng), inputs(rng, channels=3)
    stats = update_statistics(
        init_statistics({"cross", "residual"}, 6, 3),
        jnp.asarray(x, jnp.float32),
        x_float=jnp.asarray(other, jnp.float32),
        residual=jnp.asarray(residual, jnp.float32),
    )
    np.testing.assert_allclose(stats.cross, x.T @ other, atol=sums_bound(x) * (np.abs(x).T @ np.abs(other)).max())
    np.testing.assert_allclose(
        stats.residual, x.T @ residual, atol=sums_bound(x) * (np.abs(x).T @ np.abs(residual)).max()
    )
    with pytest.raises(ValueError, match="x_float must be passed"):
        update_statistics(stats, jnp.asarray(x, jnp.float32))


def test_unknown_need():
    with pytest.raises(ValueError, match="fisher; accepted: absmax"):
        init_statistics({"fisher"}, 4)


FORMS = [
    ((24, 10), (-2,), 0, TensorSpec("int4", PerGroup(8))),
    ((3, 24, 10), (-2,), 1, TensorSpec("int4")),
    ((24, 3, 10), (-3,), 0, TensorSpec("int4", PerGroup(4))),
    ((2, 3, 16, 10), (-3, -2), 1, TensorSpec("int4", PerGroup(8))),
    ((4, 16, 10), (-3, -2), 0, TensorSpec("int4", PerGroup(32))),
    ((11, 24), (-1,), 0, TensorSpec("int8", PerTensor())),
    ((11, 24), (-1,), 0, TensorSpec("int8")),
    ((16, 12), (-2,), 0, TensorSpec("int8", PerBlock((8, 4)))),
    ((2, 3, 13, 5), (-3, -2), 1, TensorSpec("int4", PerGroup(8), pad=True)),
]


@pytest.mark.parametrize(("shape", "axis", "batch_dims", "spec"), FORMS)
def test_matrix_round_trip_and_grids(rng, shape, axis, batch_dims, spec):
    form = matrix_form(shape, axis, batch_dims, spec)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    matrix = to_matrix(w, form)
    back = from_matrix(matrix, form)[tuple(slice(size) for size in shape)]
    np.testing.assert_array_equal(back, w)
    cells = grid_shape((1,) * (matrix.ndim - 2) + form.matrix_shape, (-2,), spec.granularity)
    grid = jnp.asarray(rng.standard_normal((*form.batch, *cells[-2:])), jnp.float32)
    spread = expand_grid(grid, matrix.shape)  # element by element, the grid means the same on both sides
    ours = expand_grid(grid_from_matrix(grid, form, spec), form.padded_shape)
    np.testing.assert_array_equal(
        to_matrix(ours[tuple(slice(s) for s in shape)], form), spread * (to_matrix(w * 0 + 1, form))
    )


def test_matrix_scales_equal_the_weights(rng):
    spec = TensorSpec("int4", PerGroup(16))
    w = jnp.asarray(rng.standard_normal((4, 8, 6)), jnp.float32)
    form = matrix_form(w.shape, (-3, -2), 0, spec)
    direct, _ = find_scale(w, grid_shape(w.shape, (-3, -2), spec.granularity), spec)
    matrix, _ = find_scale(to_matrix(w, form), (2, 6), spec)
    np.testing.assert_array_equal(grid_from_matrix(matrix, form, spec), direct)


def test_rows_round_trip_with_padding():
    form = matrix_form((2, 3, 13, 5), (-3, -2), 1, TensorSpec("int4", PerGroup(8), pad=True))
    rows = jnp.arange(2 * 39, dtype=jnp.float32).reshape(2, 39)
    padded = rows_to_matrix(rows, form, -1)
    assert padded.shape == (2, 48)
    np.testing.assert_array_equal(rows_from_matrix(padded, form), rows.reshape(2, 3, 13, 1))


def test_matrix_form_refuses_contracted_batches():
    with pytest.raises(ValueError, match="batch_dims=1"):
        matrix_form((8, 4), (-2,), 1, TensorSpec("int8"))


def test_vmapped_update_equals_looped(rng):
    x = np.stack([inputs(rng), inputs(rng)]).astype(np.float32)
    empty = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), init_statistics({"hessian", "absmax"}, 6))
    together = jax.vmap(update_statistics)(empty, jnp.asarray(x))
    for i in range(2):
        one = gather(x[i], {"hessian", "absmax"})
        np.testing.assert_array_equal(together.absmax[i], one.absmax)
        np.testing.assert_allclose(together.hessian[i], one.hessian, atol=sums_bound(x[i]) * np.abs(x).max() ** 2 * 37)
