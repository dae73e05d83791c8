"""The check that precedes every timing, on a CPU: right products pass it and wrong ones do not."""

import functools
import json

import jax
import pytest

from experiments import _clock, _int4, compare_int4, tune
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

    def run(commit, *times):
        best = [{"shape": shape, "m": m, "kernel_us": time, "config": {"block_m": m}} for m, time in times]
        return {
            "conditions": {"device": "card", "date": "2026-01-02T03:04:05", "jax": "1", "commit": commit},
            "best": best,
        }

    table = {}
    assert tune.merge(run("first", (1, 5.0), (16, 7.0)), table) == 2
    assert tune.merge(run("second", (1, 6.0), (16, 6.5), (64, 9.0)), table) == 2
    kept = json.loads(tune.write_table(table))["card"]["entries"]
    assert [(e["m"], e["k"], e["n"], e["microseconds"], e["commit"]) for e in kept] == [
        (1, k, n, 5.0, "first"),
        (16, k, n, 6.5, "second"),
        (64, k, n, 9.0, "second"),
    ]


def test_bars_are_of_the_run_where_it_has_the_peer():
    """Our 10 us against a published peer of 12 and torch.mm of the same run; a mean of one row is its ratio."""
    shape, (k, n) = next(iter(cases.SHAPES.items()))
    published = [{"m": 1, "k": k, "n": n, "best_w4a16": 12.0, "cublas_bf16": 30.0, "floor": 8.0}]
    rows = [
        {"shape": shape, "m": 1, "mosaic_gpu_kernel_us": 10.0, "tinygemm_us": 11.0, "floor_us": 7.0},
        {"shape": shape, "m": 8192, "mosaic_gpu_kernel_us": 100.0, "torch_mm_us": 96.0, "floor_us": 90.0},
    ]
    peers = compare_int4.peers_of_run(rows, published)
    assert [(peer["best_w4a16"], peer["cublas_bf16"], peer["floor"]) for peer in peers] == [
        (11.0, 30.0, 7.0),
        (None, 96.0, 90.0),
    ]
    bars = compare_int4.bars(compare_int4.compare(compare_int4.times_of(rows), peers))
    assert [(bar["row"].split(" over ")[1], bar["ratio"], bar["met"]) for bar in bars] == [
        ("the best W4A16 peer", 1.1, True),
        ("torch.mm", 0.96, True),
        ("the best W4A16 peer, mean of 1", 1.1, False),
        ("torch.mm, mean of 1", 0.96, True),
    ]


def test_the_commit_is_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("JAXQUANT_COMMIT", "abc1234")
    assert _clock.conditions()["commit"] == "abc1234"
