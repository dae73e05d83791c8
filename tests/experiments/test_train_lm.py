"""Training in miniature: a folder that the rest of the experiments can use, from a model that has learnt something."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments import train_lm
from experiments.data import Corpus
from experiments.models import Experts, load_hf

MICRO = dataclasses.replace(
    train_lm.RECIPES["tiny"],
    config=dataclasses.replace(
        train_lm.RECIPES["tiny"].config,
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
    ),
    batch=4,
    steps=2 * train_lm.CHUNK,
)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    steps = jnp.int32(500)
    rates = [float(train_lm.learning_rate(jnp.int32(s), steps, 1e-3)) for s in (0, 49, 99, 300, 499, 500, 700)]
    assert rates[0] == pytest.approx(1e-3 / train_lm.WARMUP)
    assert rates[1] == pytest.approx(5e-4)
    assert rates[2] == pytest.approx(1e-3)
    assert rates[3] == pytest.approx(5e-4)  # half of the cosine
    assert rates[4] < 1e-6
    assert rates[5:] == [0, 0]


def test_held_out_windows_take_all_but_a_remainder():
    windows = train_lm.held_out_windows(np.arange(2 * 8 * 5 + 3, dtype=np.uint16), 4)
    np.testing.assert_array_equal(windows.reshape(-1), np.arange(80))
    with pytest.raises(ValueError, match="held_out_tokens: 39 are fewer than one batch of 40"):
        train_lm.held_out_windows(np.zeros(39, np.uint16), 4)


EXPERTS = {"model_type": "mixtral", "experts": Experts(count=4, per_token=2, intermediate_size=64)}


@pytest.mark.usefixtures("lenient_jax")  # optax multiplies floats with integers
@pytest.mark.parametrize("kind", [{}, EXPERTS], ids=["dense", "experts"])
def test_a_micro_run_writes_a_model_that_has_learnt(tmp_path, monkeypatch, kind):
    recipe = dataclasses.replace(MICRO, config=dataclasses.replace(MICRO.config, **kind))
    monkeypatch.setattr(train_lm, "EVALUATION", (4, 33))
    monkeypatch.setattr(train_lm, "CALIBRATION", (4, 33))
    monkeypatch.setattr(train_lm, "PROMPTS", ("def ",))
    text = "def f(x):\n    return x + 1\n"
    corpus = Corpus([text * 40 + f"# {i}\n" for i in range(4)], [text * 60])
    record = train_lm.train_and_save(recipe, corpus, tmp_path, "a test", seconds=float("inf"), implementation="xla")
    first, last = record["curve"][0], record["curve"][-1]
    assert last["step"] == record["steps"] == MICRO.steps
    assert last["held_out_loss"] < first["held_out_loss"] < np.log(264)
    assert record["tokens_seen"] == MICRO.steps * MICRO.batch * 32
    if kind:  # every expert is used, and the shares are of all choices
        assert np.min(record["expert_shares"]) > 0
        np.testing.assert_allclose(np.sum(record["expert_shares"], axis=1), 1, atol=4 * 5e-5)  # rounded to 1e-4
    assert record == json.loads((tmp_path / "loss_curve.json").read_text())

    config, params = load_hf(tmp_path)
    assert config == recipe.config
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() <= 264
    card = (tmp_path / "README.md").read_text()
    assert all(words in card for words in ("a test", f"{MICRO.steps} steps", "bits per byte", "~~~python\ndef "))


@pytest.mark.parametrize("name", train_lm.RECIPES)
def test_recipes_train_at_the_whole_context(name):
    recipe = train_lm.RECIPES[name]
    assert recipe.context == 2048
    assert recipe.steps % train_lm.CHUNK == 0
