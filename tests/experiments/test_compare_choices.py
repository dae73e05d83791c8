"""Choices of recipes: every trial is an order, and the comparison is the KL it says."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments.compare_choices import TABLES, divergences, measure
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder


def test_every_trial_is_an_order_with_a_name_of_its_own():
    for table, trials in TABLES.items():
        listed = list(trials())
        assert len({trial.name for trial in listed}) == len(listed)
        assert {trial.table for trial in listed} == {table}
        for trial in listed:
            if "allocated" not in trial.name:
                assert isinstance(trial.config(None, None, None), jq.QuantConfig)


def test_divergence_is_the_mean_over_tokens(rng):
    logits = {"a": rng.normal(size=(7, 5)), "b": rng.normal(size=(7, 5))}
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits.values())
    expected = (p * np.log(p / q)).sum(-1)
    tokens = rng.integers(0, 7, (3, 4))
    look_up = lambda params, inputs: params[inputs]  # noqa: E731
    tables = [jnp.asarray(x.astype(np.float32)) for x in logits.values()]
    got = divergences(look_up, look_up, *tables, tokens)
    np.testing.assert_allclose(got, expected[tokens[:, :-1]].mean(1), rtol=1e-5)
    np.testing.assert_allclose(jq.logit_divergence(*tables), expected.mean(), rtol=1e-5)


def test_a_trial_gives_a_row(rng):
    config = DecoderConfig(vocab_size=32, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=64)  # fmt: skip
    model = Decoder(config)
    params = jax.jit(model.init_params)(jax.random.key(int(rng.integers(2**31))))
    tokens = rng.integers(0, 32, (4, 9))
    trial = next(trial for trial in TABLES["mixed"]() if trial.name == "rtn, 4 bits each")
    row = measure(trial, model, model.forward, params, tokens[:2], tokens[2:])
    assert row["bits"] == 4.125
    assert 0 < row["kl"] < np.log(32)
