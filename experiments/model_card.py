"""The README of a trained model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.models import DecoderConfig

_CARD = """\
---
license: psf-2.0
language: code
library_name: jaxquant
---
# A {millions:.1f}M-parameter {family} of Python source

A language model small enough to be a test fixture, trained only to have real weights to quantize.

| | |
| --- | --- |
| architecture | {architecture} |
| parameters | {parameters}, bfloat16 |
| data | {data} |
| training | {training} |
| held-out loss | {held_out_loss:.4f} nats per token, **{held_out_bits_per_byte:.4f} bits per byte** |
| licence | weights and token arrays derive from the Python standard library: PSF License Version 2 |

Made by `python -m experiments.train_lm`; `loss_curve.json` has the held-out loss over the run.
`calibration.npy` (training files) and `evaluation.npy` (held-out files) hold uint16 tokens [sequences, T+1].

## Samples (temperature 0.7)

{samples}
"""


def model_card(config: DecoderConfig, record: dict[str, Any], origin: str, samples: Sequence[str]) -> str:
    """Returns the text of the card: data, steps, held-out bits per byte, licence and samples."""
    experts = config.experts
    feed_forward = f"MLP {config.intermediate_size}"
    if experts is not None:
        feed_forward = f"{experts.count} experts of {experts.intermediate_size}, {experts.per_token} a token"
    architecture = (
        f"{config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{feed_forward}, {config.num_attention_heads} heads over {config.num_key_value_heads} of key "
        f"and value, vocabulary {config.vocab_size}, context {config.max_position_embeddings}"
    )
    data = (
        f"sources and documentation of the Python standard library ({origin}), {record['training_tokens']} distinct "
        f"training tokens; held-out split by file ({record['held_out_bytes']} bytes), copies of held-out files in "
        "other versions dropped from training"
    )
    training = (
        f"{record['steps']} steps, {record['tokens_seen']} tokens seen "
        f"({record['tokens_seen'] / record['parameters']:.0f} a parameter), {record['seconds']} s on one "
        f"{record['device']}"
    )
    return _CARD.format(
        **record,
        millions=record["parameters"] / 1e6,
        family="Llama" if experts is None else "Mixtral",
        architecture=architecture,
        data=data,
        training=training,
        samples="\n\n".join(f"~~~python\n{text}\n~~~" for text in samples),
    )
