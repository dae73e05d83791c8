"""The decode bench on a small decoder: its memory figures, and the kernels in its compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_decode
from experiments.models.decoder import Decoder
from pallas_kernels._aot import compile_for_h200

SMALL = dataclasses.replace(
    bench_decode.LLAMA3_8B,
    vocab_size=320,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)


@pytest.fixture(scope="module")
def model():
    return Decoder(SMALL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def params(model):
    return bench_decode.random_params(model, jax.random.key(0))


@pytest.mark.parametrize("head", [False, True])
def test_every_weight_is_packed_and_small(params, head):
    _, memory = bench_decode.pack(params, head=head)
    assert memory["weights"] == memory["packed"] == 2 * bench_decode.PRODUCTS + head
    assert memory["bits_by_size"] == 4.125


@pytest.mark.aot
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_compiled_model_launches_four_kernels_a_layer(model, params, kind, head):
    qparams, memory = bench_decode.pack(params, head=head)
    (run, args), *_ = [
        program for key, program in bench_decode.programs(model, {"w4a16": qparams}, [3], 40).items() if key[0] == kind
    ]
    text, reports = compile_for_h200(run, *args)
    assert text.count(bench_decode.KERNEL) == memory["launches"] == 2 * 4 + head
    assert "transpose_fusion" not in text  # the cache is read as it lies
    assert not [problem for report in reports for problem in report.problems]


def test_speedups_are_of_the_same_program():
    rows = [
        {"kind": "decode", "size": 1, "tree": "bf16", "step_ms": 4.0, "kernel_ms": 3.0},
        {"kind": "decode", "size": 1, "tree": "w4a16", "step_ms": 2.0, "kernel_ms": 1.0},
        {"kind": "decode", "size": 16, "tree": "w4a16", "step_ms": 2.0, "kernel_ms": 1.0},
    ]
    (ratio,) = bench_decode.ratios(rows)
    assert (ratio["step_speedup"], ratio["kernel_speedup"]) == (2.0, 3.0)
