"""The cache itself: a pytree whose methods return new ones."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant._kernels import Cache, decode_attention, dequantize_cache
from jaxquant.kv_cache._formats import GROUPED, check_sizes, empty, recent_window, static_scales, stores
from jaxquant.kv_cache._pages import give_pages_back, place, take_pages
from jaxquant.kv_cache._writes import write_groups, write_recent, write_tokens


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "key", "value", "key_scale", "value_scale", "key_offset", "value_offset", "recent_key", "recent_value",
        "key_absmax", "value_absmax", "lengths", "overflowed", "page_table", "free_pages", "num_free",
    ],
    meta_fields=["format", "dtype", "head_dim"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, of one layer.

    Make one with `KVCache.init` or `KVCache.init_paged`. Methods return a new cache; inside jit, with the old one
    donated, they write in place. Stack caches along a leading axis to scan over layers. Arrays that a format or a fixed
    cache has no use for are None.

    Attributes:
        key: [B, K, S, H] of the format; packed along S for "int4" and "int2". Pages [P, K, S, H] of a paged cache.
        value: [B, K, H, S], transposed; packed along H for "int4" and "int2". Pages [P, K, H, S] of a paged cache.
        key_scale: [B or P, K, S] float32 of an 8-bit format, [B or P, K, S / 32, H] float16 of a grouped one.
        value_scale: [B or P, K, S] float32 of an 8-bit format, [B or P, K, H / 32, S] float16 of a grouped one.
        key_offset: of a grouped format, like key_scale; a key is key_offset + key_scale * (1 + code / 2**bits).
        value_offset: like value_scale.
        recent_key: the latest keys in float [B, K, window, H], where a window of them is kept. Where each packed code
            and each recent token lies is the kernel's order, `pallas_kernels.decode_attention.layout`.
        recent_value: the latest values in float [B, K, H, window].
        key_absmax: of an 8-bit format with static scales, the largest magnitude of each head's keys, float32 [K].
        value_absmax: like key_absmax.
        lengths: tokens of each sequence, int32 [B].
        overflowed: whether tokens of a sequence were dropped because the cache was full, bool [B].
        page_table: of a paged cache, the pages of each sequence in order, int32 [B, pages].
        free_pages: the first `num_free` are the pages that no sequence holds, int32 [P].
        num_free: int32 scalar.
        format: one of `FORMATS`.
        dtype: what `dequantize` returns, and the format of "float" and of recent tokens.
        head_dim: H.
    """

    key: jax.Array
    value: jax.Array
    key_scale: Any
    value_scale: Any
    key_offset: Any
    value_offset: Any
    recent_key: Any
    recent_value: Any
    key_absmax: Any
    value_absmax: Any
    lengths: jax.Array
    overflowed: jax.Array
    page_table: Any
    free_pages: Any
    num_free: Any
    format: str
    dtype: jnp.dtype
    head_dim: int

    @classmethod
    def init(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        format: str = "int8",
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        window: int | None = None,
        key_absmax: jax.Array | None = None,
        value_absmax: jax.Array | None = None,
    ) -> "KVCache":
        """Makes an empty cache with room for `capacity` tokens of each of `batch` sequences.

        Args:
            batch: sequences.
            capacity: tokens of each.
            kv_heads: heads of keys and values.
            head_dim: channels of a head.
            format: "float", "int8" and "float8_e4m3fn" (a scale for each token and head), "int4" and "int2" (KIVI: keys
                per channel in groups of 32 tokens, values per token in groups of 32 channels).
            dtype: the float type of the model's keys and values.
            window: latest tokens that are attended to in float, a multiple of 32 (of 64 for the kernel). By default
                128, which lowers the KL of a small model's generations 10 to 30 times; only 8 bits may have 0.
            key_absmax: for an 8-bit format with static scales, the largest magnitude of each head's keys in
                calibration, [K] float; larger ones are clipped. By default every token has a scale of its own.
            value_absmax: the same of values; given together.

        Returns:
            The cache.

        Raises:
            ValueError: if a number does not fit the format.

        Example:
            >>> cache = KVCache.init(1, 64, 2, 32)
            >>> cache = cache.append(jnp.ones((1, 3, 2, 32)), jnp.ones((1, 3, 2, 32)))
            >>> int(cache.lengths[0]), cache.attend(jnp.ones((1, 4, 32))).shape, cache.bytes_per_token
            (3, (1, 4, 32), 144.0)
        """
        window = recent_window(format, window)
        check_sizes(format, capacity, head_dim)
        arrays = stores(format, dtype, batch, capacity, kv_heads, head_dim)
        state = empty(batch, kv_heads, format, dtype, head_dim, window)
        state |= static_scales(format, kv_heads, key_absmax, value_absmax)
        return cls(**arrays, **state, page_table=None, free_pages=None, num_free=None)

    @classmethod
    def init_paged(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        pages: int,
        page_size: int = 64,
        format: str = "int8",
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        window: int | None = None,
        key_absmax: jax.Array | None = None,
        value_absmax: jax.Array | None = None,
    ) -> "KVCache":
        """Makes an empty cache whose sequences share `pages` pages of `page_size` tokens, taken as they grow.

        Args:
            batch: sequences.
            capacity: the most tokens that one sequence may have.
            kv_heads: heads of keys and values.
            head_dim: channels of a head.
            pages: pages of all sequences together.
            page_size: tokens of a page; the kernel wants a multiple of 64.
            format: as of `init`; recent tokens lie outside the pages.
            dtype: the float type of the model's keys and values.
            window: as of `init`.
            key_absmax: as of `init`.
            value_absmax: as of `init`.

        Returns:
            The cache.

        Raises:
            ValueError: if a number does not fit the format.

        Example:
            >>> cache = KVCache.init_paged(2, 128, 2, 32, pages=3)
            >>> int(cache.append(jnp.ones((2, 70, 2, 32)), jnp.ones((2, 70, 2, 32))).overflowed.sum())
            1
        """
        if pages < 1 or page_size < 1:
            raise ValueError(f"pages and page_size must be positive, got {pages} and {page_size}")
        window = recent_window(format, window)
        check_sizes(format, min(capacity, page_size) if format not in GROUPED else page_size, head_dim)
        arrays = stores(format, dtype, pages, page_size, kv_heads, head_dim)
        table = jnp.zeros((batch, -(-capacity // page_size)), jnp.int32)
        free = {"free_pages": jnp.arange(pages, dtype=jnp.int32), "num_free": jnp.int32(pages)}
        state = empty(batch, kv_heads, format, dtype, head_dim, window)
        state |= static_scales(format, kv_heads, key_absmax, value_absmax)
        return cls(**arrays, **state, page_table=table, **free)

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence may have."""
        if self.page_table is not None:
            return self.page_table.shape[-1] * self.value.shape[-1]
        return self.value.shape[-1]

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sequence takes, scales included, the window of recent keys not."""
        stores = [self.key, self.value, self.key_scale, self.value_scale, self.key_offset, self.value_offset]
        tokens = self.value.shape[0] * self.value.shape[-1]
        return sum(x.nbytes for x in stores if x is not None) / tokens

    def append(self, key: jax.Array, value: jax.Array, counts: jax.Array | None = None) -> "KVCache":
        """Adds tokens to every sequence.

        Tokens for which there is no room are dropped and their sequences marked in `overflowed`: nothing in the cache
        is ever overwritten. A sequence of a paged cache takes all its new tokens or, where pages are short, none.

        Args:
            key: [B, T, K, H], floating point.
            value: [B, T, K, H].
            counts: how many of the T are tokens (the first ones), int [B]; all by default.

        Returns:
            The cache with the tokens.

        Raises:
            ValueError: if the shapes do not fit the cache.
        """
        self._check_tokens(key, value, counts)
        batch, tokens = key.shape[:2]
        counts = jnp.full((batch,), tokens, jnp.int32) if counts is None else jnp.clip(counts, 0, tokens)
        wanted = self.lengths + counts.astype(jnp.int32)
        lengths = jnp.minimum(wanted, self.capacity)
        cache = self
        if self.page_table is not None:
            cache, lengths = take_pages(cache, lengths)
        cache = dataclasses.replace(cache, overflowed=self.overflowed | (lengths < wanted))
        positions = self.lengths[:, None] + lax.broadcasted_iota(jnp.int32, (batch, tokens), 1)
        places = place(cache, positions, positions < lengths[:, None])
        # A token that is not finite shows in its key: past a length, where keys are masked, it cannot be met again.
        finite = jnp.all(jnp.isfinite(value), axis=-1, keepdims=True)
        key, value = jnp.where(finite, key, jnp.nan), jnp.where(finite, value, 0.0)
        if self.format in GROUPED:
            cache = write_groups(cache, key, value, places, lengths)
        else:
            cache = write_tokens(cache, key, value, places)
        if self.recent_key is not None:
            cache = write_recent(cache, key, value, lengths)
        return dataclasses.replace(cache, lengths=lengths)

    def attend(self, query: jax.Array, *, scale: float | None = None, implementation: str | None = None) -> jax.Array:
        """Computes attention of one query per head [B, N, H] over the cache, after its own token was appended.

        Args:
            query: [B, N, H], N a multiple of the key heads.
            scale: the softmax scale; 1 / sqrt(H) by default.
            implementation: as of `pallas_kernels.decode_attention`.

        Returns:
            [B, N, H] of query's dtype.
        """
        arrays = self._arrays()
        if self.format == "float" and self.dtype != query.dtype:
            arrays = Cache(*self.dequantize(query.dtype))
        given = {"scale": scale, "implementation": implementation}
        return decode_attention(query, **arrays._asdict(), lengths=self.lengths, **given)

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns keys [B, K, S, H] and values [B, K, H, S] in float; tokens past a sequence's length are zeros."""
        key, value = dequantize_cache(self._arrays(), self.lengths)
        token = lax.broadcasted_iota(jnp.int32, (self.lengths.shape[0], 1, self.capacity), 2)
        seen = token < self.lengths[:, None, None]
        dtype = self.dtype if dtype is None else dtype
        key, value = jnp.where(seen[..., None], key, 0.0), jnp.where(seen[:, :, None], value, 0.0)
        return key.astype(dtype), value.astype(dtype)

    def release(self, done: jax.Array) -> "KVCache":
        """Empties the sequences marked in `done`, bool [B], and gives their pages back."""
        lengths = jnp.where(done, 0, self.lengths)
        cache = dataclasses.replace(self, lengths=lengths, overflowed=self.overflowed & ~done)
        if self.page_table is None:
            return cache
        return give_pages_back(cache, self.lengths, done)

    def _arrays(self) -> Cache:
        """What the kernel reads."""
        scales = self.key_scale, self.value_scale, self.key_offset, self.value_offset
        return Cache(self.key, self.value, *scales, self.recent_key, self.recent_value, self.page_table)

    def _check_tokens(self, key, value, counts):
        batch, kv_heads = self.lengths.shape[0], self.value.shape[1]
        expected = (batch, key.shape[1] if key.ndim > 1 else 0, kv_heads, self.head_dim)
        for name, x in (("key", key), ("value", value)):
            if x.shape != expected or not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(
                    f"{name} must be floating [{batch}, tokens, {kv_heads}, {self.head_dim}] as the cache is, with key"
                    f" and value of the same tokens; got {x.dtype} of shape {x.shape}"
                )
        if counts is not None and (counts.shape != (batch,) or not jnp.issubdtype(counts.dtype, jnp.integer)):
            raise ValueError(f"counts must be integers of shape ({batch},), got {counts.dtype} of shape {counts.shape}")
