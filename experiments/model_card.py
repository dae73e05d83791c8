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
# A {millions:.1f}M-parameter Llama of Python source

A language model small enough to be a test fixture, trained only to have real weights to quantize.

| | |
| --- | --- |
| architecture | {model_type}, {layers} layers, hidden {hidden}, MLP {mlp}, {heads} heads over {kv_heads} of key and value, vocabulary {vocab}, context {context} |
| parameters | {parameters}, bfloat16 |
| data | sources and documentation of the Python standard library ({origin}), {training_tokens} distinct training tokens, held-out split by file ({held_out_bytes} bytes; copies of held-out files in other versions dropped) |
| training | {steps} steps, {tokens_seen} tokens seen ({per_parameter:.0f} a parameter), {seconds} s on one {device} |
| held-out loss | {held_out_loss:.4f} nats per token, **{held_out_bits_per_byte:.4f} bits per byte** |
| licence | weights and token arrays derive from the Python standard library: PSF License Version 2 |

Made by `python -m experiments.train_lm`; `loss_curve.json` has the held-out loss over the run. `calibration.npy` (training
files) and `evaluation.npy` (held-out files) hold uint16 tokens [sequences, T+1].

## Samples (temperature 0.7)

{samples}
"""


def model_card(config: DecoderConfig, record: dict[str, Any], origin: str, samples: Sequence[str]) -> str:
    """Returns the text of the card: data, steps, held-out bits per byte, licence and samples."""
    return _CARD.format(
        **record,
        millions=record["parameters"] / 1e6,
        per_parameter=record["tokens_seen"] / record["parameters"],
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        origin=origin,
        samples="\n\n".join(f"~~~python\n{text}\n~~~" for text in samples),
    )
