"""The check that precedes every timing, on a CPU: right products pass it and wrong ones do not."""

import functools

import jax
import pytest

from experiments import _int4
from pallas_kernels.int4_matmul import int4_matmul

RAGGED = {"m": 3, "k": 1000, "n": 100, "group": 1000, "bias": True}
GROUPED = {"m": 17, "k": 192, "n": 128, "group": 64, "zero": True, "dtype": "float16"}


@pytest.mark.parametrize("case", [RAGGED, GROUPED], ids=["outputs-padded", "groups"])
def test_the_check_tells_right_from_wrong(rng, case):
    data = _int4.problem(int(rng.integers(2**31)), **case)
    qweight, scale, zero = data["weights"][0]
    run = functools.partial(int4_matmul, data["x"], qweight, scale, zero, bias=data["bias"], implementation="xla")
    exact = (data["x"], qweight, scale, zero, data["bias"])
    assert float(_int4.relative_error(run(), *exact)) <= _int4.TOLERANCE[data["x"].dtype.name]
    wrong = jax.numpy.roll(run(), 1, axis=1)
    assert float(_int4.relative_error(wrong, *exact)) > 0.5
