"""What verifies the 8-bit kernels on a GPU, against NumPy; and the table of their configurations."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import _int8, sanitize_int8, tuned_int8
from pallas_kernels.int4_matmul import Config as Int4Config
from pallas_kernels.int4_matmul import supports as int4_supports
from pallas_kernels.int8_matmul import Config, default_config, supports


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("form", ["token", "tensor", "block", "asymmetric"])
def test_the_reference_is_exact(rng, form, dtype):
    form = "token" if dtype != "int8" and form == "asymmetric" else form
    data = _int8.problem(int(rng.integers(2**31)), 5, 256, 128, dtype, form, bias=True)
    (weight, w_scale), x, x_scale = data["weights"][0], data["x"], data["x_scale"]
    wide = lambda a: np.asarray(a, np.float64)  # noqa: E731
    spread = lambda a, axis: np.repeat(wide(a), 128, axis) if form == "block" else wide(a)  # noqa: E731
    zero = 0 if data["x_zero_point"] is None else wide(data["x_zero_point"])
    left = (wide(x) - zero) * spread(x_scale, 1)
    right = wide(weight).T * spread(spread(w_scale, 0), 1)
    want = left @ right + wide(data["bias"])
    got = _int8._exact(x, weight, x_scale, w_scale, data["x_zero_point"], data["bias"])
    # Sums of integers are exact; of fp8 products, float32 sums of 256: 256 eps / 2 of the sum of magnitudes.
    assert np.linalg.norm(wide(got) - want) <= (2.0**-22 if dtype == "int8" else 2.0**-16) * np.linalg.norm(want)


def test_integer_sums_hold_every_bit():
    k = 8192
    x, weight = np.full((1, k), -128, np.int8), np.full((2, k), -128, np.int8)
    weight[1, :3] = 127, -1, 1
    sums = np.asarray(_int8._exact_sums(x, weight))
    np.testing.assert_array_equal(sums, x.astype(np.int64) @ weight.T.astype(np.int64))


def test_the_fastest_of_a_full_sweep_is_chosen():
    configs = [Config(block_m=128, block_n=128, num_stages=stages) for stages in (2, 3, 4, 5)] * 2
    result = {"what": "time", "shape": "llama3-8b/o", "m": 4096, "dtype": "int8", "form": "token", "ok": True}
    results = [
        result | {"config": dataclasses.asdict(config), "kernel_us": 100.0 - i} for i, config in enumerate(configs)
    ]
    (row,) = tuned_int8.fastest([*results, results[0] | {"kernel_us": 1.0, "ok": False}])
    assert row["microseconds"] == 93.0
    assert Config(**row["config"]) == configs[-1]
    assert tuned_int8.fastest(results[:7]) == []
    default = result | {"config": dataclasses.asdict(default_config(4096, 4096, 4096, "int8")), "kernel_us": 97.0}
    assert tuned_int8.fastest([default]) == []
    assert [row["microseconds"] for row in tuned_int8.fastest([default, *results[:4]])] == [97.0]
    assert [row["microseconds"] for row in tuned_int8.fastest([default, *results[2:6]])] == [95.0]


def test_xla_is_listed_where_it_is_faster_than_the_kernel():
    timed = {"shape": "llama3-8b/o", "dtype": "int8", "form": "token", "ok": True}
    results = [
        timed | {"what": "time", "m": 100, "kernel_us": 9.0},
        timed | {"what": "xla", "m": 100, "xla_us": 8.0},
        timed | {"what": "time", "m": 4096, "kernel_us": 90.0},
        timed | {"what": "xla", "m": 4096, "xla_us": 95.0},
        timed | {"what": "xla", "m": 1, "xla_us": 1.0},  # no time of the kernel
        timed | {"what": "xla", "m": 4096, "xla_us": 1.0, "ok": False},  # wrong
    ]
    key = {"dtype": "int8", "blocked": False, "m": 128, "k": 4096, "n": 4096}
    assert tuned_int8.faster_by_xla(results, []) == [key | {"xla": 8.0, "kernel": 9.0}]
    assert tuned_int8.faster_by_xla(results, [key | {"microseconds": 7.0}]) == []


def test_a_run_is_merged_into_the_table():
    """What it did not measure stays; what XLA was timed on again is decided anew; the file reads back."""
    old = {"dtype": "int8", "blocked": False, "m": 64, "k": 4096, "n": 4096}
    config = dataclasses.asdict(Config(block_m=128, block_n=128, num_stages=3))
    entries = [old | {"microseconds": 7.0, "config": config}]
    lost = [old | {"xla": 6.0, "kernel": 7.0}, old | {"n": 6144, "xla": 6.0, "kernel": 7.0}]
    timed = {"shape": "llama3-8b/o", "dtype": "int8", "form": "token", "ok": True, "m": 64}
    results = [timed | {"what": "time", "kernel_us": 5.0}, timed | {"what": "xla", "xla_us": 6.0}]
    run = {"conditions": {"date": "2026-01-02", "commit": "abc", "jax": "1"}, "results": results}
    table = tuned_int8.merged(run, {"entries": entries, "xla_faster": lost})
    assert table["entries"] == entries
    assert table["xla_faster"] == lost[1:]
    assert json.loads(tuned_int8.written("card", table)) == {"card": table}


def test_the_kernels_take_what_the_sanitizer_runs():
    for problem, cut in sanitize_int8.PRODUCTS:
        config = Config(**{"block_n": 128, "num_stages": 2} | cut)
        assert supports(problem["dtype"], blocked=problem["form"] == "block", config=config) is None
    for problem, cut in sanitize_int8.W4A8:
        config = Int4Config(**{"block_k": 128, "num_stages": 2, "split_k": 1, "scale_after": True} | cut)
        groups = 1088 // problem["group"]
        assert int4_supports(1088, 448, groups, problem["dtype"], config=config) is None


def test_torch_times_are_kept_by_token_count():
    run = {"what": "torch", "shape": "llama3-8b/o", "tokens": [16, 128]}
    first = run | {"times": {"fp8_row/16": {"graph_us": 1.0}, "fp8_row/128": {"graph_us": 2.0}}}
    later = run | {"tokens": [128, 64], "times": {"fp8_row/128": {"graph_us": 3.0}, "fp8_row/64": {"graph_us": 4.0}}}
    rows = tuned_int8.kept([first, later]).values()
    assert {r["m"]: r["times"]["fp8_row"]["graph_us"] for r in rows} == {16: 1.0, 128: 3.0, 64: 4.0}
    assert list(tuned_int8.kept(rows).values()) == list(rows)
