"""What a launch of the attention kernel and one of its blocks know: options, operands, shared memory, tiles."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.config import ROWS, SUM_CHANNELS, Config
from pallas_kernels.attention.quantize import F16, INT8
from pallas_kernels.attention.reference import Mode, Window
from pallas_kernels.attention.registers import MAGIC
from pallas_kernels.attention.tiles import key_tiles

MIXED_BYTES = 32 << 20  # of keys and values, of a Hopper's 50 MB of L2 cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a launch."""

    mode: Mode
    batch: int
    tokens: int
    kv_tokens: int
    heads: int
    heads_per_kv_head: int
    kv_head_bytes: int  # of keys and values
    window: Window
    scale: float
    config: Config

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.config.warpgroups * ROWS

    @property
    def heads_together(self) -> int:
        """Heads whose blocks are mixed, so that the longest of many can go first: all in the L2 cache.

        One where all blocks are as long.
        """
        if self.window[1] is None:
            return 1
        kv_heads = self.heads // self.heads_per_kv_head
        most = max(1, MIXED_BYTES // self.kv_head_bytes)
        return self.heads_per_kv_head * next(n for n in range(min(most, kv_heads), 0, -1) if kv_heads % n == 0)

    @property
    def grid(self) -> dict[str, int]:
        """Blocks, the last axis fastest: some heads at a time, of these the last queries first.

        Of causal ones those see the most keys, and longest first fills the machine best.
        """
        together = self.heads_together
        return {
            "batch": self.batch,
            "heads": self.heads // together,
            "query_tile": pl.cdiv(self.tokens, self.rows),
            "head": together,
        }

    @property
    def float_scores(self) -> bool:
        """Whether Q K is computed in their own format."""
        return self.mode.scores is None

    @property
    def half_scores(self) -> bool:
        """Whether Q K is summed in float16."""
        return self.mode.scores == F16

    @property
    def scaled_scores(self) -> bool:
        """Whether queries and keys are codes with scales."""
        return not self.float_scores and not self.half_scores

    @property
    def float_values(self) -> bool:
        """Whether P V is computed in V's own format."""
        return self.mode.values is None

    @property
    def sum_channels(self) -> int:
        """Channels of ones behind those of 8-bit values: the sum of a query's rounded weights, by the same product."""
        return SUM_CHANNELS[self.mode.values]

    @property
    def offset(self) -> float:
        """How much larger than the products of codes the scores are."""
        return MAGIC if self.mode.scores == INT8 else 0.0


class Operands(NamedTuple):
    """Arrays in global memory: no scales of what stays float, nor ones; no lengths where there are none."""

    q: Any
    k: Any
    k_scale: Any
    v: Any
    v_scale: Any
    v_block_scale: Any  # and its reciprocal [B, K, tiles, 2]
    lengths: tuple
    ones: Any  # [sum_channels, block_kv]


class Shared(NamedTuple):
    """Shared memory and barriers of one block, in the order in which they are allocated."""

    q: Any  # queries as they come, outputs as they go
    codes: Any  # of queries, None for float scores
    k: Any
    v: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    ones_ready: Any  # None for float values


class Block:
    """What one block computes: 64 queries of one head for each consumer warpgroup."""

    def __init__(self, plan: Plan, refs: Operands):
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("head")
        self.head += lax.axis_index("heads") * plan.heads_together
        self.kv_head = lax.div(self.head, jnp.int32(plan.heads_per_kv_head))
        query_tile = lax.axis_size("query_tile") - 1 - lax.axis_index("query_tile")
        self.first_query = query_tile * plan.rows
        every = jnp.int32(plan.tokens), jnp.int32(plan.kv_tokens)
        self.q_length, self.kv_length = (ref[self.batch] for ref in refs.lengths) if refs.lengths else every
        block = plan.config.block_kv
        aligned = not refs.lengths and plan.kv_tokens % block == 0
        self.tiles = key_tiles(
            self.first_query, plan.rows, self.q_length, self.kv_length, plan.window, block, aligned=aligned
        )
        self.stages = plan.config.stages

    def slot(self, tile):
        """The stage that a tile is copied to."""
        return lax.rem(tile - self.tiles.begin, jnp.int32(self.stages))
