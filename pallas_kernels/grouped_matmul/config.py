"""Configurations of the Hopper grouped kernel: what one is, which problems it takes, and how one is picked."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import jax.numpy as jnp

from pallas_kernels.int4_matmul import config as int4_config

HOPPER_SMS = 132
TILE = 64
BLOCK = 128  # inputs that 8-bit weights are padded to
ALIGNMENT = 8  # rows: where in x the copy engine's tiles begin
SHARED_MEMORY_BYTES = int4_config.SHARED_MEMORY_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch of the kernel is cut up.

    Attributes:
      block_m: rows of one expert a tile (the N of wgmma: a multiple of 16, at most 256).
      block_k: inputs a pipeline stage (a multiple of 64; of 128 for 8-bit weights).
      num_stages: stages of the ring that the copy engine fills.
      num_warpgroups: compute warpgroups; each owns `64 * row_tiles` outputs of the tile.
      scale_after: int4 weights: multiply each group's product by its scale (cheap for few rows, and the only way for
        8-bit activations), or else the weights before it.
      row_tiles: 8-bit weights: accumulators of 64 outputs of a warpgroup, which share the rows' side of wgmma.
      strip: row tiles of an expert that are visited under one column of outputs (L2 locality).
    """

    block_m: int
    block_k: int
    num_stages: int
    num_warpgroups: int
    scale_after: bool = False
    row_tiles: int = 1
    strip: int = 16

    @property
    def block_n(self) -> int:
        """Outputs a tile."""
        return TILE * self.num_warpgroups * self.row_tiles

    @property
    def multicast(self) -> int:
        """Blocks that share x, which the products of int4_matmul ask for: an expert's rows are too few to share."""
        return 1

    @property
    def k_warpgroups(self) -> int:
        """Warpgroups that take turns at the inputs of the same outputs: an expert's outputs are enough for all."""
        return 1

    def dense(self) -> int4_config.Config:
        """The cut of a dense int4 product with such tiles."""
        return int4_config.Config(
            block_m=self.block_m,
            block_k=self.block_k,
            num_stages=self.num_stages,
            num_warpgroups=self.num_warpgroups,
            split_k=1,
            scale_after=self.scale_after,
        )


def supports(
    k: int,
    num_groups: int,
    x_dtype,
    weight_dtype,
    *,
    config: Config | None = None,
    num_experts: int = 1,
    has_zero_point: bool = False,
    scale_dtype=jnp.bfloat16,
    out_dtype=jnp.bfloat16,
) -> str | None:
    """Why the Hopper kernel cannot take a problem, or None if it can.

    Args:
      k: inputs.
      num_groups: groups of inputs that share a scale (1 for per-channel).
      x_dtype: of the rows, as the product takes them.
      weight_dtype: int32 (packed int4), int8 or float8_e4m3fn.
      config: a configuration to check with it.
      num_experts: whose tables share the memory with it.
      has_zero_point: whether there are zero points.
      scale_dtype: of the scales.
      out_dtype: of the result.
    """
    x_dtype, weight_dtype, out_dtype = jnp.dtype(x_dtype), jnp.dtype(weight_dtype), jnp.dtype(out_dtype)
    if out_dtype not in (jnp.bfloat16, jnp.float16):
        return f"the result is {out_dtype.name}; the kernel gives bfloat16 or float16"
    most = _most_rows(num_groups, x_dtype, weight_dtype)
    if config is not None and (config.block_m % 16 or config.block_m > most):
        return f"block_m = {config.block_m}; the kernel takes multiples of 16 whose sums fit the registers, {most} here"
    if config is not None and (reason := _unsupported_table(config, num_experts)) is not None:
        return reason
    if weight_dtype != jnp.int32:
        return _unsupported_8_bit(k // num_groups, num_groups, x_dtype, weight_dtype, scale_dtype, config)
    if config is not None and (reason := _unsupported_int4(config, k // num_groups)) is not None:
        return reason
    dense = None if config is None else config.dense()
    return int4_config.supports(
        k, BLOCK, num_groups, x_dtype, config=dense, has_zero_point=has_zero_point, scale_dtype=scale_dtype
    )


def _unsupported_int4(config: Config, group_size: int) -> str | None:
    """Why the kernel cannot cut int4 weights up so, beyond what the dense one asks."""
    if config.row_tiles > 1:
        return f"row_tiles = {config.row_tiles}; int4 weights take 1"
    if config.num_warpgroups > 3 and config.block_m > 16 and config.block_k > BLOCK > group_size:
        return f"groups of {group_size} in stages of {config.block_k} by {config.num_warpgroups} warpgroups spill"
    return None


def _unsupported_table(config: Config, num_experts: int) -> str | None:
    """Why the table of experts does not fit: it lies in the half of the staging memory that this kernel leaves."""
    table, room = 2 * 4 * (num_experts + 2), config.num_warpgroups * min(config.block_m, TILE) * TILE * 2
    return f"a table of {num_experts} experts takes {table} bytes, {room} are left" if table > room else None


def _most_rows(num_groups: int, x_dtype, weight_dtype) -> int:
    """Rows of a tile whose sums fit the registers, of which float32 totals of 8-bit products take twice as many."""
    if x_dtype.itemsize == 2 or (x_dtype == jnp.int8 and num_groups == 1):
        return 2 * BLOCK
    return BLOCK if weight_dtype != jnp.int32 else 112


def _unsupported_8_bit(
    group_size: int, num_groups: int, x_dtype, weight_dtype, scale_dtype, config: Config | None
) -> str | None:
    """Why the kernel cannot take 8-bit weights."""
    if x_dtype != weight_dtype:
        return f"x is {x_dtype.name} and the weight {weight_dtype.name}; the kernel takes 8-bit codes of one dtype"
    if jnp.dtype(scale_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"scales are {jnp.dtype(scale_dtype).name}; the kernel takes bfloat16, float16 or float32"
    if num_groups > 1 and group_size % BLOCK:
        return f"groups of {group_size} inputs; with 8-bit weights the kernel takes multiples of {BLOCK}, or one group"
    if config is None:
        return None
    if num_groups > 1 and group_size % config.block_k and config.block_k % group_size:
        return f"block_k = {config.block_k} and groups of {group_size} do not divide one another"
    if config.block_k % BLOCK or config.scale_after:
        return (
            f"block_k = {config.block_k}, scale_after = {config.scale_after}; 8-bit takes multiples of {BLOCK}, False"
        )
    promoted = weight_dtype != jnp.int8 or num_groups > 1
    accumulators = config.row_tiles + promoted  # totals, and the product under way
    room = 128 if config.num_warpgroups > 2 else 384 if num_groups == 1 else 256
    if config.block_m * accumulators > room:
        return f"{accumulators} accumulators of {config.block_m} rows in {config.num_warpgroups} warpgroups spill"
    stage = (config.block_m + config.block_n) * config.block_k
    if num_groups > 1:
        stage += max(1, config.block_k // group_size) * config.block_n * jnp.dtype(scale_dtype).itemsize
    used = config.num_stages * stage + config.num_warpgroups * 2 * min(config.block_m, TILE) * TILE * 2
    return f"{used} bytes of shared memory, at most {SHARED_MEMORY_BYTES}" if used > SHARED_MEMORY_BYTES else None


def tile_bound(rows: int, num_experts: int, block_m: int) -> int:
    """Row tiles that `rows` take at most, however they fall to the experts.

    An expert of s rows takes at most ceil((s + 7) / block_m) tiles, one of none none; rows past the sum of the sizes
    count as one expert more.
    """
    hit = min(rows, num_experts + 1)
    return (rows + hit * (ALIGNMENT - 1 + block_m - 1)) // block_m


def widths(block_m: int, step: int = ALIGNMENT) -> tuple[int, ...]:
    """Rows that a tile may be cut to, since the tensor cores' time is that of the rows that are multiplied.

    A tile of more than 64 rows that holds all of an expert of about as many is cut finely; one of 128 and more is one
    of several, of which the last holds anything. Each width is a body of the kernel, and takes its time to compile.

    Args:
      block_m: rows of a whole tile.
      step: what widths are multiples of.
    """
    if block_m <= TILE:
        return (block_m,)
    if block_m < BLOCK:
        return tuple(block_m - less for less in (32, 24, 16, 0) if less % step == 0)
    part = block_m // 4 if block_m == BLOCK else block_m // 2
    return tuple(range(part, block_m + 1, part))


def _expected_cost(mean: float, block_m: int) -> float:
    """What tiles of `block_m` rows cost an expert of `mean` rows on average, in rows of the tensor cores' time.

    Tokens fall to experts independently, and a tile begins up to 7 rows early.
    """
    held, spread = mean + (ALIGNMENT - 1) / 2, math.sqrt(mean + (ALIGNMENT**2 - 1) / 12)
    more_than = lambda rows: 0.5 * math.erfc((rows - held) / spread / math.sqrt(2)) if rows else 1.0  # noqa: E731
    # The weight must arrive and be unpacked however few the rows, as the dense kernel's times say; a large tile leaves
    # the ring less room.
    price = lambda width: max(width, 45 + 0.79 * width) + block_m / 20 if width else 0.0  # noqa: E731
    cuts = (0, *widths(block_m))
    tiles = range(0, math.ceil(held + 4 * spread), block_m)
    return sum(
        more_than(first + less) * (price(more) - price(less))
        for first in tiles
        for less, more in itertools.pairwise(cuts)
    )


def _warpgroups(tiles: int, k: int, n: int) -> int:
    """Warpgroups that share the weights of few rows: more for fewer stages to wait for, fewer for even waves."""

    def microseconds(count):
        # 32 kB from memory and 30 thousand codes a warpgroup in a microsecond, 1.8 a tile.
        codes = TILE * count * k
        waves = math.ceil(tiles * math.ceil(n / (TILE * count)) / HOPPER_SMS)
        return waves * (max(codes / 2 / 32e3, codes / 30.5e3 / count) + 1.8)

    return min((1, 2, 3, 4), key=microseconds)


def bucket(rows: int) -> int:
    """The number of rows that stands for others in `tuned.json`: a power of two."""
    return 1 << (rows - 1).bit_length()


@functools.cache
def _tuned() -> dict[tuple, Config]:
    """The fastest configurations timed, on the one kind of device that was measured; they serve other Hoppers too."""
    entries = json.loads((pathlib.Path(__file__).parent / "tuned.json").read_text())["NVIDIA H200"]["entries"]
    names = ("x", "weight", "groups", "experts", "k", "n", "rows")
    return {tuple(entry[name] for name in names): Config(**entry["config"]) for entry in entries}


def default_config(
    rows: int,
    num_experts: int,
    k: int,
    n: int,
    num_groups: int,
    x_dtype=jnp.bfloat16,
    weight_dtype=jnp.int32,
    has_zero_point: bool = False,
    scale_dtype=jnp.bfloat16,
) -> Config:
    """The configuration to run a problem with: what was tuned, else chosen for experts that all get their share.

    Raises:
      NotImplementedError: if no configuration takes the problem.
    """
    x_dtype, weight_dtype = jnp.dtype(x_dtype), jnp.dtype(weight_dtype)
    takes = functools.partial(
        supports,
        k,
        num_groups,
        x_dtype,
        weight_dtype,
        num_experts=num_experts,
        has_zero_point=has_zero_point,
        scale_dtype=scale_dtype,
    )
    tuned = _tuned().get((x_dtype.name, weight_dtype.name, num_groups, num_experts, k, n, bucket(rows)))
    if tuned is not None and takes(config=tuned) is None:
        return tuned
    hit = min(rows, num_experts)
    mean = rows / hit
    most = _most_rows(num_groups, x_dtype, weight_dtype)
    sizes = [size for size in (*range(16, BLOCK + 1, 16), 2 * BLOCK) if size <= most]
    block_m = min(sizes, key=functools.partial(_expected_cost, mean))
    int4, codes = weight_dtype == jnp.int32, x_dtype.itemsize == 1
    few = block_m <= TILE
    depths = (256, 128, 64) if few or (int4 and codes) else (128, 64)
    cuts = (
        Config(
            block_m=size,
            block_k=block_k,
            num_stages=stages,
            num_warpgroups=_warpgroups(hit, k, n) if size <= 32 else 2,
            scale_after=int4 and (few or codes),
            row_tiles=1 if int4 or num_groups > 1 or size <= 32 or size > BLOCK else 2,
        )
        for size, block_k, stages in itertools.product(
            sorted({block_m, min(block_m, BLOCK)}, reverse=True), depths, range(8, 1, -1)
        )
    )
    config = next((cut for cut in cuts if takes(config=cut) is None), None)
    if config is None:
        raise NotImplementedError(
            f"grouped_matmul has no Hopper configuration for {rows} rows, K={k}, {num_groups} groups"
        )
    return config
