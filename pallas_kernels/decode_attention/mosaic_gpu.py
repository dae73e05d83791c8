"""Decode attention for Hopper: the cache is read once, by many small blocks that hide one another's latency.

A block of one warpgroup walks over the tokens of one sequence and key head, or over its share of them: the blocks of a
cluster split the context and merge in distributed shared memory, so that one launch does everything. The query heads
that share a key head are the 8 columns of two products: S^T = K q^T and O^T = V^T P^T. The cache is on the side that
wgmma takes from registers, where codes become float16 numbers (`operand`): exactly those of 8 bits, whose scales
multiply the scores and the weights, and with their scale and offset those of fewer bits. The last few
tiles may come from a ring of recent tokens that were not rounded.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._shared_memory import tiled
from pallas_kernels.decode_attention import columns, operand
from pallas_kernels.decode_attention.cache import Cache
from pallas_kernels.decode_attention.columns import PER_COLUMN
from pallas_kernels.decode_attention.config import STATISTIC_ROWS, Config, padded_group
from pallas_kernels.decode_attention.operand import TILE
from pallas_kernels.decode_attention.reference import quantized_tokens

LOWEST_MAXIMUM = -1e30  # finite, so that a block without tokens weighs 0 and not NaN
VALUE_TOKENS = 32  # of one product of the output: few enough that their operand leaves registers for four blocks
LOG2_E = math.log2(math.e)
GROUP = operand.GROUP
WARPS = 4


def decode_attention_mosaic_gpu(
    q: jax.Array, lengths: jax.Array, cache: Cache, *, scale: float, config: Config
) -> jax.Array:
    """Runs the kernel; arguments as `decode_attention_reference`'s, lengths int32."""
    batch, heads, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    operands = {"q": queries, "lengths": lengths} | {k: x for k, x in cache._asdict().items() if x is not None}
    plan = _Plan(scale, config, cache.bits, cache.grouped, cache.k.dtype != q.dtype, cache.recent_k is not None)
    teams = {"num_threads": config.teams, "thread_name": "team"} if config.teams > 1 else {}
    call = plgpu.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(_kernel, plan, dict(zip(operands, refs, strict=False)), refs[-1]),
            [_scratch(plan, operands, team) for team in range(config.teams)],
            collective_axes=tuple(teams.values())[1:],
        ),
        out_type=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid=(kv_heads, batch),
        grid_names=("head", "batch"),
        cluster=(config.split,),
        cluster_names=("split",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **teams,
    )
    return call(*operands.values()).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a launch: `coded` operands pass through registers, those of a `ring` do not."""

    scale: float
    config: Config
    bits: int
    grouped: bool
    coded: bool
    ring: bool

    def copied(self, operands: dict) -> dict:
        """The arrays of which every tile has a part, and that part: an index of shared memory's shape a token tile."""
        block = self.config.block
        tokens = {"k": block * self.bits // 8 if self.grouped else block, "v": block}
        for name in ("k", "v"):
            tokens |= {f"{name}_{grid}": block for grid in ("scale", "offset")}
        if self.grouped:
            tokens |= dict.fromkeys(("k_scale", "k_offset"), block // GROUP)
        return {name: count for name, count in tokens.items() if name in operands}


def _scratch(plan: _Plan, operands: dict, team: int) -> dict:
    """Shared memory and barriers of a team, by name; the first has room for the sums of all others of the cluster."""
    q, config = operands["q"], plan.config
    head_dim, group = q.shape[3], padded_group(q.shape[1] * q.shape[2], q.shape[1])
    stages, block, others = config.stages, config.block, config.split * config.teams - 1
    copied = plan.copied(operands)
    dtype = operand.DTYPE if plan.coded else q.dtype
    scratch = {
        "rows": plgpu.SMEM((group, head_dim), q.dtype),  # queries as they come, outputs as they go
        "q": tiled((group, head_dim), dtype, head_dim // 2 if plan.coded else None),
        "p": tiled((group, block), dtype, VALUE_TOKENS if plan.coded else None),
        "reduction": plgpu.SMEM((WARPS * group,), jnp.float32),
        "q_ready": plgpu.Barrier(),
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=len(copied)),
    }
    tiles = {}
    for name, count in copied.items():
        shape = list(operands[name].shape[2:])
        shape[_token_axis(name, shape)] = count
        tiles[name] = (plgpu.SMEM if plan.coded else tiled)((stages, *shape), operands[name].dtype)
    in_turn = [tiles]  # what takes the same place, one after another
    if plan.ring:
        dtype = operands["recent_k"].dtype
        recent = {"recent_k": tiled((block, head_dim), dtype), "recent_v": tiled((head_dim, block), dtype)}
        scratch |= {"recent_q": tiled((group, head_dim), dtype), "recent_p": tiled((group, block), dtype)}
        scratch |= {f"{name}_ready": plgpu.Barrier() for name in recent}
        in_turn.append(recent)
    if others and team == 0:
        rows = {"partial": head_dim, "maximum": STATISTIC_ROWS, "total": STATISTIC_ROWS}
        sums = {name: tiled((others, count, group), jnp.float32) for name, count in rows.items()}
        scratch |= sums
        scratch["arrived"] = plgpu.Barrier(num_arrivals=3 * others)
    return scratch | (tiles if len(in_turn) == 1 else {"tiles": plgpu.RefUnion(*in_turn)})


def _token_axis(name: str, shape) -> int:
    """Where the tokens of a head's part of an array lie: last of values and theirs, first of keys and theirs."""
    return len(shape) - 1 if name.startswith("v") else 0


class _Tiles:
    """The tiles of one sequence: coded ones, then those of the ring; a tile may be in both, in parts."""

    def __init__(self, plan: _Plan, refs: dict, batch):
        self.plan, self.block = plan, plan.config.block
        pages = refs["page_table"].shape[1] if "page_table" in refs else 1
        self.length = jnp.clip(refs["lengths"][batch], 0, pages * refs["v"].shape[3])
        self.quantized = quantized_tokens(self.length, refs["recent_k"].shape[2]) if plan.ring else self.length
        self.coded = self._up(self.quantized)
        self.first_recent = lax.div(self.quantized, jnp.int32(self.block))
        self.count = self.coded + (self._up(self.length) - self.first_recent if plan.ring else 0)

    def _up(self, tokens):
        return lax.div(tokens + self.block - 1, jnp.int32(self.block))

    def first_token(self, tile):
        """The token that a tile begins with."""
        if not self.plan.ring:
            return tile * self.block
        return jnp.where(tile < self.coded, tile, tile - self.coded + self.first_recent) * self.block


def _kernel(plan: _Plan, refs: dict, out_ref, scratch: list[dict]):
    """One block: each of its teams with its own shared memory."""
    sums = {name: scratch[0][name] for name in ("partial", "maximum", "total", "arrived") if name in scratch[0]}
    for team, smem in enumerate(scratch):
        run = functools.partial(_attend, plan, refs, out_ref, smem | sums, team)
        if plan.config.teams == 1:
            run()
        else:
            pl.when(lax.axis_index("team") == team)(run)


def _attend(plan: _Plan, refs: dict, out_ref, smem: dict, team: int):
    """One team: its share of the tokens of one sequence and key head."""
    for part in smem.get("tiles", ()):
        smem = smem | part
    batch, head, rank = (lax.axis_index(name) for name in ("batch", "head", "split"))
    stages, split = plan.config.stages, plan.config.split * plan.config.teams
    if plan.config.teams > 1:
        rank = rank * plan.config.teams + team
    tiles = _Tiles(plan, refs, batch)
    first, last = (lax.div((rank + i) * tiles.count, jnp.int32(split)) for i in range(2))
    fetch = functools.partial(_by_warps, functools.partial(_copies, plan, refs, smem, tiles, batch, head, first))
    fetch_recent = functools.partial(_by_warps, functools.partial(_recent_copies, refs, smem, tiles, batch, head))

    plgpu.copy_gmem_to_smem(refs["q"].at[batch, head], smem["rows"].at[pl.ds(0, refs["q"].shape[2])], smem["q_ready"])
    coded_last = jnp.minimum(last, tiles.coded) if plan.ring else last
    for i in range(stages):
        pl.when(first + i < coded_last)(lambda i=i: fetch(first + i))
    plgpu.barrier_wait(smem["q_ready"])
    _spread_queries(plan, smem)

    def step(tile, state, recent: bool):
        slot = lax.rem(tile - first, jnp.int32(stages))
        plgpu.barrier_wait(smem["recent_k_ready"] if recent else smem["ready"].at[slot])
        x = _scores(plan, smem, slot, recent)
        start = tiles.first_token(tile)
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=TILE)
        token = operand.token_of_row(row) if plan.coded else row
        end = tiles.length if recent else tiles.quantized
        seen = token < end - start
        if recent:
            seen = seen & (token >= tiles.quantized - start)
        scale = None
        if plan.coded and not plan.grouped and not recent:
            scale = operand.token_order(smem["v_scale"].at[slot])
        values = iter(() if recent or not plan.coded else _parts(plan, "v", smem, slot, smem["p"]))
        values = itertools.chain(list(itertools.islice(values, 1)), values)  # the first before the weights are known
        p, decay, state = _softmax(jnp.where(seen, x, -jnp.inf), scale, state, smem["reduction"])
        weights = smem["recent_p" if recent else "p"]
        weights.T[...] = jnp.where(seen, p, 0.0).astype(weights.dtype)
        plgpu.commit_smem()
        if recent:
            plgpu.barrier_wait(smem["recent_v_ready"])
        acc, *statistics = state
        acc = acc * _along_columns(decay, acc) + _output(plan, smem, slot, values, recent)
        _synchronize_warpgroup()  # every warp has read its part of the tile
        if recent:
            pl.when(tile + 1 < last)(lambda: fetch_recent(tile + 1))
        else:
            pl.when(tile + stages < coded_last)(lambda: fetch(tile + stages))
        return acc, *statistics

    group, head_dim = smem["q"].shape
    acc = plgpu.layout_cast(jnp.zeros((head_dim, group), jnp.float32), TILE)
    maximum = plgpu.layout_cast(jnp.full((group,), LOWEST_MAXIMUM, jnp.float32), PER_COLUMN)
    total = plgpu.layout_cast(jnp.zeros((plan.config.block, group), jnp.float32), TILE)
    state = acc, maximum, total
    state = lax.fori_loop(first, coded_last, functools.partial(step, recent=False), state)
    if plan.ring:
        first_recent = jnp.maximum(first, tiles.coded)
        pl.when(first_recent < last)(lambda: fetch_recent(first_recent))
        state = lax.fori_loop(first_recent, last, functools.partial(step, recent=True), state)
    acc, maximum, total = state
    state = acc, maximum, columns.over_rows("add", total, smem["reduction"])
    if split == 1:
        return _store(state, out_ref.at[batch, head], smem)
    pl.when(rank != 0)(lambda: _send(state, rank, smem))
    pl.when(rank == 0)(lambda: _store(_merge(state, smem), out_ref.at[batch, head], smem))


def _by_warps(copies, tile):
    """Starts the copies of a tile, each from one warp: the others go on to what they compute."""

    @plgpu.warp_map
    def _(warp):
        for i, copy in enumerate(copies(tile)):
            pl.when(warp == i % WARPS)(copy)


def _copies(plan: _Plan, refs: dict, smem: dict, tiles: _Tiles, batch, head, first, tile) -> list:
    """What starts the copies of a tile to its slot."""
    slot = lax.rem(tile - first, jnp.int32(plan.config.stages))

    def copy(name, count):
        sequence, start = batch, tiles.first_token(tile)
        if "page_table" in refs:
            page_size = jnp.int32(refs["v"].shape[3])
            sequence = refs["page_table"][batch, lax.div(start, page_size)]
            start = lax.rem(start, page_size)
        per_tile = plan.config.block // count
        tokens = pl.ds(lax.div(start, jnp.int32(per_tile)), count)
        part = refs[name].at[sequence, head]
        part = part.at[:, tokens] if _token_axis(name, part.shape) else part.at[tokens]
        plgpu.copy_gmem_to_smem(part, smem[name].at[slot], smem["ready"].at[slot])

    return [functools.partial(copy, name, count) for name, count in plan.copied(refs).items()]


def _recent_copies(refs: dict, smem: dict, tiles: _Tiles, batch, head, tile) -> list:
    """What starts the copies of a tile's recent tokens, which the ring has side by side."""

    def copy(name):
        slot = lax.rem(tiles.first_token(tile), jnp.int32(refs["recent_k"].shape[2]))
        part, tokens = refs[name].at[batch, head], pl.ds(slot, tiles.block)
        part = part.at[tokens] if name == "recent_k" else part.at[:, tokens]
        plgpu.copy_gmem_to_smem(part, smem[name], smem[f"{name}_ready"])

    return [functools.partial(copy, name) for name in ("recent_k", "recent_v")]


def _spread_queries(plan: _Plan, smem: dict):
    """Brings the queries in the keys' order and format. Columns past the heads hold anything: none is read."""
    rows = smem["rows"]
    if plan.coded:
        smem["q"].T[...] = operand.channel_order(rows, bits=plan.bits).astype(smem["q"].dtype)
    if plan.ring or not plan.coded:
        natural = smem["recent_q" if plan.ring else "q"]
        natural.T[...] = plgpu.load(rows.T, layout=TILE, optimized=False).astype(natural.dtype)
    plgpu.commit_smem()


@plgpu.inline_mgpu()
def _synchronize_warpgroup(_=None):
    mgpu.utils.warpgroup_barrier()


def _scores(plan: _Plan, smem: dict, slot, recent: bool):
    """Scores [tokens, group] of a slot in base 2."""
    shape = (plan.config.block, smem["q"].shape[0])
    if recent:
        x = _product([(smem["recent_k"], smem["recent_q"].T)], shape)
    elif plan.coded:
        x = _product(_parts(plan, "k", smem, slot, smem["q"]), shape)
    else:
        x = _product([(smem["k"].at[slot], smem["q"].T)], shape)
    x = x * (plan.scale * LOG2_E)
    if plan.coded and not plan.grouped and not recent:
        x = x * _along_rows(operand.token_order(smem["k_scale"].at[slot]), x)
    return x


def _output(plan: _Plan, smem: dict, slot, values, recent: bool):
    """What a slot's values add to the output [H, group]."""
    group, head_dim = smem["q"].shape
    if recent:
        return _product([(smem["recent_v"], smem["recent_p"].T)], (head_dim, group))
    if plan.coded:
        return _product(values, (head_dim, group))
    return _product([(smem["v"].at[slot], smem["p"].T)], (head_dim, group))


def _parts(plan: _Plan, name: str, smem: dict, slot, other):
    """Yields a tile of codes as operands, unpacked in registers a part of the columns at a time, each with its rows."""
    depth = other.shape[1] // 2 if name == "k" else VALUE_TOKENS
    grids = [smem[f"{name}_{grid}"].at[slot] if plan.grouped else None for grid in ("scale", "offset")]
    unpack = operand.keys_operand if name == "k" else operand.values_operand
    for first in range(0, other.shape[1], depth):
        part = unpack(smem[name].at[slot], *grids, bits=plan.bits, first=first, depth=depth)
        yield part, other.at[:, pl.ds(first, depth)].T


def _product(operands, shape: tuple[int, int]):
    """The sum of the products of pairs of operands: one is unpacked under the product of the one before."""

    def multiply(ref):
        for a, b in operands:
            plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _softmax(x, scale, state, scratch):
    """Weights of a tile's scores x, the decay of what was summed before, and the state with its statistics.

    The scale of a token's values, if not None, belongs to its weight. It enters as its logarithm, before the maximum is
    taken: a weight with its scale is then at most 1, whatever the scale, and cannot vanish in float16 beside one that
    counts.
    """
    acc, maximum, total = state
    scaled = x if scale is None else x + _along_rows(jnp.log2(scale), x)
    new_maximum = jnp.maximum(maximum, columns.over_rows("max", scaled, scratch))
    decay = jnp.exp2(maximum - new_maximum)
    p = weights = jnp.exp2(scaled - _along_columns(new_maximum, x))
    if scaled is not x:
        weights = jnp.exp2(x - _along_columns(new_maximum, x))
    total = total * _along_columns(decay, total) + weights
    return p, decay, (acc, new_maximum, total)


def _send(state, rank, smem: dict):
    """Leaves a block's sums with the first block of its cluster."""
    acc, maximum, total = state
    rows = jnp.zeros((STATISTIC_ROWS, acc.shape[1]), jnp.float32)
    parts = {"partial": acc, "maximum": _along_columns(maximum, rows), "total": _along_columns(total, rows)}
    first = jnp.int32(0)
    for name, value in parts.items():
        plgpu.async_store_smem(value, smem[name].at[rank - 1], smem["arrived"], cluster_idx=first, cluster_dim="split")


def _merge(state, smem: dict):
    """Adds what the other blocks of the cluster have left, in a fixed order."""
    acc, maximum, total = state
    plgpu.barrier_wait(smem["arrived"])
    for other in range(smem["partial"].shape[0]):
        other_maximum, other_total = (
            columns.any_row(plgpu.load(smem[name].at[other], layout=TILE)) for name in ("maximum", "total")
        )
        new_maximum = jnp.maximum(maximum, other_maximum)
        ours, theirs = jnp.exp2(maximum - new_maximum), jnp.exp2(other_maximum - new_maximum)
        partial = plgpu.load(smem["partial"].at[other], layout=TILE)
        acc = acc * _along_columns(ours, acc) + partial * _along_columns(theirs, acc)
        maximum, total = new_maximum, total * ours + other_total * theirs
    return acc, maximum, total


def _store(state, out_ref, smem: dict):
    acc, _, total = state
    inverse = 1.0 / jnp.where(total == 0.0, jnp.inf, total)  # nothing seen: zeros
    smem["rows"].T[...] = (acc * _along_columns(inverse, acc)).astype(out_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["rows"].at[pl.ds(0, out_ref.shape[0])], out_ref)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _along_rows(per_row, like):
    return lax.broadcast_in_dim(per_row, like.shape, [0])


def _along_columns(per_column, like):
    return lax.broadcast_in_dim(per_column, like.shape, [1])
