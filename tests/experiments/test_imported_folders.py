"""The reference decoder on folders of other libraries' formats: run as they are, without requantizing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from experiments.models import Decoder, DecoderConfig, load_hf
from jaxquant.interop import load_huggingface, save_huggingface

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig(**SIZES, **HEADS))


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(np.asarray, jax.jit(model.init_params)(jax.random.key(np.random.default_rng().integers(2**31))))


def reordered(leaf):
    """A QArray with its inputs in another order, as act-order leaves them."""
    if not isinstance(leaf, jq.QArray):
        return leaf
    rows, groups = leaf.trailing[0], leaf.scale.shape[0]
    groups_of = np.random.default_rng().permutation(rows) // (rows // groups)
    return dataclasses.replace(leaf, perm=np.argsort(groups_of, kind="stable").astype(np.int32)[:, None])


@pytest.mark.parametrize(
    ("format", "preset", "order"),
    [
        ("gptq", "w4a16", True),
        ("gptq_v2", "w3a16-asym", False),
        ("awq", "w4a16-asym", False),
        ("compressed-tensors", "w8a8", False),
        ("compressed-tensors", "fp8", False),
    ],
)
def test_the_decoder_runs_them_as_they_are(tmp_path, rng, model, params, format, preset, order):
    grouped = preset.startswith(("w3", "w4"))
    qparams = jq.quantize(params, jq.QuantConfig.preset(preset, **({"group_size": 32} if grouped else {})))
    if order:
        qparams = jax.tree.map(reordered, qparams, is_leaf=lambda leaf: isinstance(leaf, jq.QArray))
    config = model.config.to_hf() | {"torch_dtype": "float32"}
    save_huggingface(tmp_path, qparams, config, format=format)
    loaded, imported = load_hf(tmp_path)
    assert loaded == model.config
    tokens = jnp.asarray(rng.integers(0, SIZES["vocab_size"], (2, 9)), jnp.int32)
    forward = jax.jit(jq.quantized(model.forward, on_dense="error"))
    np.testing.assert_array_equal(forward(imported, tokens), forward(qparams, tokens))


def test_gptq_folders_from_before_quantization_config_are_read_alike(tmp_path, model, params):
    qparams = jq.quantize(params, jq.QuantConfig.preset("w4a16", group_size=32))
    save_huggingface(tmp_path, qparams, model.config.to_hf() | {"torch_dtype": "float32"}, format="gptq")
    now = load_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (tmp_path / "config.json").write_text(json.dumps(config))
    then = load_hf(tmp_path)
    assert now[0] == then[0]
    assert jax.tree.structure(now[1]) == jax.tree.structure(then[1])
    jax.tree.map(np.testing.assert_array_equal, now[1], then[1])


def test_float_folders_are_read_alike(tmp_path, model, params):
    save_huggingface(tmp_path, params, model.config.to_hf() | {"torch_dtype": "float32"}, format="float")
    config, ours = load_hf(tmp_path)
    theirs, _ = load_huggingface(tmp_path)
    assert config == model.config
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
