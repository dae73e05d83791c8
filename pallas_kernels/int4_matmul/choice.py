"""Which configuration runs a problem: what was tuned on a device, else what a cost model expects to be fastest."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import jax.numpy as jnp

from pallas_kernels.int4_matmul.config import FEW_TOKENS, Config, num_clusters, supports
from pallas_kernels.int4_matmul.formats import FORMATS


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
    if few:  # and several blocks on an SM, or blocks of four warpgroups that share few outputs' inputs
        clusters += [(split, 1, blocks) for split in (1, 2, 3, 4) for blocks in (2, 3)] + [(8, 1, 1)]
    if few and num_groups > 1 and k // num_groups == 32:
        block_ks += (128,)
    configs = []
    cuts = [(*cut, few) for cut in itertools.product(_token_tiles(m), block_ks, warpgroups, clusters)]
    if few and not codes:  # and weights scaled before the product, so that it runs under the next unpacking
        cuts += [(*cut, False) for cut in itertools.product(_token_tiles(m), (128, 256), (1, 2), clusters[:3])]
    for block_m, block_k, count, (split, peers, blocks), scale_after in cuts:
        if split == 8 and count < 4:
            continue
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
        if few and not codes and (block_k, blocks, peers, scale_after) == (256, 1, 1, True) and count <= 2 >= split:
            shared = (
                dataclasses.replace(cut, num_stages=s, k_warpgroups=turns) for turns in (2, 4) for s in (4, 8, 12)
            )
            configs += [config for config in shared if takes(config=config) is None]
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
    for tuned in () if codes and m > FEW_TOKENS else _nearest_tuned(m, k, n):
        tuned = dataclasses.replace(tuned, scale_after=codes or tuned.scale_after)
        for stages in range(tuned.num_stages, 1, -1):  # Other groups, zero points and tokens need other room.
            config = dataclasses.replace(tuned, num_stages=stages)
            if takes(config=config) is None:
                return config
    # The other forms are for problems that they were tuned on.
    usual = candidates(m, k, n, num_groups, dtype, **options)
    usual = [c for c in usual if c.blocks_per_sm == c.k_warpgroups == 1 and c.split_k <= 4]
    fitting = [c for c in usual if c.scale_after == (codes or m <= FEW_TOKENS)]
    if not fitting:
        raise NotImplementedError(
            f"int4_matmul has no Hopper configuration for M={m}, K={k}, N={n}, {num_groups} groups"
        )
    if codes and m > FEW_TOKENS:
        return min(fitting, key=lambda c: predicted_microseconds_of_codes(c, m, k, n, num_groups, dtype))
    return min(fitting, key=lambda c: predicted_microseconds(c, m, k, n, FORMATS[qtype].bits))


def _nearest_tuned(m: int, k: int, n: int) -> list[Config]:
    """The tuned configurations of problems of the same regime, nearest first, none if K or N is off by more than 1.5.

    A problem may have one whose warpgroups share outputs, and one for operands that it does not take.
    """

    def distance(entry: dict) -> float:
        # Tokens first: they decide the tile. A tie goes to the fewer, which come first.
        return 8 * abs(math.log2(m / entry["m"])) + abs(math.log2(k / entry["k"])) + abs(math.log2(n / entry["n"]))

    near = [
        entry
        for entry in tuned_entries()
        if (entry["m"] <= FEW_TOKENS) == (m <= FEW_TOKENS)
        and max(k / entry["k"], entry["k"] / k, n / entry["n"], entry["n"] / n) <= 1.5
    ]
    configs, tiles = [], _token_tiles(m)
    for entry in sorted(near, key=lambda entry: (distance(entry), entry["microseconds"])):
        config = Config(**entry["config"])
        config = config if config.block_m in tiles else dataclasses.replace(config, block_m=tiles[0])
        if config.num_warpgroups < 4 or config.block_m < 64:
            configs.append(config)
    return configs


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
    unpacking = codes / 71e3 / min(1.0, c.num_warpgroups * c.k_warpgroups * c.blocks_per_sm / 2)
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
