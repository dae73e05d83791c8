"""The mixture-of-experts feed-forward layer of Mixtral and Qwen3-MoE, in plain Flax."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.config import DecoderConfig

# the gate, up and down projections, as each family calls them
_NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


class ExpertDense(nn.Module):
    """One matrix for each of `count` experts: the rows of an expert, or all rows, times it."""

    count: int
    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array | None) -> jax.Array:
        """Multiplies rows [M, K] sorted by expert, `sizes` [E] of each; or, without sizes, each expert's [E, T, K]."""
        shape = (self.count, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=(0,)), shape, self.param_dtype)
        kernel = kernel.astype(self.dtype)
        if sizes is None:
            return jnp.einsum("etk,ekn->etn", x, kernel)
        return jax.lax.ragged_dot(x, kernel, sizes)


class MoE(nn.Module):
    """Sends each token to its `per_token` likeliest experts and adds their outputs, weighted by the router.

    Two forms of one function. "ragged" sorts the rows by expert and multiplies each by its own expert's matrices.
    "dense" gives every row to every expert and weighs most of the results by zero: more arithmetic, no gathers, and a
    gradient that XLA computes fast, so small models train in it. The router's logits [tokens, E] are sown as
    ("router", "logits").
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    form: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts = self.config.experts
        rows = x.reshape(-1, x.shape[-1])
        router = nn.Dense(experts.count, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name="router")
        logits = router(rows).astype(jnp.float32)
        self.sow("router", "logits", logits)
        weight, chosen = route(logits, experts.per_token, experts.normalised)
        weight = weight.astype(self.dtype)
        return (self._dense if self.form == "dense" else self._ragged)(rows, weight, chosen).reshape(x.shape)

    def _ragged(self, rows: jax.Array, weight: jax.Array, chosen: jax.Array) -> jax.Array:
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.config.experts.count)
        out = self._experts(rows[order // chosen.shape[1]], sizes)
        out = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return jnp.sum(out * weight[:, :, None], axis=1)

    def _dense(self, rows: jax.Array, weight: jax.Array, chosen: jax.Array) -> jax.Array:
        count = self.config.experts.count
        gates = jnp.sum(jax.nn.one_hot(chosen, count, dtype=weight.dtype) * weight[:, :, None], axis=1)
        out = self._experts(jnp.broadcast_to(rows, (count, *rows.shape)), None)
        return jnp.einsum("te,etd->td", gates, out)

    def _experts(self, x: jax.Array, sizes: jax.Array | None) -> jax.Array:
        experts, hidden_size = self.config.experts, self.config.hidden_size

        def product(name: str, features: int, x: jax.Array) -> jax.Array:
            return ExpertDense(experts.count, features, self.dtype, self.param_dtype, name=name)(x, sizes)

        gate, up, down = _NAMES[self.config.model_type]
        hidden = nn.silu(product(gate, experts.intermediate_size, x)) * product(up, experts.intermediate_size, x)
        return product(down, hidden_size, hidden)


def route(logits: jax.Array, per_token: int, normalised: bool) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's likeliest experts.

    Args:
        logits: float32 [T, E].
        per_token: k.
        normalised: whether the k probabilities are scaled to add up to one.

    Returns:
        (weights float32 [T, k], experts int32 [T, k]), the likeliest first.
    """
    weight, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), per_token)
    return (weight / jnp.sum(weight, axis=-1, keepdims=True) if normalised else weight), chosen


def load_imbalance(logits: jax.Array, per_token: int) -> jax.Array:
    """Measures how unevenly a router spreads its tokens: 1 where all experts get as many, E where one gets all.

    Args:
        logits: float32 [T, E].
        per_token: experts of a token.

    Returns:
        E times the sum over experts of (share of the choices) x (mean probability), differentiable by the latter.

    References:
        Fedus et al., Switch Transformers, 2021, arXiv:2101.03961, equation 4.
    """
    count = logits.shape[-1]
    _, chosen = route(logits, per_token, False)
    share = jnp.mean(jax.nn.one_hot(chosen, count, dtype=jnp.float32), axis=(0, 1))
    return count * jnp.sum(share * jnp.mean(jax.nn.softmax(logits, axis=-1), axis=0))
