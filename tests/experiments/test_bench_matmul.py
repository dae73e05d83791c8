"""The check that precedes every timing, on a CPU: right products pass it and wrong ones do not."""

import functools
import json

import jax
import pytest

from experiments import _int4, tune
from pallas_kernels.int4_matmul import cases, int4_matmul

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


def test_a_run_replaces_only_what_it_beats():
    shape, (k, n) = next(iter(cases.SHAPES.items()))

    def run(*times):
        best = [{"shape": shape, "m": m, "kernel_us": time, "config": {"block_m": m}} for m, time in times]
        return {"conditions": {"device": "card", "date": "2026-01-02T03:04:05", "jax": "1"}, "best": best}

    table = {}
    assert tune.merge(run((1, 5.0), (16, 7.0)), table, "first") == 2
    assert tune.merge(run((1, 6.0), (16, 6.5), (64, 9.0)), table, "second") == 2
    kept = json.loads(tune.write_table(table))["card"]["entries"]
    assert [(e["m"], e["k"], e["n"], e["microseconds"], e["commit"]) for e in kept] == [
        (1, k, n, 5.0, "first"),
        (16, k, n, 6.5, "second"),
        (64, k, n, 9.0, "second"),
    ]
