"""Text generation with a fixed-capacity cache, as one compiled loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.decoder import Decoder, Params

PROMPT = 64  # tokens of a sequence that a continuation starts from


def generate(
    model: Decoder,
    params: Params,
    prompt: jax.Array,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    cache_format: str | None = None,
) -> jax.Array:
    """Continues each prompt by `max_new_tokens` tokens.

    Pure, so `jax.jit(generate, static_argnums=(0, 3, 4), static_argnames="cache_format")` compiles prompt and loop as
    one program.

    Args:
        model: the architecture and compute dtype.
        params: the model's parameters.
        prompt: int tokens [B, P], P >= 1.
        max_new_tokens: how many tokens to add to each.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        key: a jax.random key, needed where temperature > 0.
        cache_format: of `jaxquant.KVCache`, to keep keys and values quantized; None keeps them in the model's dtype.

    Returns:
        int32 tokens [B, P + max_new_tokens].

    Raises:
        ValueError: max_new_tokens < 1, an empty prompt, or temperature > 0 without a key.

    >>> from experiments.models.config import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                               num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    >>> params = model.init_params(jax.random.key(0))
    >>> generate(model, params, jnp.ones((2, 3), jnp.int32), 4).shape
    (2, 7)
    """
    if max_new_tokens < 1 or prompt.shape[1] < 1:
        raise ValueError(f"generate: needs a prompt and max_new_tokens >= 1, got {prompt.shape}, {max_new_tokens}")
    if temperature > 0 and key is None:
        raise ValueError("key: temperature > 0 draws tokens and needs a jax.random key")
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_new_tokens)

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)

    def step(carry, key):
        token, cache = carry
        logits, cache = model.decode_step(params, token, cache)
        token = choose(logits, key)
        return (token, cache), token

    batch, length = prompt.shape
    logits, cache = model.prefill(params, prompt, model.init_cache(batch, length + max_new_tokens, cache_format))
    first = choose(logits, keys[0])
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([prompt.astype(jnp.int32), first[:, None], rest.T], axis=1)


def continue_text(model: Decoder, params: Params, sequences: np.ndarray, count: int) -> list[np.ndarray]:
    """Has the model continue excerpts of calibration sequences: text of its own, on which it can be imitated.

    Args:
        model: the architecture and compute dtype.
        params: the float model's parameters.
        sequences: int tokens [S, T].
        count: how many continuations of each; each starts from another excerpt, a quarter of T long or 64 tokens.

    Returns:
        `count` arrays of int32 tokens [S, T], drawn at temperature 1; the same ones in every call.
    """
    length = sequences.shape[1]
    prompt = min(PROMPT, length // 4)
    run = jax.jit(generate, static_argnums=(0, 3, 4))
    starts = [prompt * n % (length - prompt + 1) for n in range(count)]
    return [
        np.asarray(run(model, params, sequences[:, at : at + prompt], length - prompt, 1.0, jax.random.key(n)))
        for n, at in enumerate(starts)
    ]
