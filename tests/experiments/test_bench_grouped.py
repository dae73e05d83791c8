import jax.numpy as jnp
import pytest

from experiments.bench_grouped import FORMATS, LAYERS, TOLERANCE, candidates, group_sizes, relative_error
from pallas_kernels.grouped_matmul import Config, grouped_matmul, supports


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
