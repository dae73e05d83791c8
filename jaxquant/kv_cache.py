"""A cache of quantized keys and values for decoding: one pytree, fixed or in pages, appended to under jit and scan."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant._kernels import Cache, decode_attention, dequantize_cache, kv_layout, quantized_tokens
from jaxquant._kv_groups import SCALE_DTYPE, fill_ring, quantize_groups, take_groups, unroll_ring

EIGHT_BIT = {"int8": 127.0, "float8_e4m3fn": 448.0}
GROUPED = {"int4": 4, "int2": 2}
FORMATS = ("float", *EIGHT_BIT, *GROUPED)
SMALLEST_ABSMAX = 1e-20  # keeps the scale of an all-zero token positive


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
        window = _window(format, window)
        _check_sizes(format, capacity, head_dim)
        stores = _stores(format, dtype, batch, capacity, kv_heads, head_dim)
        state = _empty(batch, kv_heads, format, dtype, head_dim, window)
        state |= _static_scales(format, kv_heads, key_absmax, value_absmax)
        return cls(**stores, **state, page_table=None, free_pages=None, num_free=None)

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
        window = _window(format, window)
        _check_sizes(format, min(capacity, page_size) if format not in GROUPED else page_size, head_dim)
        stores = _stores(format, dtype, pages, page_size, kv_heads, head_dim)
        table = jnp.zeros((batch, -(-capacity // page_size)), jnp.int32)
        free = {"free_pages": jnp.arange(pages, dtype=jnp.int32), "num_free": jnp.int32(pages)}
        state = _empty(batch, kv_heads, format, dtype, head_dim, window)
        state |= _static_scales(format, kv_heads, key_absmax, value_absmax)
        return cls(**stores, **state, page_table=table, **free)

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
            cache, lengths = self._take_pages(lengths)
        cache = dataclasses.replace(cache, overflowed=self.overflowed | (lengths < wanted))
        positions = self.lengths[:, None] + lax.broadcasted_iota(jnp.int32, (batch, tokens), 1)
        place = cache._place(positions, positions < lengths[:, None])
        # A token that is not finite shows in its key: past a length, where keys are masked, it cannot be met again.
        finite = jnp.all(jnp.isfinite(value), axis=-1, keepdims=True)
        key, value = jnp.where(finite, key, jnp.nan), jnp.where(finite, value, 0.0)
        if self.format in GROUPED:
            cache = cache._write_groups(key, value, place, lengths)
        else:
            cache = cache._write_tokens(key, value, place)
        if self.recent_key is not None:
            cache = cache._write_recent(key, value, lengths)
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
        held = -(-self.lengths // self.value.shape[-1])
        column = lax.broadcasted_iota(jnp.int32, self.page_table.shape, 1)
        freed = (column < held[:, None]) & done[:, None]
        place = self.num_free + jnp.cumsum(freed.reshape(-1)).reshape(freed.shape) - 1
        place = jnp.where(freed, place, self.free_pages.size).astype(jnp.int32)
        free = self.free_pages.at[place].set(self.page_table, mode="drop")
        return dataclasses.replace(cache, free_pages=free, num_free=self.num_free + jnp.sum(freed, dtype=jnp.int32))

    def _take_pages(self, lengths: jax.Array) -> tuple["KVCache", jax.Array]:
        """Gives sequences that grow to `lengths` pages off the free stack, the first ones first."""
        page_size, columns = self.value.shape[-1], self.page_table.shape[1]
        held, wanted = -(-self.lengths // page_size), -(-lengths // page_size)

        # In turn, for a sequence that gets none must not keep the later ones from theirs.
        def grant(left, more):
            granted = more <= left
            return left - jnp.where(granted, more, 0), granted

        num_free, granted = lax.scan(grant, self.num_free, wanted - held)
        lengths = jnp.where(granted, lengths, self.lengths)
        more = jnp.where(granted, wanted - held, 0)
        before = jnp.cumsum(more) - more
        column = lax.broadcasted_iota(jnp.int32, (held.shape[0], columns), 1)
        new = (column >= held[:, None]) & (column < (held + more)[:, None])
        index = self.num_free - 1 - before[:, None] - (column - held[:, None])
        pages = self.free_pages[jnp.clip(index, 0, self.free_pages.size - 1)]
        table = jnp.where(new, pages, self.page_table)
        return dataclasses.replace(self, page_table=table, num_free=num_free), lengths

    def _place(self, positions: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row and column of each token [B, T] in the stores; tokens that are not valid lie past the end."""
        tokens = self.value.shape[-1]
        row = lax.broadcasted_iota(jnp.int32, positions.shape, 0)
        if self.page_table is not None:
            page = jnp.clip(positions // tokens, 0, self.page_table.shape[1] - 1)
            row = jnp.take_along_axis(self.page_table, page, axis=1)
        return row, jnp.where(valid, positions % tokens if self.page_table is not None else positions, tokens)

    def _write_tokens(self, key, value, place) -> "KVCache":
        row, column = place
        key_codes, key_scale = _quantize_tokens(key, self.key_absmax, self.format, self.key.dtype)
        value_codes, value_scale = _quantize_tokens(value, self.value_absmax, self.format, self.value.dtype)
        cache = dataclasses.replace(
            self,
            key=self.key.at[row, :, column].set(key_codes, mode="drop"),
            value=self.value.at[row, :, :, column].set(value_codes, mode="drop"),
        )
        if self.key_scale is None:
            return cache
        return dataclasses.replace(
            cache,
            key_scale=self.key_scale.at[row, :, column].set(key_scale, mode="drop"),
            value_scale=self.value_scale.at[row, :, column].set(value_scale, mode="drop"),
        )

    def _write_groups(self, key, value, place, lengths) -> "KVCache":
        """Values go to their place at once, keys when the group that they belong to leaves the ring."""
        bits, window, tokens = GROUPED[self.format], self.recent_key.shape[2], key.shape[1]
        row, column = place
        codes, *grids = quantize_groups(value.transpose(0, 2, 3, 1), bits)
        parts = {"value": kv_layout.pack_values(codes, bits), "value_scale": grids[0], "value_offset": grids[1]}
        written = {
            name: getattr(self, name).at[row, :, :, column].set(x.transpose(0, 3, 1, 2), mode="drop")
            for name, x in parts.items()
        }
        recent = jnp.concatenate([unroll_ring(self.recent_key, self.lengths), _by_head(key, self.dtype)], axis=2)
        start = self.lengths - window
        first, end = (quantized_tokens(n, window) for n in (self.lengths, lengths))
        count = -(-tokens // kv_layout.GROUP) + 1
        codes, *grids = quantize_groups(take_groups(recent, first - start, count), bits)
        index = lax.broadcasted_iota(jnp.int32, (key.shape[0], count), 1) * kv_layout.GROUP + first[:, None]
        row, column = self._place(index, index < end[:, None])
        parts = {"key": kv_layout.pack_keys(codes, bits), "key_scale": grids[0], "key_offset": grids[1]}
        for name, x in parts.items():
            store = getattr(self, name)
            by_group = lambda x, groups: x.reshape(*x.shape[:2], groups, -1, self.head_dim)  # noqa: E731
            groups = by_group(store, self.value.shape[-1] // kv_layout.GROUP)
            groups = groups.at[row, :, column // kv_layout.GROUP].set(by_group(x, count).swapaxes(1, 2), mode="drop")
            written[name] = groups.reshape(store.shape)
        return dataclasses.replace(self, **written)

    def _write_recent(self, key, value, lengths) -> "KVCache":
        """Tokens go to the rings; `self.lengths` are still those before them."""
        window, rings = self.recent_key.shape[2], (self.recent_key, self.recent_value.swapaxes(2, 3))
        key, value = (
            fill_ring(
                jnp.concatenate([unroll_ring(ring, self.lengths), _by_head(x, self.dtype)], axis=2),
                self.lengths - window,
                lengths,
                window,
            )
            for ring, x in zip(rings, (key, value), strict=True)
        )
        return dataclasses.replace(self, recent_key=key, recent_value=value.swapaxes(2, 3))

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


def _empty(batch: int, kv_heads: int, format: str, dtype, head_dim: int, window: int) -> dict[str, Any]:
    """What every cache has besides its stores."""
    counts = {"lengths": jnp.zeros((batch,), jnp.int32), "overflowed": jnp.zeros((batch,), bool)}
    shapes = {"recent_key": (window, head_dim), "recent_value": (head_dim, window)}
    recent = {name: jnp.zeros((batch, kv_heads, *shape), dtype) if window else None for name, shape in shapes.items()}
    return {**counts, **recent, "format": format, "dtype": jnp.dtype(dtype), "head_dim": head_dim}


def _stores(format: str, dtype, rows: int, tokens: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Zeroed keys, values, their scales and minima."""
    shapes = {"key": (tokens, head_dim), "value": (head_dim, tokens)}
    dtypes = dict.fromkeys(shapes, format if format in EIGHT_BIT else dtype)
    if format in EIGHT_BIT:
        shapes |= {"key_scale": (tokens,), "value_scale": (tokens,)}
    if format in GROUPED:
        codes, group = 8 // GROUPED[format], kv_layout.GROUP
        shapes = {"key": (tokens // codes, head_dim), "value": (head_dim // codes, tokens)}
        dtypes = dict.fromkeys(shapes, jnp.uint8)
        grids = {"key": (tokens // group, head_dim), "value": (head_dim // group, tokens)}
        shapes |= {f"{name}_{grid}": shape for grid in ("scale", "offset") for name, shape in grids.items()}
    grid_dtype = SCALE_DTYPE if format in GROUPED else jnp.float32
    absent = dict.fromkeys(("key_scale", "value_scale", "key_offset", "value_offset"))
    zeros = {name: jnp.zeros((rows, kv_heads, *shape), dtypes.get(name, grid_dtype)) for name, shape in shapes.items()}
    return absent | zeros


def _static_scales(format: str, kv_heads: int, key_absmax, value_absmax) -> dict[str, Any]:
    given = {"key_absmax": key_absmax, "value_absmax": value_absmax}
    if key_absmax is None and value_absmax is None:
        return given
    for name, x in given.items():
        if format not in EIGHT_BIT or x is None or x.shape != (kv_heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
            got = None if x is None else f"{x.dtype} of shape {x.shape}"
            raise ValueError(
                f"{name}: static scales are floats of shape ({kv_heads},) for keys and values of an 8-bit format"
                f" {tuple(EIGHT_BIT)}, got {got} for format {format!r}"
            )
    return {name: jnp.maximum(x.astype(jnp.float32), SMALLEST_ABSMAX) for name, x in given.items()}


def _quantize_tokens(x: jax.Array, static, format: str, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Codes [B, T, K, H] and scales [B, T, K] of tokens; a token that is not finite gets a scale of NaN."""
    x = x.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    absmax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST_ABSMAX)
    if static is not None:
        absmax = jnp.broadcast_to(static, absmax.shape)
        x = jnp.clip(x, -absmax[..., None], absmax[..., None])  # NaN stays
    absmax = jnp.where(finite, absmax, jnp.nan)
    if format not in EIGHT_BIT:
        return x.astype(dtype), absmax
    codes = x * (EIGHT_BIT[format] / absmax)[..., None]
    codes = jnp.where(jnp.isnan(codes), 0.0, codes)
    return (jnp.round(codes) if format == "int8" else codes).astype(dtype), absmax * (1 / EIGHT_BIT[format])


def _by_head(x: jax.Array, dtype) -> jax.Array:
    return x.astype(dtype).swapaxes(1, 2)


def _window(format: str, window: int | None) -> int:
    """Recent tokens kept in float."""
    window = (0 if format == "float" else 128) if window is None else window
    least = kv_layout.GROUP if format in GROUPED else 0
    if window % kv_layout.GROUP or window < least or (window and format == "float"):
        raise ValueError(
            f"window must be a multiple of {kv_layout.GROUP}, positive for a format of 4 or 2 bits and 0 for 'float',"
            f" got {window} for {format!r}"
        )
    return window


def _check_sizes(format: str, capacity: int, head_dim: int):
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    if capacity < 1:
        raise ValueError(f"capacity must be positive, got {capacity}")
    group = kv_layout.GROUP
    if format in GROUPED and (capacity % group or head_dim % group):
        raise ValueError(
            f"format {format!r} has groups of {group}: capacity or page_size, and head_dim, must be multiples of it,"
            f" got {capacity} and {head_dim}"
        )
