"""Writes tiny random models of each family with the logits that `transformers` gives for them.

Needs torch and transformers, in an environment of their own; the tests read only what this wrote:

    python experiments/oracles/make_decoder_goldens.py tests/experiments/fixtures/decoder [family ...]

Made with torch 2.13.0 and transformers 5.24.0, in float32 on a CPU, with eager attention.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # wide enough for attention to choose between tokens
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "tie_word_embeddings": False},
    ),
    "llama_bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        EXPERTS | {"norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe_raw": (transformers.Qwen3MoeConfig, EXPERTS | {"norm_topk_prob": False}),
}


def randomize(model: torch.nn.Module) -> None:
    """Moves biases and norm scales off the zeros and ones of initialization, which would hide a missing one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def write(family: str, folder: pathlib.Path) -> None:
    """Writes one family's model folder and golden.npz: tokens [2, 24] and logits [2, 24, vocab]."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(sum(family.encode()))
    config = kind(**(SHAPE | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 24))
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "golden.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    for name in sys.argv[2:] or FAMILIES:
        write(name, pathlib.Path(sys.argv[1]) / name)
