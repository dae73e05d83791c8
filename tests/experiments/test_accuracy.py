"""The accuracy harness: its measures against NumPy, its command line, and what it says of bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from experiments import accuracy
from experiments.evaluation import evaluate, token_measures
from experiments.models import Decoder, DecoderConfig
from experiments.recipes import RECIPES, get_recipes
from jaxquant.interop import save_huggingface

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def numpy_measures(reference, logits, targets):
    p = np.exp(reference - reference.max(-1, keepdims=True))
    q = np.exp(logits - logits.max(-1, keepdims=True))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(q, targets[..., None], -1))[..., 0]
    return nll, (p * np.log(p / q)).sum(-1), reference.argmax(-1) == logits.argmax(-1)


def test_token_measures_are_their_definitions(rng):
    reference, logits = (rng.normal(size=(2, 3, 5, 11)) * 3).astype(np.float32)  # which both sides order alike
    targets = rng.integers(0, 11, (3, 5))
    got = token_measures(jnp.asarray(reference, jnp.float32), jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    wide = (x.astype(np.float64) for x in (reference, logits))
    for mine, theirs in zip(got, numpy_measures(*wide, targets), strict=True):
        # float32 softmax over 11 logits of size below 15: a few ulps of the largest term
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6)


def test_a_model_agrees_with_itself_and_a_ragged_last_batch_counts(rng):
    tokens = rng.integers(0, 7, (5, 9)).astype(np.uint16)
    table = jnp.asarray(rng.normal(size=(7, 7)), jnp.float32)

    def forward(params, inputs):
        return params[inputs]

    steps = []
    result = evaluate(forward, table, forward, table, tokens, batch_size=2, progress=steps.append)
    assert steps == [2, 2, 1]
    assert np.abs(result.kl).max() < 1e-6  # a softmax against itself, float32
    assert (result.agreement == 1).all()
    nll, _, _ = numpy_measures(*2 * [np.asarray(table, np.float64)[tokens[:, :-1]]], tokens[:, 1:].astype(int))
    np.testing.assert_allclose(result.nll, nll.mean(1), rtol=1e-5)


@pytest.mark.parametrize("tokens", [np.zeros((3,), np.int32), np.zeros((3, 1), np.int32), np.zeros((3, 4))])
def test_tokens_must_be_an_integer_matrix(tokens):
    with pytest.raises(ValueError, match=r"tokens: expected integers \[sequences, T \+ 1\]"):
        evaluate(None, None, None, None, tokens)


def test_command_line_writes_rows(tmp_path, capsys):
    tokens = np.load(accuracy.EMBEDDED_MODEL / "evaluation.npy")[:2, :65]
    np.save(tmp_path / "tokens.npy", tokens)
    out = tmp_path / "rows.json"
    accuracy.main(["--recipes", "float,rtn-w8", "--tokens", str(tmp_path / "tokens.npy"), "--json", str(out)])
    rows = json.loads(out.read_text())
    assert [row["recipe"] for row in rows] == ["float", "rtn-w8"]
    assert {"bits", "ppl", "kl", "top1", "seconds"} <= rows[0].keys()
    assert rows[0]["kl"] < 1e-6 < rows[1]["kl"] < 0.01
    assert 8 < rows[1]["bits"] < 8.2
    assert "rtn-w8" in capsys.readouterr().out


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A model in 4 bits, and the folder that holds it in GPTQ's format."""
    rng, folder = np.random.default_rng(), tmp_path_factory.mktemp("imported") / "model"
    model = Decoder(DecoderConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=16))
    params = jax.jit(model.init_params)(jax.random.key(rng.integers(2**31)))
    qparams = jq.quantize(params, jq.QuantConfig.preset("w4a16", group_size=32))
    config = model.config.to_hf() | {"torch_dtype": "float32"}
    save_huggingface(folder, jax.tree.map(np.asarray, qparams), config, format="gptq")
    np.save(folder / "evaluation.npy", rng.integers(0, SIZES["vocab_size"], (3, 9)).astype(np.uint16))
    return model, qparams, folder


def test_a_quantized_folder_is_evaluated_as_it_is(tmp_path, imported):
    model, qparams, folder = imported
    out = tmp_path / "rows.json"
    accuracy.main(["--model", str(folder), "--json", str(out)])
    (row,) = json.loads(out.read_text())
    tokens = np.load(folder / "evaluation.npy").astype(np.int32)
    logits = np.asarray(jax.jit(model.forward)(jq.dequantize(qparams), jnp.asarray(tokens[:, :-1])), np.float64)
    nll, _, _ = numpy_measures(logits, logits, tokens[:, 1:])
    assert row["recipe"] == "imported"
    assert row["bits"] == jq.summary(qparams).bits_per_weight
    # the same weights in float32, products in another order: eps(float32) * K for K <= 64 is 8e-6 of logits of about 4
    np.testing.assert_allclose(row["ppl"], np.exp(nll.mean()), rtol=1e-4)
    assert row["kl"] < 1e-6
    assert row["top1"] > 0.9  # one tie of 24 may fall otherwise


def test_a_quantized_folder_is_not_quantized_again(imported):
    with pytest.raises(SystemExit, match="model is quantized already; leave --recipes out, or give the float model"):
        accuracy.main(["--model", str(imported[2]), "--recipes", "rtn-w4"])


@pytest.mark.parametrize("names", ["float,rtn-w5", "float,float"])
def test_bad_recipe_names_are_listed(names):
    with pytest.raises(ValueError, match="there are: float, rtn-w8"):
        get_recipes(names)


def test_help_lists_every_recipe(capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in RECIPES)
