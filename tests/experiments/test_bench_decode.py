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


@pytest.mark.parametrize("name", list(bench_decode.TREES))
def test_every_weight_is_packed_and_small(params, name):
    _, memory = bench_decode.pack(params, name)
    assert memory["weights"] == memory["packed"] == 2 * bench_decode.PRODUCTS + name.endswith("head")
    assert memory["bits_by_size"] == 4.125 if name != "w8a8" else 8 < memory["bits_by_size"] < 8.25


def test_one_layer_agrees_with_xla_and_a_wrong_one_is_refused(monkeypatch):
    assert 0 < bench_decode.verify(SMALL, "w4a8", tokens=5) < 2.0**-5
    pack_for = bench_decode.jq.pack_for

    def wrong(tree, target):
        return jax.tree.map(lambda leaf: leaf * 0 if leaf.ndim == 4 else leaf, pack_for(tree, target))

    monkeypatch.setattr(bench_decode.jq, "pack_for", wrong)
    with pytest.raises(RuntimeError, match="w4a16: one layer differs from XLA's by"):
        bench_decode.verify(SMALL, "w4a16", tokens=5)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kind", "name", "launches"),
    [
        ("decode", "w4a16", 2 * 4),
        ("decode", "w4a16+head", 2 * 4 + 1),
        ("loop", "w4a16", 2 * 4),
        ("prefill", "w4a8", 2 * 8),
        ("prefill", "w8a8", 2 * 8),
    ],
)
def test_the_compiled_model_launches_a_kernel_for_siblings(model, params, kind, name, launches):
    qparams, memory = bench_decode.pack(params, name)
    programs = bench_decode.programs(model, {name: qparams}, [3], 40, 4)
    ((run, args),) = [program for key, program in programs.items() if key[0] == kind]
    text, reports = compile_for_h200(run, *args)
    assert text.count(bench_decode.KERNEL) == memory["launches"] == launches
    assert kind == "prefill" or "transpose_fusion" not in text  # the cache is read as it lies
    assert not [problem for report in reports for problem in report.problems]


def test_speedups_are_of_the_same_program():
    rows = [
        {"kind": "decode", "size": 1, "tree": "bf16", "step_ms": 4.0, "kernel_ms": 3.0},
        {"kind": "decode", "size": 1, "tree": "w4a16", "step_ms": 2.0, "kernel_ms": 1.0},
        {"kind": "decode", "size": 16, "tree": "w4a16", "step_ms": 2.0, "kernel_ms": 1.0},
    ]
    (ratio,) = bench_decode.ratios(rows)
    assert (ratio["step_speedup"], ratio["kernel_speedup"]) == (2.0, 3.0)
