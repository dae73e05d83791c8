"""Configurations of the Hopper grouped kernel: what one is, which problems it takes, and how one is picked."""

import dataclasses
import functools
import math

import jax.numpy as jnp

HOPPER_SMS = 132
TILE = 64
BLOCK = 128  # inputs that 8-bit weights are padded to
ALIGNMENT = 8  # rows: where in x the copy engine's tiles begin
SHARED_MEMORY_BYTES = 232448 - 1024  # less barriers and alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch of the kernel is cut up.

    Attributes:
      block_m: rows of one expert a tile (the N of wgmma: a multiple of 8, at most 256).
      block_k: inputs a pipeline stage (a multiple of 64; of 128 for 8-bit weights).
      num_stages: stages of the ring that the copy engine fills.
      num_warpgroups: compute warpgroups; each owns `64 * row_tiles` outputs of the tile.
      scale_after: int4 only: multiply each group's product by its scale (cheap for few rows), or else the weights
        before it.
      row_tiles: 8-bit only: accumulators of 64 outputs of a warpgroup, which share the rows' side of wgmma.
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

    def shared_memory_bytes(self, bits: int, group_size: int, has_zero_point: bool, scale_bytes: int) -> int:
        """Shared memory that a launch takes: weights of `bits`, scales (and zero points) of `scale_bytes`."""
        stage = self.block_m * self.block_k * (2 if bits == 4 else 1) + self.block_n * self.block_k * bits // 8
        if bits == 4:
            stage += max(1, self.block_k // group_size) * self.block_n * scale_bytes * (1 + has_zero_point)
        return self.num_stages * stage + self.num_warpgroups * 2 * min(self.block_m, TILE) * TILE * 2


def supports(
    k: int,
    num_groups: int,
    x_dtype,
    weight_dtype,
    *,
    config: Config | None = None,
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
      has_zero_point: whether there are zero points.
      scale_dtype: of the scales.
      out_dtype: of the result.
    """
    x_dtype, weight_dtype, out_dtype = jnp.dtype(x_dtype), jnp.dtype(weight_dtype), jnp.dtype(out_dtype)
    int4 = weight_dtype == jnp.int32
    if out_dtype not in (jnp.bfloat16, jnp.float16):
        return f"the result is {out_dtype.name}; the kernel gives bfloat16 or float16"
    if int4 and x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_dtype.name}; the kernel takes bfloat16 or float16 with int4 weights"
    if not int4 and x_dtype != weight_dtype:
        return f"x is {x_dtype.name} and the weight {weight_dtype.name}; the kernel takes 8-bit codes of one dtype"
    if jnp.dtype(scale_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"scales are {jnp.dtype(scale_dtype).name}; the kernel takes bfloat16, float16 or float32"
    group_size = k // num_groups
    if num_groups > 1 and group_size != 32 and group_size % TILE:
        return f"groups of {group_size} inputs; the kernel takes 32, a multiple of {TILE}, or one group"
    if config is None:
        return None
    reason = _misfit(config, num_groups, group_size) if int4 else _misfit_8_bit(config, weight_dtype)
    if reason is not None:
        return reason
    used = config.shared_memory_bytes(4 if int4 else 8, group_size, has_zero_point, jnp.dtype(scale_dtype).itemsize)
    return f"{used} bytes of shared memory, at most {SHARED_MEMORY_BYTES}" if used > SHARED_MEMORY_BYTES else None


def _misfit(config: Config, num_groups: int, group_size: int) -> str | None:
    """Why a configuration does not fit int4 weights."""
    if num_groups > 1 and group_size % config.block_k and config.block_k % group_size:
        return f"block_k = {config.block_k} and groups of {group_size} do not divide one another"
    if not config.scale_after and config.block_k < 2 * min(config.block_k, group_size, TILE):
        return f"block_k = {config.block_k} is one product; scaling before it takes two, which alternate registers"
    return f"row_tiles = {config.row_tiles}; int4 takes 1" if config.row_tiles > 1 else None


def _misfit_8_bit(config: Config, weight_dtype) -> str | None:
    """Why a configuration does not fit 8-bit weights."""
    if config.block_k % BLOCK or config.scale_after:
        return (
            f"block_k = {config.block_k}, scale_after = {config.scale_after}; 8-bit takes multiples of {BLOCK}, False"
        )
    sums = config.block_m * (config.row_tiles if weight_dtype == jnp.int8 else config.row_tiles + 1)
    if sums > 384 or (sums > 128 and config.num_warpgroups > 2):
        return f"{sums} sums a thread's row for {config.num_warpgroups} warpgroups, which spill"
    return None


def tile_bound(rows: int, num_experts: int, block_m: int) -> int:
    """Row tiles that `rows` take at most, however they fall to the experts.

    An expert of s rows takes at most ceil((s + 7) / block_m) tiles, one of none none; rows past the sum of the sizes
    count as one expert more.
    """
    hit = min(rows, num_experts + 1)
    return (rows + hit * (ALIGNMENT - 1 + block_m - 1)) // block_m


def default_config(
    rows: int,
    num_experts: int,
    k: int,
    num_groups: int,
    x_dtype=jnp.bfloat16,
    weight_dtype=jnp.int32,
    has_zero_point: bool = False,
    scale_dtype=jnp.bfloat16,
) -> Config:
    """The configuration to run a problem with, chosen by the rows that an expert gets when all get their share.

    Raises:
      NotImplementedError: if no configuration takes the problem.
    """
    mean = rows / min(rows, num_experts)
    usual = mean + 2 * math.sqrt(mean) + ALIGNMENT - 1  # rows of most experts' tiles, which begin at multiples of 8
    block_m = next((m for m in (16, 32, 64, 128) if usual <= m), 128 if mean < 512 else 256)
    few = block_m <= TILE
    cuts = [
        Config(block_m=block_m, block_k=block_k, num_stages=stages, num_warpgroups=4 if block_m <= 32 else 2, **options)
        for block_m, options in _shapes(block_m, jnp.dtype(weight_dtype))
        for block_k in ((256, 128, 64) if few else (128, 64))
        for stages in range(8 if few else 4, 1, -1)
    ]
    takes = functools.partial(
        supports, k, num_groups, x_dtype, weight_dtype, has_zero_point=has_zero_point, scale_dtype=scale_dtype
    )
    fitting = (cut for cut in cuts if takes(config=cut) is None)
    config = next(fitting, None)
    if config is None:
        raise NotImplementedError(
            f"grouped_matmul has no Hopper configuration for {rows} rows, K={k}, {num_groups} groups"
        )
    return config


def _shapes(block_m: int, weight_dtype) -> list[tuple[int, dict]]:
    """Rows of a tile and what goes with them for a kind of weight."""
    if weight_dtype == jnp.int32:
        return [(block_m, {"scale_after": block_m <= TILE})]
    if weight_dtype == jnp.int8 or block_m <= TILE:
        return [(block_m, {"row_tiles": 1 if block_m in (16, 32, 256) else 2})]
    return [(min(block_m, BLOCK), {"row_tiles": 2})]
