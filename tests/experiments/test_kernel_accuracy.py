import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments import kernel_accuracy
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder


def test_two_draws_of_the_same_noise_pass_and_a_loss_does_not(rng):
    xla = rng.gamma(9.0, 1e-3, 64)  # of 0.009 a sequence, a third of it the spread
    kernel = xla[::-1]
    assert kernel_accuracy.verdict(xla, kernel)["ok"]
    # The bound is 4 sqrt(2 * 9 / 64) 1e-3 = 0.0021: half as much again is beyond it.
    assert not kernel_accuracy.verdict(xla, kernel + 0.0045)["ok"]


def test_both_forms_of_a_model_are_compared(rng):
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = Decoder(config, dtype=jnp.float32)
    params = model.init_params(jax.random.key(int(rng.integers(2**31))))
    qparams = jq.quantize(params, jq.QuantConfig.preset("w8a8"))
    row = kernel_accuracy.compare(model, params, qparams, rng.integers(0, 32, (16, 9)).astype(np.int32))
    assert row["launches"] == 0  # of a kernel, on a CPU
    assert row["kl_xla"] > 0
    # Of the same codes: the forms differ by ties that rounding moves, and by the grids of activations.
    assert row["kl_between"] <= 2 * (row["kl_xla"] + row["kl_kernel"])
