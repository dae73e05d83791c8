"""How the Hopper decode kernel cuts its work, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.cache import GROUPED, Cache
from pallas_kernels.decode_attention.layout import GROUP as GROUP_SIZE

SHARED_MEMORY_BYTES = 227 * 1024  # of one block at most; a multiprocessor has what each block reserves more
RESERVED_BYTES = 1024
ALIGNMENT = 1024
STATISTIC_ROWS = 64  # the maxima and sums travel as a tile of equal rows
MULTIPROCESSORS = 132
CLUSTER_GROUPS = 8, 16  # groups of multiprocessors that a cluster must fit into, and their size at least
HEAD_DIMS = (64, 128)
LARGEST_GROUP = 64
LARGEST_SPLIT = 8  # blocks of a cluster
BLOCKS = 4  # resident on a multiprocessor, by registers
ENOUGH_BLOCKS = 3  # hide the latency of one another's products and softmax


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel tiles its work.

    Attributes:
        block: tokens of one tile.
        stages: tiles in flight of one block of threads.
        split: blocks of one cluster, which share the context of a sequence and head.
        teams: warpgroups of a block, which share its part of the context; 2 need a split of at least 2.
    """

    block: int = 64
    stages: int = 3
    split: int = 1
    teams: int = 1

    def __post_init__(self):
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128, got {self.block}")
        if self.stages < 1:
            raise ValueError(f"stages must be positive, got {self.stages}")
        if not 1 <= self.split <= LARGEST_SPLIT:
            raise ValueError(f"split must be from 1 to {LARGEST_SPLIT}, got {self.split}")
        if self.teams not in (1, 2) or self.teams > self.split:
            raise ValueError(f"teams must be 1, or 2 with a split of at least 2, got {self.teams} and {self.split}")


def default_config(q: jax.Array, cache: Cache) -> Config:
    """The configuration used when the caller names none: full waves of blocks, some at a time on a multiprocessor."""
    pairs = q.shape[0] * cache.k.shape[1]
    block, splits = _block(cache), range(1, LARGEST_SPLIT + 1)
    # Unpacking leaves no register for a remainder that is not a mask.
    stages = (2, 4) if cache.bits < 16 else (2, 3, 4, 6)
    candidates = [Config(block, count, split) for count in stages for split in splits]
    if cache.grouped:  # bound by a tile's instructions, not by memory
        candidates += [dataclasses.replace(c, teams=2) for c in candidates if c.split > 1]
    fitting = [
        c
        for c in candidates
        if shared_memory(q, cache, c) <= SHARED_MEMORY_BYTES and c.split * c.teams * 128 <= cache.capacity
    ]

    def resident(config: Config) -> int:
        block_bytes = shared_memory(q, cache, config) + RESERVED_BYTES
        most = min(BLOCKS // config.teams, (SHARED_MEMORY_BYTES + RESERVED_BYTES) // block_bytes)
        return min(most, -(-pairs * config.split // MULTIPROCESSORS))

    def waste(config: Config) -> float:
        """Time over that of blocks that fill every wave; memory's speed is shared by the blocks that are resident."""
        groups, size = CLUSTER_GROUPS
        usable = MULTIPROCESSORS if config.split <= 2 else groups * (size // config.split) * config.split
        blocks, together = pairs * config.split, resident(config)
        return -(-blocks // (usable * together)) * together * MULTIPROCESSORS / blocks

    if not fitting:
        return Config(block, 2, 1)
    least = min(map(waste, fitting))
    good = [c for c in fitting if waste(c) <= 1.1 * least]
    return min(good, key=lambda c: (-min(resident(c) * c.teams, ENOUGH_BLOCKS), c.split, -c.stages))


def _block(cache: Cache) -> int:
    """Tokens of a tile: a row of 8-bit values must be 128 bytes of memory side by side, or DRAM is slow."""
    fits = cache.recent_k is None or cache.recent_k.shape[2] % 128 == 0
    fits = fits and (cache.page_table is None or cache.page_size % 128 == 0)
    return 128 if cache.bits == 8 and fits else 64


def supports(q: jax.Array, cache: Cache, config: Config) -> str | None:
    """Returns why the Hopper kernel cannot compute this call, or None if it can."""
    k = cache.k
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if k.dtype not in (q.dtype, jnp.int8, jnp.float8_e4m3fn, GROUPED):
        return f"k must be {q.dtype}, int8, float8_e4m3fn or packed uint8, got {k.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, got {q.shape[-1]}"
    if q.shape[1] // k.shape[1] > LARGEST_GROUP:
        return f"at most {LARGEST_GROUP} query heads may share keys, got {q.shape[1]} over {k.shape[1]}"
    if 0 in q.shape or 0 in k.shape:
        return f"empty operands: q {q.shape}, k {k.shape}"
    tokens, paged = cache.page_size, cache.page_table is not None
    if tokens % 16 or (paged and tokens % config.block):
        page = tokens if paged else None
        return f"the capacity must be a multiple of 16 and a page of {config.block} tokens, got {tokens}, {page}"
    if cache.recent_k is not None:
        window, dtype = cache.recent_k.shape[2], cache.recent_k.dtype
        if window % config.block or dtype not in (jnp.bfloat16, jnp.float16):
            return f"recent tokens must be a multiple of {config.block} in 16 bits, got {window} of {dtype}"
    bytes_needed = shared_memory(q, cache, config)
    if bytes_needed > SHARED_MEMORY_BYTES:
        return f"{config} needs {bytes_needed} bytes of shared memory, Hopper has {SHARED_MEMORY_BYTES}"
    return None


def padded_group(heads: int, kv_heads: int) -> int:
    """Query heads that share keys, as columns of a product: a multiple of 8."""
    return -(-(heads // kv_heads) // 8) * 8


def shared_memory(q: jax.Array, cache: Cache, config: Config) -> int:
    """Bytes of shared memory of one block: buffers in multiples of 1 KB, then the barriers."""
    head_dim, group = q.shape[2], padded_group(q.shape[1], cache.k.shape[1])
    staged, block = config.stages * config.block, config.block
    tiles = 2 * [staged * head_dim * cache.bits // 8]
    buffers = [2 * group * head_dim, 2 * group * head_dim, 2 * group * block, 4 * 4 * group]  # last, maxima of warps
    if cache.grouped:
        tiles += 4 * [2 * staged * head_dim // GROUP_SIZE]
    elif cache.bits == 8:
        tiles += 2 * [4 * staged]
    sums = [4 * (config.split * config.teams - 1) * rows * group for rows in (head_dim, STATISTIC_ROWS, STATISTIC_ROWS)]
    if cache.recent_k is not None:
        tiles = [max(sum(map(_aligned, tiles)), 2 * 2 * block * head_dim)]
        buffers += [2 * group * head_dim, 2 * group * block]
    barriers = 8 * (config.stages + 4)
    return config.teams * (sum(map(_aligned, tiles + buffers)) + barriers) + sum(map(_aligned, sums))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
