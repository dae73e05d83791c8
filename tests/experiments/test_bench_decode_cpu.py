"""The bench of a decode step times what it names."""

import jax

from experiments.bench_decode_cpu import measure
from experiments.models import Decoder, DecoderConfig


def test_a_row_for_each_preset():
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    model = Decoder(config)
    rows = measure(model, jax.jit(model.init_params)(jax.random.key(0)), ("w4a16",), rounds=2, steps=2)
    assert [row["recipe"] for row in rows] == ["w4a16"]
    assert rows[0]["ratio"] == rows[0]["milliseconds"] / rows[0]["float32_milliseconds"] > 0
