"""Configurations of the Hopper grouped kernel: what one is, which problems it takes, and how one is picked."""

import dataclasses
import math

import jax.numpy as jnp

HOPPER_SMS = 132
TILE = 64
ALIGNMENT = 8  # rows: where in x the copy engine's tiles begin
SHARED_MEMORY_BYTES = 232448 - 1024  # less barriers and alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch of the kernel is cut up.

    Attributes:
      block_m: rows of one expert a tile (the N of wgmma: a multiple of 8, at most 256).
      block_k: inputs a pipeline stage (a multiple of 64; of 128 for 8-bit weights).
      num_stages: stages of the ring that the copy engine fills.
      num_warpgroups: compute warpgroups; each owns 64 outputs of the tile.
      scale_after: int4 only: multiply each group's product by its scale (cheap for few rows), or else the weights
        before it.
      strip: row tiles of an expert that are visited under one column of outputs (L2 locality).
    """

    block_m: int
    block_k: int
    num_stages: int
    num_warpgroups: int
    scale_after: bool = False
    strip: int = 16

    @property
    def block_n(self) -> int:
        """Outputs a tile."""
        return TILE * self.num_warpgroups

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
    if weight_dtype != jnp.int32:
        return f"weights are {weight_dtype.name}; the kernel takes int4"
    if x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_dtype.name}; the kernel takes bfloat16 or float16 with int4 weights"
    if out_dtype != x_dtype:
        return f"the result is {out_dtype.name}; the kernel gives x's {x_dtype.name}"
    if jnp.dtype(scale_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"scales are {jnp.dtype(scale_dtype).name}; the kernel takes bfloat16, float16 or float32"
    group_size = k // num_groups
    if num_groups > 1 and group_size != 32 and group_size % TILE:
        return f"groups of {group_size} inputs; the kernel takes 32, a multiple of {TILE}, or one group"
    if config is None:
        return None
    if num_groups > 1 and group_size % config.block_k and config.block_k % group_size:
        return f"block_k = {config.block_k} and groups of {group_size} do not divide one another"
    if not config.scale_after and config.block_k < 2 * min(config.block_k, group_size, TILE):
        return f"block_k = {config.block_k} is one product; scaling before it takes two, which alternate registers"
    used = config.shared_memory_bytes(4, group_size, has_zero_point, jnp.dtype(scale_dtype).itemsize)
    return f"{used} bytes of shared memory, at most {SHARED_MEMORY_BYTES}" if used > SHARED_MEMORY_BYTES else None


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
    block_ks = (256, 128, 64) if few else (128, 64)
    for block_k in block_ks:
        for stages in range(8 if few else 4, 1, -1):
            config = Config(
                block_m=block_m,
                block_k=block_k,
                num_stages=stages,
                num_warpgroups=4 if block_m <= 32 else 2,
                scale_after=few,
            )
            reason = supports(
                k,
                num_groups,
                x_dtype,
                weight_dtype,
                config=config,
                has_zero_point=has_zero_point,
                scale_dtype=scale_dtype,
                out_dtype=x_dtype,
            )
            if reason is None:
                return config
    raise NotImplementedError(f"grouped_matmul has no Hopper configuration for {rows} rows, K={k}, {num_groups} groups")
