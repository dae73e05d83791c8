"""Attention of one new token per sequence over a cache of quantized keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._device import wrong_generation
from pallas_kernels.decode_attention.cache import Cache
from pallas_kernels.decode_attention.config import Config, default_config, supports
from pallas_kernels.decode_attention.layout import GROUP
from pallas_kernels.decode_attention.mosaic_gpu import decode_attention_mosaic_gpu
from pallas_kernels.decode_attention.reference import decode_attention_reference, dequantize, quantized_tokens

__all__ = ["Cache", "Config", "decode_attention", "default_config", "dequantize", "quantized_tokens", "supports"]


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    k_offset: jax.Array | None = None,
    v_offset: jax.Array | None = None,
    recent_k: jax.Array | None = None,
    recent_v: jax.Array | None = None,
    page_table: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Computes softmax attention of one query per head over the tokens in a cache.

    Values are stored transposed, so that both products read the cache along its rows. P below is B, or the pages of all
    sequences where there is a page table; S is then the tokens of a page.

    Args:
        q: queries [B, N, H], floating point.
        k: keys [P, K, S, H], K a divisor of N, of q's dtype, int8 or float8_e4m3fn; or codes of 4 or 2 bits as
            `layout.pack_keys` packs them, uint8 [P, K, S * bits / 8, H], S and H multiples of 32. For the kernel,
            bytes past a sequence's length must be finite numbers.
        v: values [P, K, H, S] of k's dtype; or codes as of `layout.pack_values`, uint8 [P, K, H * bits / 8, S].
        lengths: valid tokens of each sequence, int [B]; a sequence of none gives zeros. Clamped to the capacity.
        k_scale: for 8-bit keys, the scale of each token and head [P, K, S] float32. For packed codes, float16
            [P, K, S / 32, H]: a key is k_offset + k_scale * (1 + code / 2**bits).
        v_scale: the same of values, positive; float16 [P, K, H / 32, S] for packed codes.
        k_offset: for packed codes, like k_scale.
        v_offset: like v_scale.
        recent_k: the latest keys in float [B, K, window, H], window a multiple of 32; packed codes need it, other
            codes may have it. Tokens are read from here that `quantized_tokens(lengths, window)` does not count,
            token t in `layout.ring_slot(t, window)`.
        recent_v: the latest values in float [B, K, H, window].
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
    cache = Cache(k, v, k_scale, v_scale, k_offset, v_offset, recent_k, recent_v, page_table)
    _check(q, lengths, cache, implementation)
    config = default_config(q, cache) if config is None else config
    reason = wrong_generation() or supports(q, cache, config)
    if implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"implementation='mosaic_gpu': {reason}")
    softmax_scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    operands = q, lengths.astype(jnp.int32), cache
    xla = functools.partial(decode_attention_reference, scale=softmax_scale)
    kernel = functools.partial(decode_attention_mosaic_gpu, scale=softmax_scale, config=config)
    if implementation is None and reason is None:
        return lax.platform_dependent(*operands, cuda=kernel, default=xla)
    return (kernel if implementation == "mosaic_gpu" else xla)(*operands)


def _check(q: jax.Array, lengths: jax.Array, cache: Cache, implementation: str | None):
    k, v, table = cache.k, cache.v, cache.page_table
    for name, x, rank in (("q", q, 3), ("k", k, 4), ("v", v, 4)):
        if x.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {x.shape}")
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize < 2:
        raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    if k.dtype != v.dtype or k.dtype not in (q.dtype, jnp.int8, jnp.float8_e4m3fn, jnp.uint8):
        raise ValueError(f"k and v must both be {q.dtype}, int8, float8_e4m3fn or uint8, got {k.dtype} and {v.dtype}")
    if q.shape[2] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in head_dim, q's heads be a multiple of k's")
    (_check_groups if cache.grouped else _check_tokens)(cache)
    _check_recent(q.shape[0], cache)
    if lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers of shape {q.shape[:1]}, got {lengths.dtype} of {lengths.shape}")
    if table is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch where there is no page table")
    if table is not None and (table.ndim != 2 or table.shape[0] != q.shape[0] or table.dtype != jnp.int32):
        raise ValueError(f"page_table must be int32 [{q.shape[0]}, pages], got {table.dtype} {table.shape}")
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation must be None, 'mosaic_gpu' or 'xla', got {implementation!r}")


def _check_tokens(cache: Cache):
    k, v = cache.k, cache.v
    if v.shape != (*k.shape[:2], k.shape[3], k.shape[2]):
        raise ValueError(f"v must be k transposed, [..., head_dim, tokens]; got k {k.shape} and v {v.shape}")
    for name, x in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if (x is None) == (k.dtype.itemsize == 1):
            raise ValueError(f"{name} must be given for 8-bit keys and values, and only for them; k is {k.dtype}")
        if x is not None and (x.shape != k.shape[:3] or x.dtype != jnp.float32):
            raise ValueError(f"{name} must be float32 of shape {k.shape[:3]}, got {x.dtype} of shape {x.shape}")
    for name, x in (("k_offset", cache.k_offset), ("v_offset", cache.v_offset)):
        if x is not None:
            raise ValueError(f"{name} belongs to packed uint8 codes; k is {k.dtype}")


def _check_groups(cache: Cache):
    """Packed codes: every other shape follows from head_dim and the bytes of a value."""
    (rows, kv_heads, bytes_of_value, tokens), head_dim = cache.v.shape, cache.k.shape[3]
    if cache.bits not in (2, 4) or head_dim % GROUP or tokens % GROUP:
        raise ValueError(
            f"v of packed codes must be [..., head_dim / 2 or / 4, tokens], both multiples of {GROUP}; got"
            f" {cache.v.shape} for head_dim {head_dim}"
        )
    shapes = {
        "k": (tokens * bytes_of_value // head_dim, head_dim),
        "k_scale": (tokens // GROUP, head_dim),
        "v_scale": (head_dim // GROUP, tokens),
    }
    shapes |= {"k_offset": shapes["k_scale"], "v_offset": shapes["v_scale"]}
    for name, shape in shapes.items():
        x, dtype = getattr(cache, name), jnp.uint8 if name == "k" else jnp.float16
        if x is None or x.shape != (rows, kv_heads, *shape) or x.dtype != dtype:
            got = None if x is None else f"{x.dtype} of shape {x.shape}"
            raise ValueError(f"{name} must be {dtype.__name__} of shape {(rows, kv_heads, *shape)}, got {got}")


def _check_recent(batch: int, cache: Cache):
    kv_heads, head_dim = cache.k.shape[1::2]
    k, v = cache.recent_k, cache.recent_v
    if k is None and v is None and not cache.grouped:
        return
    if k is None or v is None or cache.k_scale is None:
        raise ValueError("recent_k and recent_v come together, beside codes, and packed codes need them")
    window = k.shape[2] if k.ndim == 4 else 0
    if k.shape != (batch, kv_heads, window, head_dim) or window < GROUP or window % GROUP:
        raise ValueError(f"recent_k must be [{batch}, {kv_heads}, a multiple of {GROUP}, {head_dim}], got {k.shape}")
    if v.shape != (batch, kv_heads, head_dim, window) or v.dtype != k.dtype:
        raise ValueError(
            f"recent_v must be recent_k transposed, got {v.dtype} of shape {v.shape} for {k.dtype} {k.shape}"
        )
