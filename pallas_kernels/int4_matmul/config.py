"""Configurations of the Hopper int4 kernel: what one is, which problems it takes, and how one is picked."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

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
    if qtype not in FORMATS:
        return f"codes of {qtype}; the kernel unpacks {', '.join(FORMATS)}"
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        return f"x is {dtype.name}; the kernel takes bfloat16 or float16, or codes in int8 or float8_e4m3fn"
    if jnp.dtype(scale_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"scales are {jnp.dtype(scale_dtype).name}; the kernel takes bfloat16, float16 or float32"
    if n % TILE:
        return f"N = {n} is not a multiple of {TILE}; pack() pads it"
    group_size = k // num_groups
    if num_groups > 1 and group_size != 32 and group_size % 64:
        return f"groups of {group_size} inputs; the kernel takes 32, a multiple of 64, or one group"
    if dtype.itemsize == 1 and qtype != "int4":
        return f"{qtype} weights with 8-bit activations; the kernel takes int4 ones"
    if has_zero_point and not FORMATS[qtype].takes_zero_points:
        return f"zero points of {qtype} weights"
    if dtype.itemsize == 1 and num_groups > 1 and group_size % 64:
        return f"groups of {group_size} inputs; with 8-bit activations the kernel takes multiples of 64, or one group"
    if dtype.itemsize == 1 and has_zero_point:
        return "zero points with 8-bit activations: a code less its zero point does not fit the operand's 4 bits"
    if dtype == jnp.int8 and group_size > LARGEST_INT8_GROUP:
        return f"{group_size} inputs share a scale; int32 sums hold {LARGEST_INT8_GROUP}"
    if config is None:
        return None
    if num_groups > 1 and group_size % config.block_k and config.block_k % group_size:
        return f"block_k = {config.block_k} and groups of {group_size} do not divide one another"
    if dtype.itemsize == 1 and not config.scale_after:
        return "scale_after = False with 8-bit activations, which meet codes that are not scaled"
    channels = num_groups == 1 and not has_zero_point and dtype != jnp.float8_e4m3fn
    if (channels or not config.scale_after) and config.block_k < 2 * products_k(
        config.block_k, group_size, dtype.itemsize
    ):
        return f"block_k = {config.block_k} is one product; a long sum takes two a stage, which alternate registers"
    if dtype == jnp.float8_e4m3fn and min(config.block_k, group_size) > DEEPEST_FP8:
        return f"sums of {min(config.block_k, group_size)} fp8 products, whose accumulator is good for {DEEPEST_FP8}"
    if -(-n // config.block_n) % config.multicast:
        return f"multicast = {config.multicast} does not divide the {-(-n // config.block_n)} output tiles"
    if config.blocks_per_sm > 1 and (config.num_warpgroups > 1 or config.block_m * config.blocks_per_sm > 64):
        return (
            f"{config.blocks_per_sm} blocks of {config.num_warpgroups} warpgroups by {config.block_m} tokens on an SM"
        )
    if config.block_k % FORMATS[qtype].tile_k:
        return f"block_k = {config.block_k} and tiles of {FORMATS[qtype].tile_k} inputs"
    used = config.shared_memory_bytes(
        group_size, has_zero_point, jnp.dtype(scale_dtype).itemsize, dtype.itemsize, FORMATS[qtype].bits
    )
    room = SHARED_MEMORY_BYTES // config.blocks_per_sm - 1024 * (config.blocks_per_sm - 1)
    if used > room:
        return f"{used} bytes of shared memory, at most {room}"
    return None


def candidates(
    m: int,
    k: int,
    n: int,
    num_groups: int,
    dtype=jnp.bfloat16,
    has_zero_point: bool = False,
    scale_dtype=jnp.bfloat16,
    qtype: str = "int4",
) -> list[Config]:
    """The configurations worth trying for a problem."""
    few, codes = m <= FEW_TOKENS, jnp.dtype(dtype).itemsize == 1
    if codes and not few:
        return _candidates_for_codes(m, k, n, num_groups, dtype, scale_dtype)
    block_ks, warpgroups = ((256, 512), (1, 2, 3, 4)) if few else ((128,), (2,))
    # Blocks of a cluster: those that split K, those that share x.
    clusters = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (4, 1, 1)]
    if few:  # and several blocks on an SM
        clusters += [(split, 1, blocks) for split in (1, 2, 3, 4) for blocks in (2, 3)]
    if few and num_groups > 1 and k // num_groups == 32:
        block_ks += (128,)
    configs = []
    cuts = [(*cut, few) for cut in itertools.product(_token_tiles(m), block_ks, warpgroups, clusters)]
    if few and not codes:  # and weights scaled before the product, so that it runs under the next unpacking
        cuts += [(*cut, False) for cut in itertools.product(_token_tiles(m), (128, 256), (1, 2), clusters[:3])]
    for block_m, block_k, count, (split, peers, blocks), scale_after in cuts:
        if count == 4 and block_m == 64:  # 96 registers at launch do not hold its accumulators: it spills
            continue
        if (peers > 1 and block_m < 32) or (split > 1 and m > 512):
            continue
        cut = Config(
            block_m=block_m,
            block_k=block_k,
            num_stages=1,
            num_warpgroups=count,
            split_k=split,
            multicast=peers,
            scale_after=scale_after,
            blocks_per_sm=blocks,
        )
        takes = functools.partial(
            supports, k, n, num_groups, dtype, has_zero_point=has_zero_point, scale_dtype=scale_dtype, qtype=qtype
        )
        depths = [s for s in range(2, 9) if takes(config=dataclasses.replace(cut, num_stages=s)) is None]
        configs += [dataclasses.replace(cut, num_stages=s) for s in depths[-3::2]]
    return configs


def _candidates_for_codes(m: int, k: int, n: int, num_groups: int, dtype, scale_dtype) -> list[Config]:
    """The configurations worth trying for many tokens of 8 bits."""
    whole = jnp.dtype(dtype) == jnp.int8 and num_groups == 1
    tiles = [128] + [64] * (m <= 256) + [256] * (whole and m > 128)
    cuts = itertools.product(tiles, (256, 128), (1, 2), (1, 2), (8, 16))
    configs = []
    for block_m, block_k, split, peers, width in cuts:
        # Pairs of groups of 128 tokens and a reduction spill.
        if split > 1 and (m > 512 or (block_k > 128 and block_m > 64 and not whole)):
            continue
        cut = Config(
            block_m=block_m,
            block_k=block_k,
            num_stages=1,
            num_warpgroups=2,
            split_k=split,
            multicast=peers,
            scale_after=True,
            snake_width=width,
        )
        takes = functools.partial(supports, k, n, num_groups, dtype, scale_dtype=scale_dtype)
        depths = [s for s in range(2, 9) if takes(config=dataclasses.replace(cut, num_stages=s)) is None]
        configs += [dataclasses.replace(cut, num_stages=s) for s in depths[-1:]]
    return configs


def _token_tiles(m: int) -> list[int]:
    """Tokens a tile may hold: all of them while they are few."""
    if m <= FEW_TOKENS:
        return [max(8, 1 << (m - 1).bit_length())]
    return [128] if m <= 128 else [128, 256]


def default_config(
    m: int,
    k: int,
    n: int,
    num_groups: int,
    dtype=jnp.bfloat16,
    has_zero_point: bool = False,
    scale_dtype=jnp.bfloat16,
    qtype: str = "int4",
) -> Config:
    """The configuration to run a problem with: what was fastest on a problem like it, else the cost model's choice.

    Raises:
      NotImplementedError: if no configuration takes the problem.
    """
    options = {"has_zero_point": has_zero_point, "scale_dtype": scale_dtype, "qtype": qtype}
    takes = functools.partial(supports, k, n, num_groups, dtype, **options)
    codes = jnp.dtype(dtype).itemsize == 1
    tuned = None if codes and m > FEW_TOKENS else _nearest_tuned(m, k, n)
    if tuned is not None:
        tuned = dataclasses.replace(tuned, scale_after=codes or tuned.scale_after)
        for stages in range(tuned.num_stages, 1, -1):  # Other groups, zero points and tokens need other room.
            config = dataclasses.replace(tuned, num_stages=stages)
            if takes(config=config) is None:
                return config
    # The other forms are for problems that they were tuned on.
    usual = candidates(m, k, n, num_groups, dtype, **options)
    fitting = [c for c in usual if c.blocks_per_sm == 1 and c.scale_after == (codes or m <= FEW_TOKENS)]
    if not fitting:
        raise NotImplementedError(
            f"int4_matmul has no Hopper configuration for M={m}, K={k}, N={n}, {num_groups} groups"
        )
    if codes and m > FEW_TOKENS:
        return min(fitting, key=lambda c: predicted_microseconds_of_codes(c, m, k, n, num_groups, dtype))
    return min(fitting, key=lambda c: predicted_microseconds(c, m, k, n, FORMATS[qtype].bits))


def _nearest_tuned(m: int, k: int, n: int) -> Config | None:
    """The tuned configuration of the nearest problem of the same regime, none if K or N is off by more than 1.5."""

    def distance(entry: dict) -> float:
        # Tokens first: they decide the tile. A tie goes to the fewer, which come first.
        return 8 * abs(math.log2(m / entry["m"])) + abs(math.log2(k / entry["k"])) + abs(math.log2(n / entry["n"]))

    near = [
        entry
        for entry in tuned_entries()
        if (entry["m"] <= FEW_TOKENS) == (m <= FEW_TOKENS)
        and max(k / entry["k"], entry["k"] / k, n / entry["n"], entry["n"] / n) <= 1.5
    ]
    if not near:
        return None
    config = Config(**min(near, key=distance)["config"])
    tiles = _token_tiles(m)
    config = config if config.block_m in tiles else dataclasses.replace(config, block_m=tiles[0])
    return None if config.num_warpgroups == 4 and config.block_m == 64 else config


@functools.cache
def tuned_entries(device_kind: str = "NVIDIA H200") -> tuple[dict, ...]:
    """The fastest verified configuration of each problem tuned on a device: `m`, `k`, `n`, `microseconds`, `config`."""
    tuned = json.loads((pathlib.Path(__file__).parent / "tuned.json").read_text())
    return tuple(tuned[device_kind]["entries"])


def predicted_microseconds(config: Config, m: int, k: int, n: int, bits: int = 4) -> float:
    """A coarse model: waves of tiles, each the longer of its bytes and its products, and the cost of a launch.

    Fitted to the 420 measurements behind tuned.json: 17 % root mean square, and its choice among the candidates was
    within 1.3 % of the fastest on every problem.
    """
    c = config
    tiles = math.ceil(m / c.block_m) * math.ceil(n / c.block_n)
    waves = math.ceil(tiles / c.multicast / num_clusters(c.split_k * c.multicast, c.blocks_per_sm))
    inputs = math.ceil(math.ceil(k / c.block_k) / c.split_k) * c.block_k
    # Per SM and microsecond: 32 kB from memory with 59 kB in flight, 2.9 million multiply-adds, 71 thousand codes
    # unpacked by two warpgroups.
    codes = c.block_n * inputs * c.blocks_per_sm
    in_flight = c.blocks_per_sm * c.num_stages * (c.block_n * c.block_k * bits / 8)
    copy = codes * bits / 8 / 32e3 * max(1.0, 59e3 / in_flight)
    unpacking = codes / 71e3 / min(1.0, c.num_warpgroups * c.blocks_per_sm / 2)
    compute = max(codes * c.block_m / 2.9e6, unpacking)
    # Clusters of four find too few free SMs side by side.
    crowding = 2.2 if c.split_k * c.multicast > 2 * c.blocks_per_sm else 1.0
    return 1.9 + waves * (crowding * max(copy, compute) + 1.8 + 0.9 * (c.split_k > 1))


def predicted_microseconds_of_codes(config: Config, m: int, k: int, n: int, num_groups: int, dtype) -> float:
    """The same for many tokens of 8 bits: fitted to 20 times on an H100, off by 6 % at most where tokens are 256 up.

    A warpgroup's 128 inputs by `block_m` tokens take 4 cycles a token of both warpgroups' tensor core; groups wait for
    their products, less where a stage has two that take turns.
    """
    c = config
    m_tiles, n_tiles = math.ceil(m / c.block_m), math.ceil(n / c.block_n)
    waves = math.ceil(m_tiles * n_tiles / c.multicast / num_clusters(c.split_k * c.multicast))
    inputs = math.ceil(math.ceil(k / c.block_k) / c.split_k) * c.block_k
    if num_groups == 1 and jnp.dtype(dtype) == jnp.int8:
        cycles = 20 + 4.4 * c.block_m
    else:
        alone = min(c.block_k, k // num_groups) == c.block_k
        cycles = (400 if alone else 260) + (4 if jnp.dtype(dtype) == jnp.int8 else 5.2) * c.block_m
    fetched = inputs * (c.block_m / c.multicast + c.block_n / 2)
    tile = max(inputs / 128 * cycles / 1755, fetched / 119e3)
    return max(k * n / 2 / 4.3e6, 3.2 + waves * (tile + 0.5 + 1.5 * (c.split_k > 1)))


def products_k(block_k: int, group_size: int, x_bytes: int = 2) -> int:
    """Inputs of one product: 128 bytes of a token, or the part of them that shares a scale."""
    return math.gcd(block_k, group_size, 2 * TILE // x_bytes)


def num_clusters(size: int, blocks_per_sm: int = 1, num_sms: int = HOPPER_SMS) -> int:
    """Clusters of `size` blocks that run at once; groups of 18 SMs hold only four clusters of four."""
    return (num_sms if size <= 2 else num_sms - 4) * blocks_per_sm // size
