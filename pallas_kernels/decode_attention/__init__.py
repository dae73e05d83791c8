"""Attention of one new token per sequence over a cache of quantized keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.config import Config, default_config, supports
from pallas_kernels.decode_attention.mosaic_gpu import decode_attention_mosaic_gpu
from pallas_kernels.decode_attention.reference import decode_attention_reference

__all__ = ["Config", "decode_attention", "default_config", "supports"]


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    page_table: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Computes softmax attention of one query per head over the tokens in a cache.

    Values are stored transposed, so that both products read the cache along its rows.

    Args:
        q: queries [B, N, H], floating point.
        k: keys [B, K, S, H], K a divisor of N, of q's dtype, int8 or float8_e4m3fn; pages [P, K, S, H] with a page
            table. For the kernel, bytes past a sequence's length must be finite numbers.
        v: values [B, K, H, S] of k's dtype; pages [P, K, H, S] with a page table.
        lengths: valid tokens of each sequence, int [B]; a sequence of none gives zeros. Clamped to the capacity.
        k_scale: for 8-bit keys, the scale of each token and head [B or P, K, S] float32.
        v_scale: the same of values.
        page_table: the pages of each sequence in order, int [B, pages]; entries must be valid page numbers.
        scale: the softmax scale; 1 / sqrt(H) by default.
        implementation: "mosaic_gpu" (a Hopper GPU; never falls back), "xla" (any device), or None: the kernel on a GPU
            where it supports the call, XLA elsewhere.
        config: how the kernel cuts its work; the default suits most calls.

    Returns:
        [B, N, H] of q's dtype.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
        NotImplementedError: if implementation="mosaic_gpu" cannot compute this call; the message says why.

    References:
        Dao et al., Flash-Decoding (2023). Liu et al., KIVI (2024), arXiv:2402.02750.

    Example:
        >>> q, k, v = jnp.ones((2, 4, 64)), jnp.ones((2, 1, 32, 64)), jnp.ones((2, 1, 64, 32))
        >>> decode_attention(q, k, v, jnp.array([3, 32])).shape
        (2, 4, 64)
    """
    _check(q, k, v, lengths, k_scale, v_scale, page_table, implementation)
    page_size = None if page_table is None else k.shape[2]
    capacity = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
    config = default_config(q, k, capacity) if config is None else config
    reason = supports(q, k, page_size, config)
    if implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"implementation='mosaic_gpu': {reason}")
    softmax_scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    operands = q, k, v, lengths.astype(jnp.int32), k_scale, v_scale, page_table
    xla = functools.partial(decode_attention_reference, scale=softmax_scale)
    kernel = functools.partial(decode_attention_mosaic_gpu, scale=softmax_scale, config=config)
    if implementation is None and reason is None:
        return lax.platform_dependent(*operands, cuda=kernel, default=xla)
    return (kernel if implementation == "mosaic_gpu" else xla)(*operands)


def _check(q, k, v, lengths, k_scale, v_scale, page_table, implementation):
    for name, x, rank in (("q", q, 3), ("k", k, 4), ("v", v, 4)):
        if x.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {x.shape}")
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize < 2:
        raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    if v.shape != (*k.shape[:2], k.shape[3], k.shape[2]):
        raise ValueError(f"v must be k transposed, [..., head_dim, tokens]; got k {k.shape} and v {v.shape}")
    if q.shape[2] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in head_dim, q's heads be a multiple of k's")
    if k.dtype != v.dtype or k.dtype not in (q.dtype, jnp.int8, jnp.float8_e4m3fn):
        raise ValueError(f"k and v must both be {q.dtype}, int8 or float8_e4m3fn, got {k.dtype} and {v.dtype}")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is None) == (k.dtype.itemsize == 1):
            raise ValueError(f"{name} must be given for 8-bit keys and values, and only for them; k is {k.dtype}")
        if x is not None and (x.shape != k.shape[:3] or x.dtype != jnp.float32):
            raise ValueError(f"{name} must be float32 of shape {k.shape[:3]}, got {x.dtype} of shape {x.shape}")
    if lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers of shape {q.shape[:1]}, got {lengths.dtype} of {lengths.shape}")
    if page_table is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch where there is no page table")
    if page_table is not None and (
        page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or page_table.dtype != jnp.int32
    ):
        raise ValueError(f"page_table must be int32 [{q.shape[0]}, pages], got {page_table.dtype} {page_table.shape}")
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation must be None, 'mosaic_gpu' or 'xla', got {implementation!r}")
