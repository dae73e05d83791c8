"""GPTQ: each input channel's rounding error is made up for by the channels not yet rounded.

Differs from the paper in:
1. Scales of a group are found when the group is reached, on its weights as all earlier corrections left them ("fresh");
   the reference code uses weights that miss the corrections of the current block, or the original ones.
2. With fresh scales, `act_order` sorts whole groups, and channels within their group, so that groups stay together.
   `scales="static"` sorts all channels and takes scales from the original weights, as the reference code's
   `--act-order --static-groups`.
3. The range search takes squared errors weighted by 1 / U_kk^2, which is what they add to the objective; the reference
   code takes |error|^2.4 unweighted.
4. `rounds` of coordinate descent on the codes, each with the scales refitted in closed form, follow.
5. Corrections come from the factor of H and not of H^-1: with H = R R^T and U = R^-1, the corrections that earlier
   blocks owe to a block are U_bb^T R_:b^T D. The iterates are the same, and the inverse of a K x K matrix is saved.
6. A failed factorization raises the damping and reports it. Channels that never fired are rounded to nearest, not set
   to zero.

Symbols: H [K, K] Hessian x^T x, R its upper factor, U = R^-1, D [K, N] = weight - its rounding.

References:
    Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", arXiv:2210.17323; reference code IST-DASLab/gptq.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant.algorithms._descent import descend
from jaxquant.algorithms._factor import diagonal_blocks, factor_upper, regularize
from jaxquant.algorithms._rows import visit_rows
from jaxquant.algorithms._statistics import require
from jaxquant.algorithms._transform import WeightState, WeightTransform, find_cells, make_transform, matrix_grid
from jaxquant.arrays._numerics import decode, encode
from jaxquant.arrays._spec import QuantSpec, TensorSpec

TILE = 128  # rows between two products with everything before them
Cells = tuple[jax.Array, jax.Array | None]  # scales and zero points


def gptq(
    *,
    damping: float = 0.01,
    act_order: bool = True,
    scales: Literal["fresh", "static"] = "fresh",
    rounds: int = 2,
) -> WeightTransform:
    """Rounds weights one input channel after the other, correcting the rest by the inverse Hessian.

    Range and grid follow the spec: `TensorSpec(range="mse", grid="signed")` gave the least error when tried, and is
    what `QuantConfig.preset(name, algorithm=gptq())` takes.

    Args:
        damping: added to the Hessian's diagonal, as a part of its mean.
        act_order: round channels of greater activation first.
        scales: `"fresh"` finds a group's scales on the corrected weights, `"static"` on the original ones.
        rounds: rounds of coordinate descent with refitted scales after it; 0 is the paper's GPTQ.

    Returns:
        The transform; it needs the Hessian.

    Raises:
        ValueError: an argument out of range.

    >>> sorted(gptq().needs)
    ['hessian']
    """
    if damping <= 0:
        raise ValueError(f"gptq: damping must be positive, got {damping!r}; 0.01 is usual")
    if scales not in ("fresh", "static"):
        raise ValueError(f"gptq: scales {scales!r}; accepted: 'fresh', 'static'")
    if rounds < 0:
        raise ValueError(f"gptq: rounds must be 0 or more, got {rounds!r}")
    options = {"damping": damping, "act_order": act_order, "scales": scales, "rounds": rounds}
    return make_transform(_apply_gptq, "gptq", {"hessian"}, (("range", "mse"), ("grid", "signed")), **options)


def _apply_gptq(
    state: WeightState, spec: QuantSpec, *, damping: float, act_order: bool, scales: str, rounds: int
) -> WeightState:
    grid = matrix_grid(state.weight.shape, spec.weight)
    hessian, dead = regularize(require(state.stats, "hessian"))
    fresh = scales == "fresh" and grid[0] > 1
    order = _processing_order(hessian, grid[0], act_order, grouped=fresh)
    factor, used = factor_upper(hessian[order][:, order], damping)
    solve = _solve_fresh if fresh else _solve_static
    codes, scale, zero_point = solve(state, factor, order, grid, spec.weight)
    if rounds:
        damped = hessian + used_damping(used) * jnp.eye(hessian.shape[0])
        codes, scale = descend(state.weight, damped, codes, scale, zero_point, spec.weight, rounds)
    report = state.report | {"damping": used, "dead": jnp.sum(dead)}
    return dataclasses.replace(state, codes=codes, scale=scale, zero_point=zero_point, report=report)


def used_damping(used: jax.Array) -> jax.Array:
    """The damping, made finite where no factor was found."""
    return jnp.where(jnp.isfinite(used), used, 1.0)


def _processing_order(hessian: jax.Array, groups: int, act_order: bool, *, grouped: bool) -> jax.Array:
    """The order in which rows are rounded: most active first, by whole groups if `grouped`."""
    channels = hessian.shape[0]
    if not act_order:
        return jnp.arange(channels)
    activity = jnp.diagonal(hessian)
    if not grouped:
        return jnp.argsort(-activity)
    split = activity.reshape(groups, -1)
    within = jnp.argsort(-split, axis=1)
    first = jnp.argsort(-jnp.sum(split, axis=1))
    starts = jax.lax.expand_dims(first * split.shape[1], [1])
    return (starts + within[first]).reshape(-1)


def _solve_fresh(
    state: WeightState, factor: jax.Array, order: jax.Array, grid: tuple[int, int], spec: TensorSpec
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rounds group after group, each with scales found on its corrected weights."""
    size = state.weight.shape[0] // grid[0]
    group_order = order[::size] // size
    importance = jnp.square(jnp.diagonal(factor))
    clip = None if state.clip is None else state.clip[group_order]

    def cells(tile, corrected):
        weight = jax.lax.dynamic_slice_in_dim(importance, tile * size, size)
        narrow = None if clip is None else clip[tile][None]
        return find_cells(corrected, (1, grid[1]), spec, narrow, weight)

    codes, found = _solve_tiles(state.weight[order], factor, size, cells, spec)
    back = jnp.argsort(group_order)
    scale, zero_point = jax.tree.map(lambda stacked: stacked[:, 0][back], found)
    return codes[jnp.argsort(order)], scale, zero_point


def _solve_static(
    state: WeightState, factor: jax.Array, order: jax.Array, grid: tuple[int, int], spec: TensorSpec
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rounds row after row in any order, with scales found on the original weights."""
    channels = state.weight.shape[0]
    place = jnp.argsort(order)
    importance = jnp.square(jnp.diagonal(factor))[place]
    scale, zero_point = find_cells(state.weight, grid, spec, state.clip, importance)
    tile = min(TILE, channels)
    missing = -channels % tile
    group = jnp.pad(order // (channels // grid[0]), (0, missing))

    def cells(tile_index, corrected):
        rows = jax.lax.dynamic_slice_in_dim(group, tile_index * tile, tile)
        return scale[rows], None if zero_point is None else zero_point[rows]

    weight = jnp.pad(state.weight[order], ((0, missing), (0, 0)))
    padded = jnp.pad(factor, (0, missing)) + jnp.diag(jnp.where(jnp.arange(channels + missing) < channels, 0.0, 1.0))
    codes, _ = _solve_tiles(weight, padded, tile, cells, spec)
    return codes[:channels][place], scale, zero_point


def _solve_tiles(
    weight: jax.Array,
    factor: jax.Array,
    tile: int,
    cells: Callable[[jax.Array, jax.Array], Cells],
    spec: TensorSpec,
) -> tuple[jax.Array, Any]:
    """Rounds the rows of `weight` [K, N] in order, `tile` at a time.

    `cells(tile index, corrected weights)` gives the scales and zero points that its rows are rounded with, for the
    whole tile or for each row; those for whole tiles come back stacked, beside the codes.
    """
    tiles = weight.shape[0] // tile
    diagonal = diagonal_blocks(factor, tile)
    eye = jnp.broadcast_to(jnp.eye(tile), diagonal.shape)
    inverse = jax.lax.linalg.triangular_solve(diagonal, eye, left_side=True, lower=False)

    def step(deviation, scanned):
        index, original, upper = scanned
        owed = jax.lax.dynamic_slice_in_dim(factor, index * tile, tile, axis=1)
        sums = jnp.einsum("kt,kn->tn", owed, deviation, precision="high")
        corrected = original + jnp.einsum("ts,tn->sn", upper, sums, precision="high")
        scale, zero_point = cells(index, corrected)
        codes = _round_tile(corrected, upper, scale, zero_point, spec)
        left = original - decode(codes, *_by_row((scale, zero_point), tile), spec)
        deviation = jax.lax.dynamic_update_slice_in_dim(deviation, left, index * tile, axis=0)
        found = (scale, zero_point) if scale.shape[0] == 1 else None
        return deviation, (codes, found)

    rows = weight.reshape(tiles, tile, -1)
    _, (codes, found) = jax.lax.scan(step, jnp.zeros_like(weight), (jnp.arange(tiles), rows, inverse))
    return codes.reshape(weight.shape), found


def _by_row(cells: Cells, rows: int) -> Cells:
    """Repeats scales and zero points found for a whole tile for each of its rows; those of single rows stay."""
    return jax.tree.map(lambda grid: jnp.broadcast_to(grid, (rows, grid.shape[1])), cells)


def _round_tile(
    corrected: jax.Array, upper: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: TensorSpec
) -> jax.Array:
    """Rounds the rows of a tile in order; each error corrects the rows after it along its row of U."""
    scale, zero_point = _by_row((scale, zero_point), corrected.shape[0])

    def visit(row, own):
        row_scale, row_zero, pivot = own
        codes = encode(row, row_scale, row_zero, spec)
        return codes, (row - decode(codes, row_scale, row_zero, spec)) / pivot

    pivots = jnp.expand_dims(jnp.diagonal(upper), 1)
    return visit_rows(corrected, upper, (scale, zero_point, pivots), visit)[0]
