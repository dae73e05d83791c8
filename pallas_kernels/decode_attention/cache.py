"""The arrays of one decode step's cache, in the order that every implementation takes them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUPED = jnp.dtype(jnp.uint8)  # several codes a byte, with a scale and an offset a group


class Cache(NamedTuple):
    """Keys, values and what belongs to them; the shapes are those of `decode_attention`'s arguments."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    k_offset: jax.Array | None = None
    v_offset: jax.Array | None = None
    recent_k: jax.Array | None = None
    recent_v: jax.Array | None = None
    page_table: jax.Array | None = None

    @property
    def grouped(self) -> bool:
        """Whether several codes share a byte."""
        return self.k.dtype == GROUPED

    @property
    def bits(self) -> int:
        """Of one element."""
        if self.grouped:
            return 8 * self.v.shape[2] // self.k.shape[3]
        return 8 * self.k.dtype.itemsize

    @property
    def page_size(self) -> int:
        """Tokens of a page; of a sequence where there are none."""
        return self.v.shape[3]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.page_size * (1 if self.page_table is None else self.page_table.shape[1])
