"""Configurations of the Hopper 8-bit kernel: what one is, which problems it takes, and the default for each."""

import dataclasses
import functools
import json
import math
import pathlib

import jax.numpy as jnp

from pallas_kernels.int8_matmul.layout import BLOCK

HOPPER_SMS = 132
TILE = 64  # rows of one wgmma
SHARED_MEMORY_BYTES = 232448 - 1024  # less barriers and alignment
COPY_ALIGNMENT = 128  # bytes: where in shared memory the copy engine can write to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch of the kernel is cut up.

    Attributes:
        block_m: tokens a tile.
        block_n: outputs a tile.
        block_k: inputs a pipeline stage, a multiple of 128.
        num_stages: stages of the ring that the copy engine fills.
        num_warpgroups: compute warpgroups; they divide the rows of a tile between them, 64 or 128 each.
        weights_first: outputs, not tokens, are the rows of wgmma (for few tokens).
        multicast: blocks of a cluster whose tiles share an operand, each fetching a part of it for all: the larger one,
            or the tokens if one tile holds them all.
        split_k: blocks of a cluster that share a tile's inputs; their sums meet in distributed shared memory.
        snake_width: output tiles of a strip of the traversal order (L2 locality when there are many token tiles).
    """

    block_m: int
    block_n: int
    block_k: int = BLOCK
    num_stages: int
    num_warpgroups: int = 2
    weights_first: bool = False
    multicast: int = 1
    split_k: int = 1
    snake_width: int = 8

    def __post_init__(self):
        if self.rows % (64 * self.num_warpgroups) or self.columns % 8 or not 8 <= self.columns <= 256:
            raise ValueError(
                f"{self}: a warpgroup takes a multiple of 64 rows ({self.rows} in all); columns ({self.columns}) are a "
                "multiple of 8 up to 256"
            )
        if self.block_k % BLOCK or self.num_stages < 2:
            raise ValueError(f"{self}: block_k is a multiple of {BLOCK}, and num_stages at least 2")
        if self.multicast > 1 and self.split_k > 1:
            raise ValueError(f"{self}: a cluster shares an operand or splits the inputs, not both")
        if self.split_k > 1 and self.rows > 64 * self.num_warpgroups:
            raise ValueError(f"{self}: a warpgroup that splits the inputs takes 64 rows")

    @property
    def rows(self) -> int:
        """Rows of a tile in wgmma's sense."""
        return self.block_n if self.weights_first else self.block_m

    @property
    def columns(self) -> int:
        """Columns of a tile in wgmma's sense."""
        return self.block_m if self.weights_first else self.block_n

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.multicast * self.split_k

    @property
    def chunks(self) -> int:
        """Pieces of a tile's columns that different blocks of a cluster add up."""
        return max(q for q in range(1, self.split_k + 1) if self.columns % (8 * q) == 0)

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return self.columns // self.chunks

    def piece(self, out_dtype) -> int:
        """Columns written out at once: 64, or 128 bytes of an output row (64 where stages need the room)."""
        if self.weights_first:
            return min(self.chunk, 64)
        row_bytes = 64 if self.block_m * self.block_n > BLOCK * BLOCK else 128
        return min(self.chunk, row_bytes // jnp.dtype(out_dtype).itemsize)

    def stagings(self, out_dtype) -> int:
        """Buffers that pieces alternate between: two, if that brings every tile back to the first."""
        return 1 if self.chunk // self.piece(out_dtype) % 2 else 2

    def shared_memory_bytes(self, out_dtype) -> int:
        """Shared memory that a launch takes at most, whatever scales it has."""
        stage = (self.block_m + self.block_n) * self.block_k + 4 * self.block_m * self.block_k // BLOCK
        vectors = 2 * 4 * (2 * max(self.block_m, COPY_ALIGNMENT // 4) + 3 * self.block_n)
        out = self.stagings(out_dtype) * 64 * self.piece(out_dtype) * jnp.dtype(out_dtype).itemsize
        partial = (self.split_k - 1) * 64 * self.chunk * 4
        return self.num_stages * stage + vectors + self.num_warpgroups * (out + partial)


def shares_x(config: Config, m: int) -> bool:
    """Whether a multicast cluster's tiles have the tokens in common, not the outputs."""
    return config.block_m > config.block_n or m <= config.block_m


def num_clusters(size: int, num_sms: int = HOPPER_SMS) -> int:
    """Clusters of `size` blocks that run at once: some of Hopper's processor groups hold 18 SMs, and fours leave 2."""
    return num_sms // size if size <= 2 else (num_sms - 4) // size


def supports(
    x_dtype,
    *,
    blocked: bool,
    mixed: bool = False,
    several: bool = False,
    config: Config | None = None,
    out_dtype=jnp.bfloat16,
) -> str | None:
    """Say why the Hopper kernel cannot take a problem, or None if it can.

    Args:
        x_dtype: dtype of both operands' codes.
        blocked: both scales are blocked, x's by 1 x 128 and the weight's by 128 x 128.
        mixed: only one of them is.
        several: one launch takes several weights.
        config: a configuration to check with it.
        out_dtype: of the result.
    """
    if jnp.dtype(x_dtype) not in (jnp.int8, jnp.float8_e4m3fn):
        return f"codes of {jnp.dtype(x_dtype).name}; the kernel takes int8 and float8_e4m3fn"
    if mixed:
        return "only one of the scales is blocked; the kernel takes x's 1 x 128 with the weight's 128 x 128, or neither"
    if config is None:
        return None
    if config.weights_first and jnp.dtype(out_dtype).itemsize > 2:
        return "weights_first with a 32-bit result, whose transpose does not store without bank conflicts"
    if blocked and config.weights_first and config.block_n // config.num_warpgroups > 64:
        return "blocked scales with more than 64 outputs a warpgroup"
    if blocked and not config.weights_first and config.block_n != BLOCK:
        return f"blocked scales with block_n = {config.block_n}; it must be {BLOCK}"
    if blocked and 4 * config.block_m * config.block_k // BLOCK % COPY_ALIGNMENT:
        return f"blocked scales of a {config.block_m} x {config.block_k} stage, which are no multiple of 128 bytes"
    if several and (blocked or (jnp.dtype(x_dtype) != jnp.int8 and config.rows > TILE * config.num_warpgroups)):
        return "several weights with block scales, or 128 rows of fp8 totals a warpgroup: their epilogues spill"
    used = config.shared_memory_bytes(out_dtype)
    return f"{used} bytes of shared memory, at most {SHARED_MEMORY_BYTES}" if used > SHARED_MEMORY_BYTES else None


def candidates(m: int, k: int, n: int, x_dtype, *, blocked: bool = False, out_dtype=jnp.bfloat16) -> list[Config]:
    """The configurations worth trying for a problem."""
    promoted = blocked or jnp.dtype(x_dtype) != jnp.int8
    cuts: list[dict] = []
    if m <= 256:
        whole = max(8, 1 << (m - 1).bit_length())
        cuts += [
            {
                "weights_first": True,
                "block_m": block_m,
                "block_n": 64 * count,
                "block_k": block_k,
                "num_warpgroups": count,
                "split_k": split,
                "multicast": multicast,
            }
            for block_m in sorted({min(whole, 64), min(whole, 128), whole if not promoted else 8})
            if block_m >= min(whole, 64)
            for count in ((1, 2, 4) if block_m <= 64 else (1, 2))
            for block_k in (128, 256, 512)
            for split, multicast in ((1, 1), (2, 1), (4, 1), (1, 2))
            if multicast == 1 or block_m >= 64
            if split == 1 or block_m <= 128
        ]
    if m > 64 or jnp.dtype(out_dtype).itemsize > 2:
        tiles = [(128, 128)] + [(128, 256), (128, 192)] * (not promoted) + [(256, 128)] * (not blocked)
        tiles += [(128, 64)] if not blocked and m <= 1024 else []
        cuts += [
            {"block_m": block_m, "block_n": block_n, "multicast": multicast, "snake_width": width}
            for block_m, block_n in tiles
            for multicast in (1, 2)
            for width in (8, 16)
        ]
        cuts += [{"block_m": 192, "block_n": 128, "num_warpgroups": 3, "multicast": multicast} for multicast in (1, 2)]
        cuts += [{"block_m": 64, "block_n": 128, "num_warpgroups": 1, "split_k": split} for split in (1, 2, 4)]
    return [config for cut in cuts if (config := _deepest(cut, k, x_dtype, blocked, out_dtype)) is not None]


def _deepest(cut: dict, k: int, x_dtype, blocked: bool, out_dtype) -> Config | None:
    """A cut with as many stages as fit and as there are steps."""
    configs = [Config(**cut, num_stages=stages) for stages in range(2, 13)]
    steps = -(-k // configs[0].block_k) // configs[0].split_k
    fitting = [c for c in configs if supports(x_dtype, blocked=blocked, config=c, out_dtype=out_dtype) is None]
    # An exact sum gives a stage back while the next one is multiplied: with two there is none to fill meanwhile.
    least = 3 if not blocked and jnp.dtype(x_dtype) == jnp.int8 and steps > 2 else 2
    fitting = [c for c in fitting if least <= c.num_stages <= max(2, steps)]
    return fitting[-1] if fitting and steps else None


def default_config(m: int, k: int, n: int, x_dtype, *, blocked: bool = False, out_dtype=jnp.bfloat16) -> Config:
    """The fastest configuration timed for such a problem (`tuned.json`), else the cost model's choice."""
    found = _tuned().get((jnp.dtype(x_dtype).name, blocked, bucket(m), k, n))
    if found is None and m <= 256:  # Bound by the same bytes, int8 takes what e4m3 was tuned to.
        found = _tuned().get(("float8_e4m3fn", blocked, bucket(m), k, n))
    if found is not None and supports(x_dtype, blocked=blocked, config=found, out_dtype=out_dtype) is None:
        return found
    return min(
        candidates(m, k, n, x_dtype, blocked=blocked, out_dtype=out_dtype),
        key=lambda c: predicted_microseconds(c, m, k, n),
    )


def bucket(m: int) -> int:
    """The token count that stands for others in `tuned.json`: a power of two from 8 to 4096."""
    return min(4096, max(8, 1 << (m - 1).bit_length()))


def xla_is_faster(m: int, k: int, n: int, x_dtype, *, blocked: bool = False) -> bool:
    """Whether XLA's program was faster than the kernel on such a problem (`tuned.json`)."""
    return (jnp.dtype(x_dtype).name, blocked, bucket(m), k, n) in _faster_by_xla()


@functools.cache
def _measured() -> dict:
    """The tables of the one kind of device that was measured; they serve the other Hoppers too."""
    return json.loads((pathlib.Path(__file__).parent / "tuned.json").read_text())["NVIDIA H200"]


@functools.cache
def _tuned() -> dict[tuple, Config]:
    return {_key(row): Config(**row["config"]) for row in _measured()["entries"]}


@functools.cache
def _faster_by_xla() -> frozenset[tuple]:
    return frozenset(map(_key, _measured()["xla_faster"]))


def _key(row: dict) -> tuple:
    return row["dtype"], row["blocked"], row["m"], row["k"], row["n"]


def predicted_microseconds(config: Config, m: int, k: int, n: int) -> float:
    """A coarse model, fitted to 200 timings on an H200 (off by 4 % in the mean): bytes or products, plus steps."""
    c = config
    m_tiles, n_tiles = math.ceil(m / c.block_m), math.ceil(n / c.block_n)
    waves = math.ceil(math.ceil(m_tiles * n_tiles / c.multicast) / num_clusters(c.cluster))
    blocks = m_tiles * n_tiles * c.split_k
    steps = math.ceil(math.ceil(k / c.block_k) / c.split_k)
    x_bytes, weight_bytes = (size * steps * c.block_k for size in (min(m, c.block_m), c.block_n))
    shared = x_bytes if shares_x(c, m) else weight_bytes
    fetched = x_bytes + weight_bytes - shared * (1 - 1 / c.multicast)
    # Bytes a microsecond: 4.3 M from memory, 10.8 M from the L2 cache, 119 thousand of them to one SM.
    copy = max(weight_bytes / min(m_tiles, 8) * blocks / 4.3e6, fetched * blocks / 10.8e6, fetched * waves / 119e3)
    copy *= max(1.0, 21.6e3 / (c.num_stages * c.block_n * c.block_k))
    products = waves * c.block_m * c.block_n * steps * c.block_k / 5.83e6
    products *= 1.0 if c.block_m * c.block_n >= 2 * BLOCK * BLOCK else 1.07
    # Stores to another SM's shared memory are 8 bytes a thread; clusters of four take turns at them.
    reduction = 1.33e-4 * c.block_m * c.block_n * c.split_k * (c.split_k - 1) / 2
    return 2.7 + max(copy, products) + waves * (0.0087 * steps + reduction + 0.7)
