import jax.numpy as jnp
import pytest

from experiments import tuned_grouped
from experiments._grouped import FORMATS, TOLERANCE, group_sizes, relative_error
from experiments.bench_grouped import LAYERS, candidates
from pallas_kernels.grouped_matmul import Config, config, default_config, grouped_matmul, supports


def test_tokens_choose_distinct_experts(rng):
    sizes = group_sizes(rng, 40, 16, 4)
    assert sizes.sum() == 160
    assert sizes.max() <= 40


@pytest.mark.parametrize("activation", [None, "silu_mul"])
def test_a_row_of_the_wrong_expert_is_seen(rng, activation):
    sizes = jnp.asarray([3, 0, 6], jnp.int32)
    words = jnp.asarray(rng.integers(-(2**31), 2**31, (3, 1, 2, 2, 256)), jnp.int32)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (3, 1, 64)) / 64, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(9, 128)), jnp.bfloat16)
    error_of = lambda given: float(  # noqa: E731
        relative_error(
            grouped_matmul(x, words, scale, group_sizes=given, activation=activation, implementation="xla"),
            (x, None), words, scale, sizes, 8, activation,
        )
    )  # fmt: skip
    assert error_of(sizes) <= TOLERANCE[activation]
    assert error_of(jnp.asarray([2, 0, 7], jnp.int32)) > 10 * TOLERANCE[activation]


@pytest.mark.parametrize("form", FORMATS)
def test_every_candidate_is_one_that_the_kernel_takes(form):
    weight_dtype, x_dtype, _ = FORMATS[form]
    for layer, (_, k, _, _) in LAYERS.items():
        groups = k // 128 if weight_dtype == jnp.int32 else 1
        for cut in candidates(layer, 256, form):
            assert cut is not None
            assert supports(k, groups, x_dtype, weight_dtype, config=Config(**cut)) is None


def test_a_sweep_is_merged_and_read(monkeypatch):
    """The fastest verified cut of a problem becomes its default, and that of as many rows, and no other's."""
    experts, k, n, top = LAYERS["qwen3-30b-a3b"]
    cuts = [cut | {"strip": strip} for strip in (1, 2) for cut in candidates("qwen3-30b-a3b", 1, "w4a16")[:1]]
    row = {"shape": "qwen3-30b-a3b", "m": 1, "format": "w4a16"}
    rows = [row | {"config": cut, "us": us} for cut, us in zip(cuts, (9.0, 6.0), strict=True)]
    rows += [row | {"config": cuts[0], "error": "wrong"}, row | {"config": None, "us": 1.0}]
    conditions = {"date": "2026-01-02", "commit": "abc", "jax": "1"}
    entries = tuned_grouped.merged({"conditions": conditions, "rows": rows}, [])
    assert [(e["rows"], e["microseconds"], e["config"]["strip"]) for e in entries] == [(8, 6.0, 2)]
    assert tuned_grouped.merged({"conditions": conditions, "rows": rows[:1]}, entries) == entries
    key = tuple(entries[0][name] for name in tuned_grouped.KEY)
    monkeypatch.setattr(config, "_tuned", lambda: {key: Config(**entries[0]["config"])})
    default = lambda rows: default_config(rows, experts, k, n, k // 128)  # noqa: E731
    assert default(top).strip == 2
    assert default(2 * top).strip == 16
