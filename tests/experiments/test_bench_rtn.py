"""The bench compares like with like: the hand-written programs give the library's codes."""

import functools

import jax
import numpy as np
import pytest

from experiments.bench_rtn import HAND, measure
from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS


@pytest.mark.parametrize("recipe", HAND)
def test_hand_written_codes_are_the_library_s(rng, recipe):
    w = rng.normal(0, 0.02, (256, 64)).astype(np.float32)
    codes, scale, *zero_point = jax.jit(HAND[recipe])(w)
    q = jax.jit(functools.partial(quantize_array, spec=PRESETS[recipe]))(w)
    assert codes.dtype == q.qvalue.dtype
    # A quotient may differ from a product with the inverse in its last bit, which moves a code that is close to a tie:
    # the extremes of the full grid are, so up to one code in 128 (two in a byte) may be the neighbour.
    assert (np.asarray(codes) == np.asarray(q.qvalue)).mean() > 1 - 2 / 128
    np.testing.assert_allclose(np.asarray(scale, np.float32), np.asarray(q.scale, np.float32), rtol=2.0**-7)
    assert bool(zero_point) == (q.zero_point is not None)


def test_a_row_names_what_it_measured(rng):
    row = measure("w4a16", [jax.numpy.asarray(rng.normal(size=(128, 8)).astype(np.float32))], rounds=1)
    assert row["recipe"] == "w4a16"
    assert row["tree_over_hand"] == row["seconds"]["tree"] / row["seconds"]["hand"] > 0
