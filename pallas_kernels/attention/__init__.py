"""Quantized attention: both products of softmax attention on 8-bit operands, after SageAttention."""

import dataclasses
import functools
import math
import numbers

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._device import wrong_generation
from pallas_kernels.attention.config import Config, default_config, padded_head_dim, supports
from pallas_kernels.attention.mosaic_gpu import quantized_attention
from pallas_kernels.attention.quantize import F16
from pallas_kernels.attention.quantize_mosaic_gpu import (
    quantize_keys_mosaic_gpu,
    quantize_values_mosaic_gpu,
    smooth_keys_mosaic_gpu,
)
from pallas_kernels.attention.reference import (
    MODES,
    Masking,
    Window,
    attention_reference,
    auto_mode,
    formats,
    visible,
)

__all__ = ["MODES", "Config", "attention", "default_config", "supports"]

REFERENCE_BLOCK = 128
TMA_ROWS = 8  # tokens come in multiples of a shared-memory tile's rows


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one call."""

    window: Window
    scale: float
    mode: str
    implementation: str | None
    config: Config


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    query_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    scale: float | None = None,
    mode: str = "auto",
    implementation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Computes softmax attention with 8-bit products.

    Keys are smoothed by their mean over tokens, which softmax cannot see; queries are quantized per token, keys per
    block of tokens, values per channel and block, and the softmax weights by a fixed scale. The softmax itself is
    float32. The gradient is that of attention on the unquantized operands.

    Args:
        q: queries [B, T, N, H], floating point.
        k: keys [B, S, K, H], K a divisor of N (grouped queries), of q's dtype.
        v: values [B, S, K, H], of q's dtype. Values at masked positions must be finite.
        bias: added to the scores before softmax, broadcastable to [B, N, T, S]; XLA implementation only.
        mask: boolean, True where a query sees a key, broadcastable to [B, N, T, S]; XLA implementation only.
        causal: whether query t sees only keys up to t.
        window: keys visible to the left and right of query t, as one number or a pair; None is unbounded.
        query_lengths: valid queries of each batch entry, int [B]; the others' outputs are zero. Clamped to T.
        kv_lengths: valid keys of each batch entry, int [B]. Clamped to S.
        scale: the softmax scale; 1 / sqrt(H) by default.
        mode: formats of the two products. "int8_fp8": int8 scores, e4m3 weights and values; "int8_f16": int8 scores,
            the second product in v's own 16-bit format; "fp8": e4m3 in both; "int8_int8": int8 in both; "f16_fp8":
            scores of 16-bit q and k (for H up to 64 they are float16 themselves, of smoothed keys), e4m3 weights and
            values. "auto" is the faster of "int8_fp8" (H > 64, queries that see 4096 keys) and "f16_fp8".
        implementation: "mosaic_gpu" (a Hopper GPU; never falls back), "xla" (any device), or None: the kernel on a GPU
            where it supports the call, XLA elsewhere.
        config: tile shapes of the kernel; the default suits most calls.

    Returns:
        [B, T, N, H] of q's dtype. A query that sees no key gives zeros.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
        NotImplementedError: if implementation="mosaic_gpu" cannot compute this call; the message says why.

    References:
        Zhang et al., SageAttention (2024), arXiv:2410.02367; SageAttention2 (2024), arXiv:2411.10958.
        Shah et al., FlashAttention-3 (2024), arXiv:2407.08608.

    Example:
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 64))
        >>> attention(q, k, v, causal=True).shape
        (1, 64, 2, 64)
    """
    masking = Masking(bias, mask, query_lengths, kv_lengths)
    _check(q, k, v, masking, mode, implementation)
    sides = _window(window, causal, q.shape[1], k.shape[1])
    if mode == "auto":
        mode = auto_mode(q.shape[3], k.shape[1], sides)
    if config is None:
        config = default_config(q.shape[3], mode)
    reason = wrong_generation() or supports(q, k, v, masking, mode, config)
    if implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"implementation='mosaic_gpu': {reason}")
    if implementation is None and reason is not None:
        implementation = "xla"
    softmax_scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    call = _Call(sides, softmax_scale, mode, implementation, config)
    masking = masking._replace(
        query_lengths=_clamped(query_lengths, q.shape[1]), kv_lengths=_clamped(kv_lengths, k.shape[1])
    )
    return _attention(call, (q, k, v), masking)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, qkv: tuple[jax.Array, jax.Array, jax.Array], masking: Masking) -> jax.Array:
    xla, kernel = functools.partial(_xla, call), functools.partial(_mosaic_gpu, call)
    if call.implementation is None:
        return lax.platform_dependent(qkv, masking, cuda=kernel, default=xla)
    return (xla if call.implementation == "xla" else kernel)(qkv, masking)


def _forward(call, qkv, masking):
    return _attention(call, qkv, masking), (qkv, masking)


def _backward(call, residuals, cotangent):
    qkv, masking = residuals
    shape = (qkv[0].shape[0], qkv[0].shape[2], qkv[0].shape[1], qkv[1].shape[1])
    mask = visible(masking, call.window, shape)

    def float_attention(qkv, bias):
        out = jax.nn.dot_product_attention(*qkv, bias=bias, mask=mask, scale=call.scale)
        seen = jnp.any(mask, axis=3).swapaxes(1, 2)[..., None]
        return jnp.where(seen, out, jnp.zeros((), out.dtype))

    _, pullback = jax.vjp(float_attention, qkv, masking.bias)
    d_qkv, d_bias = pullback(cotangent)
    return d_qkv, Masking(bias=d_bias)


_attention.defvjp(_forward, _backward)


def _xla(call: _Call, qkv, masking: Masking) -> jax.Array:
    q, k, v = qkv
    return attention_reference(
        q, k, v, masking, window=call.window, scale=call.scale, mode=call.mode, block=REFERENCE_BLOCK
    )


def _mosaic_gpu(call: _Call, qkv, masking: Masking) -> jax.Array:
    q = qkv[0]
    batch, tokens, _, head_dim = q.shape
    kv_tokens = qkv[1].shape[1]
    q, k, v = (_pad(x, padded_head_dim(head_dim)) for x in qkv)
    scores_dtype, values_dtype = formats(call.mode, head_dim)
    block = call.config.block_kv
    kv_lengths = masking.kv_lengths
    if kv_lengths is None and k.shape[1] != kv_tokens:
        kv_lengths = jnp.full((batch,), kv_tokens, jnp.int32)
    if scores_dtype == F16:
        keys = smooth_keys_mosaic_gpu(k, block, kv_lengths)
    else:
        keys = k if scores_dtype is None else quantize_keys_mosaic_gpu(k, scores_dtype, block, kv_lengths)
    values = v
    if values_dtype is not None:
        values = quantize_values_mosaic_gpu(v, values_dtype, block, kv_lengths)
    lengths = None
    if masking.query_lengths is not None or masking.kv_lengths is not None:
        query_lengths, kv_lengths = (
            jnp.full((batch,), most, jnp.int32) if some is None else some
            for some, most in ((masking.query_lengths, tokens), (masking.kv_lengths, kv_tokens))
        )
        lengths = query_lengths, kv_lengths
    out = quantized_attention(
        q,
        keys,
        values,
        lengths,
        mode=call.mode,
        kv_tokens=kv_tokens,
        window=call.window,
        scale=call.scale,
        config=call.config,
    )
    return out[:, :tokens, :, :head_dim]


def _pad(x: jax.Array, head_dim: int) -> jax.Array:
    """Zero channels add nothing to a score; zero tokens are masked, and let TMA tile the token axis."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TMA_ROWS), (0, 0), (0, head_dim - x.shape[3])))


def _window(window, causal: bool, tokens: int, kv_tokens: int) -> Window:
    """The keys seen left and right of a query; None where that is all of them."""
    left, right = window if isinstance(window, tuple) else (window, window)
    for side in (left, right):
        if side is not None and (not isinstance(side, numbers.Integral) or side < 0):
            raise ValueError(f"window must be whole numbers of keys, not negative, got {window}")
    if causal:
        right = 0
    left, right = (
        None if side is None or side >= last else int(side)
        for side, last in ((left, tokens - 1), (right, kv_tokens - 1))
    )
    return left, right


def _clamped(lengths: jax.Array | None, largest: int) -> jax.Array | None:
    return None if lengths is None else jnp.clip(jnp.asarray(lengths).astype(jnp.int32), 0, largest)


def _check(q, k, v, masking: Masking, mode: str, implementation: str | None):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {k.shape} and {v.shape}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head_dim")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the heads of q, {q.shape[2]}, must be a multiple of those of k and v, {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if mode not in ("auto", *MODES):
        raise ValueError(f"mode must be 'auto' or one of {sorted(MODES)}, got {mode!r}")
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation must be None, 'mosaic_gpu' or 'xla', got {implementation!r}")
    scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, x in (("bias", masking.bias), ("mask", masking.mask)):
        if x is not None and (x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, scores, strict=True))):
            raise ValueError(f"{name} must be broadcastable to {scores} and of rank 4, got shape {x.shape}")
    if masking.mask is not None and masking.mask.dtype != bool:
        raise ValueError(f"mask must be boolean, got {masking.mask.dtype}; add a float mask as bias")
    for name, x in (("query_lengths", masking.query_lengths), ("kv_lengths", masking.kv_lengths)):
        if x is not None and (x.shape != q.shape[:1] or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"{name} must be integers of shape {q.shape[:1]}, got {x.dtype} of shape {x.shape}")
