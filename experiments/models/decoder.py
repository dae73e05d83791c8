"""A decoder of the Llama family in plain Flax; Llama, Mistral, Qwen2, Qwen3, Mixtral: all by config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

import jaxquant as jq
from experiments.models.config import DecoderConfig
from experiments.models.moe import MoE

Params = dict[str, Any]


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed capacity S.

    `key` and `value` hold one array [B, KH, S, D] for each layer, as the products of attention read them; `length`
    (int32 scalar) tokens of them are filled, the same number in each sequence. Nothing can check a traced length: the
    caller keeps it within the capacity.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    length: jax.Array


AnyCache = KVCache | tuple[jq.KVCache, ...]  # the second: one for each layer, quantized, of any lengths


class RMSNorm(nn.Module):
    """Divides each row by its root mean square, in float32, and scales it."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale.astype(self.dtype), tuple(range(x.ndim - 1)))
        return normed.astype(self.dtype) * scale


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, over the sequence itself or over a cache."""

    config: DecoderConfig
    window: int | None
    dtype: Any
    param_dtype: Any
    implementation: str | Callable

    @nn.compact
    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], cache: jq.KVCache | tuple[jax.Array, ...] | None
    ) -> tuple[jax.Array, Any]:
        c = self.config
        query = self._heads("q_proj", x, c.num_attention_heads)
        key = self._heads("k_proj", x, c.num_key_value_heads)
        value = self._heads("v_proj", x, c.num_key_value_heads)
        if c.qk_norm:
            query = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name="q_norm")(query)
            key = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name="k_norm")(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is None:
            mixed = attend_within(query, key, value, self.window, self.implementation)
            kept = key, value
        elif isinstance(cache, jq.KVCache):
            mixed, kept = attend_quantized(query, key, value, cache, self.window)
        else:
            mixed, *kept = attend_cached(query, key, value, cache, self.window)
        mixed = mixed.reshape(*x.shape[:-1], c.num_attention_heads * c.head_dim)
        return self._dense("o_proj", c.hidden_size, c.o_bias)(mixed), kept

    def _heads(self, name: str, x: jax.Array, heads: int) -> jax.Array:
        projected = self._dense(name, heads * self.config.head_dim, self.config.qkv_bias)(x)
        return projected.reshape(*x.shape[:-1], heads, self.config.head_dim)

    def _dense(self, name: str, features: int, use_bias: bool) -> nn.Dense:
        return nn.Dense(features, use_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class MLP(nn.Module):
    """The gated feed-forward layer down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self._dense("gate_proj", self.config.intermediate_size)(x)
        up = self._dense("up_proj", self.config.intermediate_size)(x)
        return self._dense("down_proj", self.config.hidden_size)(nn.silu(gate) * up)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, self.config.mlp_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class Block(nn.Module):
    """One layer: attention, then the feed-forward layer or the experts, each added to the residual stream."""

    config: DecoderConfig
    window: int | None
    dtype: Any
    param_dtype: Any
    implementation: str | Callable
    experts: str

    @nn.compact
    def __call__(self, x, rotation, cache):
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        attention = Attention(c, self.window, *dtypes, self.implementation, name="self_attn")
        mixed, cache = attention(RMSNorm(c.rms_norm_eps, *dtypes, name="input_layernorm")(x), rotation, cache)
        x = x + mixed
        normed = RMSNorm(c.rms_norm_eps, *dtypes, name="post_attention_layernorm")(x)
        if c.experts is None:
            return x + MLP(c, *dtypes, name="mlp")(normed), cache
        return x + MoE(c, *dtypes, self.experts, name="moe")(normed), cache


class Decoder(nn.Module):
    """A causal language model; its `forward`, `prefill` and `decode_step` are pure functions of a parameter tree.

    Attributes:
        config: the architecture.
        dtype: dtype of the activations and products; norms, softmax and logits are float32 regardless.
        param_dtype: dtype of parameters made by `init_params` (a checkpoint's parameters keep their own).
        implementation: of the attention in `forward`: "xla", "cudnn" (bfloat16 on a GPU), or a function called as
            `jaxquant.attention` is.
        experts: the form of a mixture's products, "ragged" or "dense" (see `MoE`).

    >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                        num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    >>> model = Decoder(config)
    >>> params = model.init_params(jax.random.key(0))
    >>> model.forward(params, jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 32)
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | Callable = "xla"
    experts: str = "ragged"

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: AnyCache | None = None) -> tuple[jax.Array, AnyCache | None]:
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        start = _filled(cache).reshape(-1, 1)
        rotation = rotations(c, start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])
        embed = nn.Embed(c.vocab_size, c.hidden_size, *dtypes, nn.initializers.normal(0.02), name="embed_tokens")
        x, filled = embed(tokens), []
        for layer, window in enumerate(c.layer_windows):
            block = Block(c, window, *dtypes, self.implementation, self.experts, name=f"layers_{layer}")
            x, kv = block(x, rotation, _of_layer(cache, layer))
            filled.append(kv)
        if cache is not None:
            x = x[:, -1:]  # a cache is for generation, which reads the last token's logits only
            cache = _joined(cache, filled, tokens.shape[1])
        x = RMSNorm(c.rms_norm_eps, *dtypes, name="norm")(x)
        if c.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(c.vocab_size, use_bias=False, dtype=dtypes[0], param_dtype=dtypes[1], name="lm_head")(x)
        return logits.astype(jnp.float32), cache

    @nn.nowrap
    def init_params(self, key: jax.Array) -> Params:
        """Returns random parameters of dtype `param_dtype`."""
        return self.clone(implementation="xla").init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    @nn.nowrap
    def init_cache(self, batch: int, capacity: int, format: str | None = None) -> AnyCache:
        """Returns an empty cache for `batch` sequences of at most `capacity` tokens, prompt and answer together.

        With a `format` of `jaxquant.KVCache` it is quantized; its capacity is then a multiple of 64.
        """
        c = self.config
        if format is not None:
            sizes = batch, -(-capacity // 64) * 64, c.num_key_value_heads, c.head_dim
            return tuple(jq.KVCache.init(*sizes, format=format, dtype=self.dtype) for _ in c.layer_windows)
        shape = (batch, c.num_key_value_heads, capacity, c.head_dim)
        key, value = (tuple(jnp.zeros(shape, self.dtype) for _ in c.layer_windows) for _ in range(2))
        return KVCache(key, value, jnp.int32(0))

    @nn.nowrap
    def forward(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Returns the logits [B, T, vocab] (float32) after each of the int tokens [B, T]."""
        return self.apply({"params": params}, tokens)[0]

    @nn.nowrap
    def prefill(self, params: Params, tokens: jax.Array, cache: AnyCache) -> tuple[jax.Array, AnyCache]:
        """Appends the int tokens [B, T] to the cache; returns the last one's logits [B, vocab] and the cache."""
        logits, cache = self.apply({"params": params}, tokens, cache)
        return logits[:, 0], cache

    @nn.nowrap
    def decode_step(self, params: Params, token: jax.Array, cache: AnyCache) -> tuple[jax.Array, AnyCache]:
        """Appends one int token [B] to the cache; returns its logits [B, vocab] and the cache."""
        return self.prefill(params, token[:, None], cache)


def rotations(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines [B, T, D/2] (float32) of the rotary angles at int positions [B, T]; B may be 1.

    References:
        Su et al., RoFormer, 2021, arXiv:2104.09864; Grattafiori et al., The Llama 3 Herd of Models, 2024,
        arXiv:2407.21783 (the stretched frequencies).
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if (s := config.rope_scaling) is not None:
        turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
        short = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        frequency = frequency * (short + (1 - short) / s.factor)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + D/2]) of heads [B, T, H, D] by their position's angles, in float32."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend_within(query, key, value, window: int | None, implementation: str | Callable) -> jax.Array:
    """Returns causal attention [B, T, H, D] of a whole sequence over itself."""
    if callable(implementation):
        return implementation(query, key, value, causal=True, **({} if window is None else {"window": (window - 1, 0)}))
    if implementation == "xla":
        at = jnp.arange(query.shape[1], dtype=jnp.int32)
        return attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), _visible(at, at, window)[None])
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=local, implementation=implementation
    )


def attend_cached(query, key, value, cache: tuple[jax.Array, ...], window: int | None):
    """Writes key and value [B, T, KH, D] into the cache; returns attention over it and the new cache arrays."""
    *cached, start = cache
    zero = jnp.zeros_like(start)
    key, value = (
        jax.lax.dynamic_update_slice(held, jnp.swapaxes(new, 1, 2).astype(held.dtype), (zero, zero, start, zero))
        for held, new in zip(cached, (key, value), strict=True)
    )
    at = start + jnp.arange(query.shape[1], dtype=jnp.int32)
    slot = jnp.arange(key.shape[2], dtype=jnp.int32)
    mixed = attend(query, key.astype(query.dtype), value.astype(query.dtype), _visible(at, slot, window)[None])
    return mixed, key, value


def attend_quantized(query, key, value, cache: jq.KVCache, window: int | None) -> tuple[jax.Array, jq.KVCache]:
    """Appends key and value [B, T, KH, D] to a quantized cache; returns attention over it and the new cache.

    One token is attended to by the decode kernel, several over the cache dequantized, themselves included.
    """
    if window is not None:
        raise NotImplementedError(f"a quantized cache attends to all tokens, this layer to the last {window} of them")
    start, cache = cache.lengths, cache.append(key, value)
    if query.shape[1] == 1:
        return cache.attend(query[:, 0])[:, None], cache
    at = start[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    visible = at[:, :, None] >= jnp.arange(cache.capacity, dtype=jnp.int32)[None, None]
    key, value = cache.dequantize(query.dtype)
    return attend(query, key, jnp.swapaxes(value, 2, 3), visible), cache


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """Returns attention [B, T, H, D] of queries over keys and values [B, KH, S, D] where `visible` is True.

    `visible` is [B, T, S]; its B may be 1. Scores and softmax are float32. (`jax.nn.dot_product_attention` does the
    same, but not in bfloat16 under `jax_numpy_dtype_promotion="strict"`.)
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[1], heads // key.shape[1], head_dim)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, key, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bksd->btkgd", weights.astype(value.dtype), value)
    return mixed.reshape(query.shape)


def _visible(query_at: jax.Array, key_at: jax.Array, window: int | None) -> jax.Array:
    distance = query_at[:, None] - key_at[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _filled(cache: AnyCache | None) -> jax.Array:
    """Tokens in a cache: one number, or one of each sequence."""
    if cache is None:
        return jnp.int32(0)
    return cache.length if isinstance(cache, KVCache) else cache[0].lengths


def _of_layer(cache: AnyCache | None, layer: int):
    if not isinstance(cache, KVCache):
        return None if cache is None else cache[layer]
    return cache.key[layer], cache.value[layer], cache.length


def _joined(cache: AnyCache, filled: list, tokens: int) -> AnyCache:
    """The caches of all layers after `tokens` more."""
    if not isinstance(cache, KVCache):
        return tuple(filled)
    key, value = zip(*filled, strict=True)
    return KVCache(key, value, cache.length + tokens)
