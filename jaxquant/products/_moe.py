"""`moe`: a mixture-of-experts feed-forward layer on quantized experts, from routing to the weighted sum."""

import dataclasses
from typing import Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from jaxquant._kernels import interleave, separate
from jaxquant.arrays._packing import Quantized, plain
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._views import refine
from jaxquant.products._grouped import GROUPED, grouped_product, ragged_dot, ragged_implementation
from jaxquant.products._ops import dot_general

COMPARED = 4096  # up to so many rows, comparing all pairs orders them fastest
BLOCK = 256  # of more, rows whose pairs are compared
Weight = jax.Array | Quantized


@dataclasses.dataclass(frozen=True)
class Routing:
    """How the scores of a router choose and weigh the experts of a token.

    Softmax over all experts, then the best `per_token`, scaled to add up to one, is the same as the softmax over the
    best `per_token` logits: `normalised=True` stands for both.

    Attributes:
        per_token: k, experts of a token.
        score: what makes a score of a logit: `"softmax"` over all experts, or `"sigmoid"` of each.
        normalised: whether a token's weights are scaled to add up to one.
        groups: equal runs of experts of which a token may use only some (DeepSeek); 1 is no limit.
        groups_per_token: how many of them.
        group_best: a group counts as much as this many of its best experts together (DeepSeek-V2: 1, V3: 2).
        scale: factor of the weights.

    References:
        Jiang et al., Mixtral of Experts, 2024, arXiv:2401.04088; DeepSeek-AI, DeepSeek-V3, 2024, arXiv:2412.19437.

    >>> Routing(per_token=8, score="sigmoid", groups=8, groups_per_token=4, scale=2.5).group_best
    2
    """

    per_token: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    groups: int = 1
    groups_per_token: int = 1
    group_best: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what chooses nothing."""
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"Routing: score={self.score!r}; accepted: 'softmax', 'sigmoid'")
        for name in ("per_token", "groups", "groups_per_token", "group_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"Routing: {name}={getattr(self, name)}; at least 1 is accepted")
        if self.groups_per_token > self.groups:
            raise ValueError(f"Routing: groups_per_token={self.groups_per_token} of groups={self.groups}")


def route(logits: jax.Array, routing: Routing, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's experts and their weights.

    Args:
        logits: [..., E] floating, of the router; scores are float32.
        routing: how.
        bias: [E] added to the scores for the choice, not for the weights (DeepSeek-V3's load balancing), or None.

    Returns:
        (weights float32 [..., k], experts int32 [..., k]), the best first; of equal ones the lower number.

    Raises:
        ValueError: more experts a token than there are (in its groups), groups that do not divide, a bias that does not
            fit.

    >>> weights, experts = route(jnp.asarray([[0.0, 2.0, 1.0]]), Routing(per_token=2))
    >>> experts.tolist(), (100 * weights).round().tolist()
    ([[1, 2]], [[73.0, 27.0]])
    """
    count = logits.shape[-1]
    reachable = count // routing.groups * routing.groups_per_token
    if count % routing.groups or routing.per_token > reachable:
        raise ValueError(f"route: {routing} does not fit {count} experts")
    if bias is not None and bias.shape != (count,):
        raise ValueError(f"route: bias {bias.shape} for {count} experts; ({count},) is accepted")
    wide = logits.astype(jnp.float32)
    if routing.score == "softmax" and routing.normalised and routing.groups == 1 and bias is None:
        best, chosen = jax.lax.top_k(wide, routing.per_token)  # the same, with less to do
        return jax.nn.softmax(best, axis=-1) * routing.scale, chosen
    scores = jax.nn.softmax(wide, axis=-1) if routing.score == "softmax" else jax.nn.sigmoid(wide)
    ranked = scores if bias is None else scores + jnp.broadcast_to(bias.astype(jnp.float32), scores.shape)
    if routing.groups > 1:
        ranked = jnp.where(_in_best_groups(ranked, routing), ranked, -jnp.inf)
    weights, chosen = jax.lax.top_k(ranked, routing.per_token)
    if bias is not None:
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if routing.normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.finfo(jnp.float32).tiny)
    return weights * routing.scale, chosen


def _in_best_groups(ranked: jax.Array, routing: Routing) -> jax.Array:
    """[..., E] whether an expert lies in one of its token's best groups."""
    grouped = ranked.reshape(*ranked.shape[:-1], routing.groups, -1)
    best, _ = jax.lax.top_k(grouped, min(routing.group_best, grouped.shape[-1]))
    _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), routing.groups_per_token)
    open_groups = jnp.any(jax.nn.one_hot(kept, routing.groups, dtype=jnp.bool_), axis=-2)
    return jnp.broadcast_to(open_groups[..., None], grouped.shape).reshape(ranked.shape)


class Sorted(NamedTuple):
    """An order of the M = T k choices in which those of one expert lie together, and in the order of their tokens.

    Attributes:
        order: [M] int32: which choice lies at a place.
        place: [M] int32: where a choice lies; the inverse.
        sizes: [E] int32: choices of each expert.
    """

    order: jax.Array
    place: jax.Array
    sizes: jax.Array


def sort_by_expert(chosen: jax.Array, experts: int) -> Sorted:
    """Sorts choices by expert, stably.

    Args:
        chosen: [M] int32 experts.
        experts: E.

    Returns:
        The order, its inverse and the number of each expert's choices.

    >>> sort_by_expert(jnp.asarray([1, 0, 1]), 3).order.tolist()
    [1, 0, 2]
    """
    count = chosen.shape[0]
    here, numbers = jnp.arange(count, dtype=jnp.int32), jnp.arange(experts, dtype=chosen.dtype)
    sizes = jnp.sum(chosen[None, :] == numbers[:, None], axis=1, dtype=jnp.int32)
    if count > COMPARED:
        place = _place_by_blocks(chosen, sizes)
        return Sorted(jnp.zeros_like(place).at[place].set(here, unique_indices=True), place, sizes)
    earlier = here[None, :] < here[:, None]
    before = (chosen[None, :] < chosen[:, None]) | ((chosen[None, :] == chosen[:, None]) & earlier)
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    mine = place[None, :] == here[:, None]  # [place, choice]
    return Sorted(jnp.sum(jnp.where(mine, jnp.broadcast_to(here, mine.shape), 0), axis=1), place, sizes)


def _place_by_blocks(chosen: jax.Array, sizes: jax.Array) -> jax.Array:
    """Where each choice lies: after the earlier experts', its own of earlier blocks, and those before in its block."""
    count, experts = chosen.shape[0], sizes.shape[0]
    blocks = jnp.pad(chosen, (0, -count % BLOCK), constant_values=experts).reshape(-1, BLOCK)
    numbers = jnp.arange(experts, dtype=chosen.dtype)
    held = jnp.sum(blocks[:, None, :] == numbers[None, :, None], axis=2, dtype=jnp.int32)  # [block, expert]
    before = jnp.cumsum(held, axis=0) - held + (jnp.cumsum(sizes) - sizes)[None, :]
    row = jnp.arange(BLOCK)
    alike = (blocks[:, None, :] == blocks[:, :, None]) & (row[None, :] < row[:, None])[None]
    within = jnp.sum(alike, axis=2, dtype=jnp.int32)
    start = jnp.take_along_axis(before, jnp.minimum(blocks, experts - 1), axis=1)
    return (start + within).reshape(-1)[:count]


def moe(
    x: jax.Array,
    logits: jax.Array,
    gate: Weight,
    up: Weight | None,
    down: Weight,
    routing: Routing,
    *,
    bias: jax.Array | None = None,
    shared: tuple[Weight, Weight, Weight] | None = None,
) -> jax.Array:
    """Sends each token through its experts, `down(silu(gate(x)) * up(x))`, and adds their outputs by weight.

    Rows are sorted by expert and meet each expert's matrices in one grouped product, so only the experts that were hit
    are read. The sum runs over a token's experts in the order of its choices, without atomics: equal inputs give equal
    bits. Group sizes may be anything, also zero for most experts or all tokens for one.

    Args:
        x: [..., D] floating activations.
        logits: [..., E] of the router, for example `x @ router`: a small product that stays in float.
        gate: [E, D, F] weights of the experts, float or quantized; or, with `up=None`, [E, D, 2 F] as `merge_gate_up`
            gives it, whose kernel reads the rows once and computes silu(gate) * up before it writes.
        up: [E, D, F], or None.
        down: [E, F, D].
        routing: how experts are chosen and weighed.
        bias: see `route`.
        shared: (gate [D, S], up [D, S], down [S, D]) of an expert that every token goes through, or None.

    Returns:
        [..., D] of the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a routing that does not fit the experts.

    References:
        Shazeer et al. 2017, arXiv:1701.06538; Gale et al., MegaBlocks, 2022, arXiv:2211.15841 (grouped products).

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> up, down = (quantize_array(jnp.ones(shape), PRESETS["w4a16"]) for shape in ((4, 128, 256), (4, 256, 128)))
    >>> moe(jnp.ones((2, 3, 128)), jnp.zeros((2, 3, 4)), up, up, down, Routing(per_token=2)).shape
    (2, 3, 128)
    """
    _check(x, logits, gate, up, down, shared)
    weights, chosen = route(logits.reshape(-1, logits.shape[-1]), routing, bias)
    flat = x.reshape(-1, x.shape[-1])
    by_expert = sort_by_expert(chosen.reshape(-1), logits.shape[-1])
    rows = flat[by_expert.order // routing.per_token]
    hidden = _hidden(rows, gate, up, by_expert.sizes)
    out = _weighted(hidden, down, by_expert.sizes, weights.reshape(-1)[by_expert.order])
    total = jnp.sum(out[by_expert.place].reshape(*chosen.shape, -1).astype(jnp.float32), axis=1)
    if shared is not None:
        hidden = _gated(_dense(flat, shared[0]), _dense(flat, shared[1]))
        total = total + _dense(hidden, shared[2]).astype(jnp.float32)
    return total.astype(x.dtype).reshape(x.shape)


def merge_gate_up(gate: Weight, up: Weight) -> Weight:
    """Merges the gate and up projections of experts into the one weight that `moe` takes in their place.

    Args:
        gate: [E, D, F], F a multiple of 8: float or quantized along D.
        up: alike.

    Returns:
        [E, D, 2 F]: eight columns of gate, the same eight of up, and so on; plain, so that `pack_for` packs it.

    Raises:
        TypeError: one is quantized and the other not, or channels of one are kept in float.
        ValueError: they differ in shape, format, grid, or in what they do to their inputs.

    >>> merge_gate_up(jnp.zeros((2, 4, 8)), jnp.ones((2, 4, 8))).shape
    (2, 4, 16)
    """
    if not isinstance(gate, Quantized) and not isinstance(up, Quantized):
        return interleave(gate, up)
    if not isinstance(gate, QArray) or not isinstance(up, QArray):
        raise TypeError(f"merge_gate_up: {gate!r} and {up!r}; two float arrays or two QArrays are accepted")
    gate, up = plain(gate), plain(up)
    if jax.tree.structure(gate) != jax.tree.structure(up) or gate.shape != up.shape or gate.axis != (-2,):
        raise ValueError(f"merge_gate_up: {gate!r} and {up!r}; equal formats and shapes, along axis -2, are accepted")
    for name in ("pre_scale", "perm", "act_scale", "act_zero_point"):
        if getattr(gate, name) is not None and not jnp.array_equal(getattr(gate, name), getattr(up, name)):
            raise ValueError(f"merge_gate_up: the {name} of gate and up differ; quantize them together")
    outputs = gate.shape[-1]

    def merged(name: str) -> jax.Array | None:
        a, b = getattr(gate, name), getattr(up, name)
        return None if a is None else interleave(*(refine(grid, grid.ndim - 1, outputs) for grid in (a, b)))

    grids = {name: merged(name) for name in ("qvalue", "scale", "zero_point")}
    return dataclasses.replace(gate, **grids, trailing=(*gate.trailing[:-1], 2 * outputs))


def _hidden(rows: jax.Array, gate: Weight, up: Weight | None, sizes: jax.Array) -> jax.Array:
    """silu(gate) * up of rows sorted by expert."""
    if up is not None:
        return _gated(_grouped(rows, gate, sizes), _grouped(rows, up, sizes))
    if _by_kernel(gate, rows):
        return grouped_product(rows, gate, sizes, rows.dtype, activation="silu_mul")
    return _gated(*separate(_grouped(rows, gate, sizes)))


def _weighted(rows: jax.Array, weight: Weight, sizes: jax.Array, row_scale: jax.Array) -> jax.Array:
    """The product of rows sorted by expert, each row times its routing weight."""
    if _by_kernel(weight, rows):
        return grouped_product(rows, weight, sizes, rows.dtype, row_scale=row_scale)
    return _grouped(rows, weight, sizes).astype(jnp.float32) * row_scale[:, None]


def _by_kernel(weight: Weight, rows: jax.Array) -> TypeGuard[QArray]:
    return isinstance(weight, QArray) and ragged_implementation(weight, rows.dtype, rows.dtype)[0] == GROUPED


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in float32, of their dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


def _grouped(rows: jax.Array, weight: Weight, sizes: jax.Array) -> jax.Array:
    if isinstance(weight, Quantized):
        return ragged_dot(rows, weight, sizes)
    return jax.lax.ragged_dot(rows, weight.astype(rows.dtype), sizes)


def _dense(x: jax.Array, weight: Weight) -> jax.Array:
    numbers = (((1,), (0,)), ((), ()))
    if isinstance(weight, Quantized):
        return dot_general(x, weight, numbers)
    return jax.lax.dot_general(x, weight.astype(x.dtype), numbers)


def _check(
    x: jax.Array, logits: jax.Array, gate: Weight, up: Weight | None, down: Weight, shared: tuple[Weight, ...] | None
) -> None:
    """Raises where shapes do not fit."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or logits.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"moe: x {x.dtype} {x.shape} with logits {logits.shape}; [..., D] and [..., E] are accepted")
    experts, width, hidden = logits.shape[-1], x.shape[-1], down.shape[-2]
    expected = {"down": (down, (experts, hidden, width))}
    expected["gate"] = gate, (experts, width, hidden if up is not None else 2 * hidden)
    if up is not None:
        expected["up"] = up, (experts, width, hidden)
    if shared is not None:
        common = shared[0].shape[-1]
        sizes = ((width, common), (width, common), (common, width))
        expected |= {f"shared[{n}]": (w, size) for n, (w, size) in enumerate(zip(shared, sizes, strict=True))}
    for name, (weight, shape) in expected.items():
        if tuple(weight.shape) != shape:
            raise ValueError(f"moe: {name} {tuple(weight.shape)} for x {x.shape} and {experts} experts; {shape} fits")
