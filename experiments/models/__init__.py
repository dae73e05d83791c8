"""Reference language models in plain Flax, and the reading and writing of Hugging Face folders."""

from experiments.models.config import DecoderConfig, Experts, Llama3Scaling
from experiments.models.decoder import Decoder, KVCache
from experiments.models.generate import generate
from experiments.models.hf import load_hf, save_hf

__all__ = ["Decoder", "DecoderConfig", "Experts", "KVCache", "Llama3Scaling", "generate", "load_hf", "save_hf"]
