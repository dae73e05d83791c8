"""The decoder's mixtures of experts: both forms, routing, balance, folders, and the quantized model."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxquant as jq
from experiments import accuracy
from experiments.models import Decoder, DecoderConfig, Experts, load_hf, save_hf
from experiments.models.moe import load_imbalance, route

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "decoder"
TINY_MOE = accuracy.EMBEDDED_MODEL.with_name("tiny_moe")
RESULTS = pathlib.Path(accuracy.__file__).parent / "results" / "accuracy_tiny_moe.json"
FAMILIES = ["mixtral", "qwen3_moe", "qwen3_moe_raw"]


def _loaded(family):
    config, params = load_hf(FIXTURES / family)
    return Decoder(config), params, jnp.asarray(np.load(FIXTURES / family / "golden.npz")["tokens"])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_raw"])
def test_dense_and_ragged_forms_are_one_function(family):
    model, params, tokens = _loaded(family)
    ragged = jax.jit(model.forward)(params, tokens)
    dense = jax.jit(model.clone(experts="dense").forward)(params, tokens)
    # test_decoder's bound on float32 logits, RELATIVE, for each of the two
    np.testing.assert_allclose(dense, ragged, rtol=0, atol=2 * 4 * 12 * 48**0.5 * 1.2e-7 * np.abs(ragged).max())


@pytest.mark.parametrize("form", ["ragged", "dense"])
def test_the_quantized_model_has_no_dense_weight(form):
    """Both forms, from the model as it is: every expert weight meets its product in codes."""
    model, params, tokens = _loaded("mixtral")
    model = model.clone(experts=form)
    qparams = jq.quantize(params, jq.QuantConfig.preset("w4a16", group_size=16))
    rows = jq.explain(model.forward, qparams, tokens).rows
    experts = {row[0] for row in rows if "/moe/" in row[0]}
    assert experts == {f"layers_{layer}/moe/{name}/kernel" for layer in range(2) for name in ("w1", "w2", "w3")}
    got = jax.jit(jq.quantized(model.forward, on_dense="error"))(qparams, tokens)
    wanted = jax.jit(model.forward)(jq.dequantize(qparams), tokens)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2 * 4 * 12 * 48**0.5 * 1.2e-7 * np.abs(wanted).max())


def test_routers_stay_float():
    _, params, _ = _loaded("qwen3_moe")
    qparams = jq.quantize(params, jq.QuantConfig.preset("w4a16", group_size=8))
    moe = qparams["layers_0"]["moe"]
    assert isinstance(moe["router"]["kernel"], np.ndarray)
    assert all(isinstance(moe[name]["kernel"], jq.QArray) for name in ("gate_proj", "up_proj", "down_proj"))


def test_routes_to_the_likeliest():
    logits = jnp.log(jnp.asarray([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]))
    weights, chosen = route(logits, 2, True)
    np.testing.assert_array_equal(chosen, [[1, 2], [0, 2]])
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [5 / 8, 3 / 8]], rtol=1e-5)
    np.testing.assert_allclose(route(logits, 2, False)[0], [[0.6, 0.3], [0.5, 0.3]], rtol=1e-5)


def test_imbalance_is_one_when_even_and_the_experts_number_when_one_gets_all():
    even = jnp.log(jnp.eye(4) * 0.6 + 0.1)
    np.testing.assert_allclose(load_imbalance(even, 1), 1.0, rtol=1e-5)
    crowded = jnp.broadcast_to(jnp.asarray([30.0, 0.0, 0.0, 0.0]), (8, 4))
    np.testing.assert_allclose(load_imbalance(crowded, 1), 4.0, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_are_written_as_they_were_read(tmp_path, family):
    config, params = load_hf(FIXTURES / family)
    save_hf(tmp_path, params, config)
    written, given = load_file(tmp_path / "model.safetensors"), load_file(FIXTURES / family / "model.safetensors")
    assert written.keys() == given.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, given[name])
    assert load_hf(tmp_path)[0] == config


def test_experts_that_cannot_be_are_refused():
    config, _ = load_hf(FIXTURES / "mixtral")
    with pytest.raises(ValueError, match="per_token is 5, of 4 experts"):
        Experts(4, 5, 8)
    with pytest.raises(ValueError, match="experts: got None for mixtral"):
        dataclasses.replace(config, experts=None)
    with pytest.raises(NotImplementedError, match="are normalised and of intermediate_size"):
        dataclasses.replace(config, experts=Experts(4, 2, 8)).to_hf()
    hf = json.loads((FIXTURES / "qwen3_moe" / "config.json").read_text())
    with pytest.raises(NotImplementedError, match="mlp_only_layers"):
        DecoderConfig.from_hf(hf | {"mlp_only_layers": [1]})


def test_the_embedded_mixture_is_one_and_small(tmp_path):
    """It loads, every expert is used, and the harness runs on it."""
    config, params = load_hf(TINY_MOE)
    assert config.experts == Experts(8, 2, 128)
    assert sum(file.stat().st_size for file in TINY_MOE.iterdir()) <= 8_000_000
    record = json.loads((TINY_MOE / "loss_curve.json").read_text())
    assert np.min(record["expert_shares"]) > 0.05
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    np.save(tmp_path / "tokens.npy", np.load(TINY_MOE / "evaluation.npy")[:2, :65])
    rows = tmp_path / "rows.json"
    accuracy.main(["--model", str(TINY_MOE), "--recipes", "rtn-w4", "--tokens", str(tmp_path / "tokens.npy"),
                   "--json", str(rows)])  # fmt: skip
    (row,) = json.loads(rows.read_text())
    assert 4 < row["bits"] < 4.2
    assert 0 < row["kl"] < 0.5


def test_gptq_removes_at_least_two_fifths_of_what_rounding_costs():
    """The committed rows of `python -m experiments.accuracy`, which fails where an expert sees no token."""
    kl = {row["recipe"]: row["kl"] for row in json.loads(RESULTS.read_text())}
    assert kl["gptq-w4"] <= 0.6 * kl["rtn-w4"]
