"""Attention with 8-bit products, called as the attention modules of Flax call theirs."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant._kernels import attention as quantized_attention


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    query_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    scale: float | None = None,
    mode: str = "auto",
    implementation: str | None = None,
    is_causal: bool = False,
    dtype: Any = None,
    precision: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    module: Any = None,
) -> jax.Array:
    """Computes softmax attention with 8-bit products; may be the `attention_fn` of linen's and nnx's attention modules.

    Keys are smoothed by their mean over tokens, which softmax cannot see; queries are quantized per token, keys per
    block of tokens, values per channel, and the softmax weights by a fixed scale. The softmax itself is float32. The
    gradient is that of attention on the unquantized operands.

    Args:
        q: queries [B, T, N, H], floating point.
        k: keys [B, S, K, H], K a divisor of N (grouped queries), of q's dtype.
        v: values [B, S, K, H], of q's dtype. Values at masked positions must be finite.
        bias: added to the scores before softmax, broadcastable to [B, N, T, S]; XLA implementation only.
        mask: True (or, as Flax makes them, not 0) where a query sees a key, broadcastable to [B, N, T, S]; XLA
            implementation only.
        causal: whether query t sees only keys up to t.
        window: keys visible to the left and right of query t, as one number or a pair; None is unbounded.
        query_lengths: valid queries of each batch entry, int [B]; the others' outputs are zero. Clamped to T.
        kv_lengths: valid keys of each batch entry, int [B]. Clamped to S.
        scale: the softmax scale, positive; 1 / sqrt(H) by default.
        mode: formats of the two products. "int8_fp8": int8 scores, e4m3 weights and values; "int8_f16": int8 scores,
            the second product in v's own 16-bit format; "fp8": e4m3 in both; "int8_int8": int8 in both; "f16_fp8":
            scores of 16-bit q and k (for H up to 64 they are float16 themselves, of smoothed keys), e4m3 weights and
            values. "auto" is the faster of "int8_fp8" (H > 64, queries that see 4096 keys) and "f16_fp8".
        implementation: "mosaic_gpu" (a Hopper GPU; never falls back), "xla" (any device), or None: the kernel on a GPU
            where it supports the call, XLA elsewhere. The kernel takes bfloat16 and float16 and head dimensions up to
            128; those below 64 and 128 are padded with zeros.
        is_causal: another name of `causal`: nnx's.
        dtype: what q, k and v are converted to, by default to what they are together promoted to.
        precision: ignored: the formats of the products are those of `mode`.
        broadcast_dropout: ignored.
        dropout_rng: ignored.
        dropout_rate: 0, or `deterministic`: weights are not dropped.
        deterministic: whether dropout is off.
        module: None: weights are not sown.

    Returns:
        [B, T, N, H] of `dtype`. A query that sees no key gives zeros.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or weights are to be dropped or sown.
        NotImplementedError: if implementation="mosaic_gpu" cannot compute this call; the message says why.

    References:
        Zhang et al., SageAttention (2024), arXiv:2410.02367; SageAttention2 (2024), arXiv:2411.10958.
        Shah et al., FlashAttention-3 (2024), arXiv:2407.08608.

    Example:
        >>> import flax.linen as nn
        >>> model = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention)
        >>> x = jax.random.normal(jax.random.key(0), (1, 8, 32))
        >>> variables = model.init(jax.random.key(1), x)
        >>> model.apply(variables, x, mask=nn.make_causal_mask(x[..., 0])).shape
        (1, 8, 32)
    """
    del precision, broadcast_dropout, dropout_rng
    if dropout_rate and not deterministic:
        raise ValueError(f"attention does not drop weights, got dropout_rate={dropout_rate} and deterministic=False")
    if module is not None:
        raise ValueError("attention does not sow its weights: they never are in memory; got a module to sow them in")
    dtype = jnp.result_type(q, k, v) if dtype is None else dtype
    return quantized_attention(
        *(x.astype(dtype) for x in (q, k, v)),
        bias=bias,
        mask=None if mask is None else mask.astype(bool),
        causal=causal or is_causal,
        window=window,
        query_lengths=query_lengths,
        kv_lengths=kv_lengths,
        scale=scale,
        mode=mode,
        implementation=implementation,
    )
