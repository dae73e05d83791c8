"""Configurations of the Hopper int4 kernel: what one is, and which problems it takes."""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.int4_matmul.formats import FORMATS
from pallas_kernels.int4_matmul.layout import TILE

HOPPER_SMS = 132
FEW_TOKENS = 64  # up to here the product is bound by memory, and its tile holds every token
SHARED_MEMORY_BYTES = 232448 - 1024  # less barriers and alignment
LARGEST_INT8_GROUP = 2**31 // (16 * 8 * 128)  # of codes times 16
DEEPEST_FP8 = 256  # inputs that the fp8 tensor core sums by itself: it keeps about 14 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How one launch of the kernel is cut up.

    Attributes:
      block_m: tokens a tile (the N of wgmma: a multiple of 8, at most 256).
      block_k: inputs a pipeline stage (a multiple of 64).
      num_stages: stages of the ring that the copy engine fills.
      num_warpgroups: compute warpgroups; each owns 64 outputs of the tile.
      split_k: blocks of a cluster that share a tile's inputs; their sums meet in distributed shared memory.
      multicast: blocks of a cluster that share x, each with output tiles of its own.
      scale_after: multiply each group's product by its scale (cheap for few tokens), or else the weights before it.
      snake_width: output tiles of a strip of the traversal order (L2 locality when there are many token tiles).
      blocks_per_sm: blocks that share an SM, so that one unpacks while another waits; more than one only where a block
        is one compute warpgroup of few tokens, whose registers leave room.
      k_warpgroups: compute warpgroups that take turns at the stages of the same outputs; their sums meet in shared
        memory.
    """

    block_m: int
    block_k: int
    num_stages: int
    num_warpgroups: int
    split_k: int
    scale_after: bool
    multicast: int = 1
    snake_width: int = 8
    blocks_per_sm: int = 1
    k_warpgroups: int = 1

    @property
    def block_n(self) -> int:
        """Outputs a tile."""
        return TILE * self.num_warpgroups

    @property
    def chunks(self) -> int:
        """Pieces of a tile's tokens that different blocks of a cluster add up."""
        return max(q for q in range(1, self.split_k + 1) if self.block_m % (8 * q) == 0)

    def shared_memory_bytes(
        self, group_size: int, has_zero_point: bool, scale_bytes: int = 2, x_bytes: int = 2, bits: int = 4
    ) -> int:
        """Shared memory of a launch: x of `x_bytes`, codes of `bits`, scales and zero points of `scale_bytes`."""
        rows = max(1, self.block_k // group_size)
        stage = (
            self.block_m * self.block_k * x_bytes
            + self.block_n * self.block_k * bits // 8
            + rows * self.block_n * scale_bytes * (1 + has_zero_point)
        )
        chunk = self.block_m // self.chunks
        partial = self.num_warpgroups * (self.split_k - 1) * TILE * chunk * 4
        partial += self.num_warpgroups * (self.k_warpgroups - 1) * TILE * self.block_m * 4
        out = 2 * min(chunk, 64) * TILE * 2
        if x_bytes == 1:
            out += 4 * max(self.block_m, 32)  # and the scales of the tokens
        return self.num_stages * stage + partial + self.num_warpgroups * out


def supports(
    k: int,
    n: int,
    num_groups: int,
    dtype,
    *,
    config: Config | None = None,
    has_zero_point: bool = False,
    scale_dtype=jnp.bfloat16,
    qtype: str = "int4",
) -> str | None:
    """Why the Hopper kernel cannot take a problem, or None if it can.

    Args:
      k: inputs.
      n: outputs, padded to 64 at pack time.
      num_groups: groups of inputs that share a scale (1 for per-channel).
      dtype: of x; int8 and float8_e4m3fn for its codes.
      config: a configuration to check with it.
      has_zero_point: whether there are zero points.
      scale_dtype: of the scales.
      qtype: the format of the codes.
    """
    dtype, scale_dtype, group_size = jnp.dtype(dtype), jnp.dtype(scale_dtype), k // num_groups
    reason = _unsupported_operands(n, num_groups, group_size, dtype, has_zero_point, scale_dtype, qtype)
    if reason is not None or config is None:
        return reason
    return _unsupported_cut(config, n, num_groups, group_size, dtype, has_zero_point, qtype) or _too_large(
        config, group_size, dtype, has_zero_point, scale_dtype, qtype
    )


def _unsupported_operands(n, num_groups, group_size, dtype, has_zero_point, scale_dtype, qtype) -> str | None:
    """Why no configuration takes such operands."""
    if qtype not in FORMATS:
        return f"codes of {qtype}; the kernel unpacks {', '.join(FORMATS)}"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        return f"x is {dtype.name}; the kernel takes bfloat16 or float16, or codes in int8 or float8_e4m3fn"
    if scale_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"scales are {scale_dtype.name}; the kernel takes bfloat16, float16 or float32"
    if n % TILE:
        return f"N = {n} is not a multiple of {TILE}; pack() pads it"
    if num_groups > 1 and group_size not in (32, 64, 128) and group_size % 256:
        return f"groups of {group_size} inputs; the kernel takes 32, 64, 128, a multiple of 256, or one group"
    if dtype.itemsize == 1 and qtype != "int4":
        return f"{qtype} weights with 8-bit activations; the kernel takes int4 ones"
    if has_zero_point and not FORMATS[qtype].takes_zero_points:
        return f"zero points of {qtype} weights"
    if dtype.itemsize == 1 and num_groups > 1 and group_size == 32:
        return "groups of 32 inputs; with 8-bit activations the kernel takes groups of 64 or more"
    if dtype.itemsize == 1 and has_zero_point:
        return "zero points with 8-bit activations: a code less its zero point does not fit the operand's 4 bits"
    if dtype == jnp.int8 and group_size > LARGEST_INT8_GROUP:
        return f"{group_size} inputs share a scale; int32 sums hold {LARGEST_INT8_GROUP}"
    return None


def _unsupported_cut(config: Config, n, num_groups, group_size, dtype, has_zero_point, qtype) -> str | None:
    """Why a configuration does not take operands that others do."""
    if num_groups > 1 and group_size % config.block_k and config.block_k % group_size:
        return f"block_k = {config.block_k} and groups of {group_size} do not divide one another"
    if dtype.itemsize == 1 and not config.scale_after:
        return "scale_after = False with 8-bit activations, which meet codes that are not scaled"
    channels = num_groups == 1 and not has_zero_point and dtype != jnp.float8_e4m3fn
    product = products_k(config.block_k, group_size, dtype.itemsize)
    if (channels or not config.scale_after) and config.block_k < 2 * product:
        return f"block_k = {config.block_k} is one product; a long sum takes two a stage, which alternate registers"
    if dtype == jnp.float8_e4m3fn and min(config.block_k, group_size) > DEEPEST_FP8:
        return f"sums of {min(config.block_k, group_size)} fp8 products, whose accumulator is good for {DEEPEST_FP8}"
    if -(-n // config.block_n) % config.multicast:
        return f"multicast = {config.multicast} does not divide the {-(-n // config.block_n)} output tiles"
    if config.blocks_per_sm > 1 and (config.num_warpgroups > 1 or config.block_m * config.blocks_per_sm > 64):
        return (
            f"{config.blocks_per_sm} blocks of {config.num_warpgroups} warpgroups by {config.block_m} tokens on an SM"
        )
    if config.k_warpgroups > 1 and (not config.scale_after or dtype.itemsize == 1 or channels):
        return f"k_warpgroups = {config.k_warpgroups} without products that are scaled after"
    if config.k_warpgroups > 1 and config.block_k > 4 * group_size:
        return f"k_warpgroups = {config.k_warpgroups} with {config.block_k // group_size} groups a stage, at most 4"
    if config.k_warpgroups * config.num_warpgroups > 4 or config.num_stages % config.k_warpgroups:
        return f"k_warpgroups = {config.k_warpgroups} of {config.num_warpgroups} and {config.num_stages} stages"
    if config.block_k % FORMATS[qtype].tile_k:
        return f"block_k = {config.block_k} and tiles of {FORMATS[qtype].tile_k} inputs"
    return None


def _too_large(config: Config, group_size, dtype, has_zero_point, scale_dtype, qtype) -> str | None:
    """Why a configuration does not fit the shared memory of an SM."""
    used = config.shared_memory_bytes(
        group_size, has_zero_point, scale_dtype.itemsize, dtype.itemsize, FORMATS[qtype].bits
    )
    room = SHARED_MEMORY_BYTES // config.blocks_per_sm - 1024 * (config.blocks_per_sm - 1)
    return f"{used} bytes of shared memory, at most {room}" if used > room else None


def products_k(block_k: int, group_size: int, x_bytes: int = 2) -> int:
    """Inputs of one product: 128 bytes of a token, or the part of them that shares a scale."""
    return math.gcd(block_k, group_size, 2 * TILE // x_bytes)


def num_clusters(size: int, blocks_per_sm: int = 1, num_sms: int = HOPPER_SMS) -> int:
    """Clusters of `size` blocks that run at once; groups of 18 SMs hold only four clusters of four."""
    return (num_sms if size <= 2 else num_sms - 4) * blocks_per_sm // size
