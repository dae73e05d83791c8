"""Coordinate descent on codes, with scales refitted in closed form, under the layer's output error.

With D = weight - rounding and the error trace(D^T H D), one row's best rounding given all others is the nearest code to
its rounding + (H D)_k / H_kk, and one cell's best scale given all others moves by (C . H D) / (C^T H C), where C holds
its codes less the zero point. Both steps never raise the error.
"""

import jax
import jax.numpy as jnp

from jaxquant.algorithms._rows import visit_rows
from jaxquant.arrays._numerics import decode, encode
from jaxquant.arrays._spec import TensorSpec

TILE = 32  # rows between two products with H


def descend(
    weight: jax.Array,
    hessian: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    spec: TensorSpec,
    rounds: int,
) -> tuple[jax.Array, jax.Array]:
    """Lowers the output error of rounded weights by rounds of scale refits and code updates.

    Args:
        weight: [K, N] float32, what the codes stand for.
        hessian: [K, K] positive definite.
        codes: [K, N] unpacked codes.
        scale: grid.
        zero_point: grid or None; kept as it is.
        spec: the format; refitted scales are rounded to its `scale_dtype`.
        rounds: how many rounds.

    Returns:
        (codes, scale).
    """

    def one_round(carry, _):
        codes, scale = carry
        scale = refit_scales(weight, hessian, codes, scale, zero_point, spec)
        return (descend_codes(weight, hessian, codes, scale, zero_point, spec), scale), None

    (codes, scale), _ = jax.lax.scan(one_round, (codes, scale), None, length=rounds)
    return codes, scale


def refit_scales(
    weight: jax.Array,
    hessian: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    spec: TensorSpec,
) -> jax.Array:
    """Gives each row of cells, one after the other, its least-squares scales under H."""
    size = weight.shape[0] // scale.shape[0]
    deviation = weight - decode(codes, scale, zero_point, spec)

    def refit(deviation, index):
        start = index * size
        rows = jax.lax.dynamic_slice_in_dim(hessian, start, size)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(scale, index, 1)
        zero = None if zero_point is None else jax.lax.dynamic_slice_in_dim(zero_point, index, 1)
        values = decode(jax.lax.dynamic_slice_in_dim(codes, start, size), jnp.ones_like(old), zero, spec)
        gradient = jnp.einsum("tk,kn->tn", rows, deviation, precision="high")
        curvature = jnp.einsum("ts,sn->tn", inner, values, precision="high")
        along, against = _cell_sum(values * gradient, old.shape[1]), _cell_sum(values * curvature, old.shape[1])
        wide = old.astype(jnp.float32)
        best = wide + along / jnp.where(against > 0, against, 1.0)
        good = (against > 0) & (jnp.abs(best) > float(jnp.finfo(scale.dtype).tiny))
        new = jnp.where(good, best, wide).astype(scale.dtype)
        moved = jnp.repeat(new.astype(jnp.float32) - wide, values.shape[1] // old.shape[1], axis=1)
        own = jax.lax.dynamic_slice_in_dim(deviation, start, size) - values * moved
        return jax.lax.dynamic_update_slice_in_dim(deviation, own, start, axis=0), new[0]

    return jax.lax.scan(refit, deviation, jnp.arange(scale.shape[0]))[1]


def _cell_sum(x: jax.Array, cells: int) -> jax.Array:
    return jnp.sum(x.reshape(x.shape[0], cells, -1), axis=(0, 2))[None]


def descend_codes(
    weight: jax.Array,
    hessian: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    spec: TensorSpec,
) -> jax.Array:
    """Moves each row of codes, one after the other, to its best value given the others."""
    channels = weight.shape[0]
    missing = -channels % TILE
    group = jnp.minimum(jnp.arange(channels + missing) // (channels // scale.shape[0]), scale.shape[0] - 1)
    hessian = jnp.pad(hessian, (0, missing)) + jnp.diag(jnp.where(jnp.arange(channels + missing) < channels, 0.0, 1.0))
    rounded = decode(codes, scale, zero_point, spec)
    deviation = jnp.pad(weight - rounded, ((0, missing), (0, 0)))
    rounded = jnp.pad(rounded, ((0, missing), (0, 0)))

    def visit(gradient, own):
        value, row_scale, zero, curvature = own
        new = encode(value + gradient / curvature, row_scale, zero, spec)
        return new, decode(new, row_scale, zero, spec) - value

    def update_tile(deviation, scanned):
        index, values, groups = scanned
        start = index * TILE
        rows = jax.lax.dynamic_slice_in_dim(hessian, start, TILE)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, TILE, axis=1)
        gradient = jnp.einsum("tk,kn->tn", rows, deviation, precision="high")
        grids = jax.tree.map(lambda grid: grid[groups], (scale, zero_point))
        each = (values, *grids, jnp.expand_dims(jnp.diagonal(inner), 1))
        new, moved = visit_rows(gradient, inner, each, visit)
        own = jax.lax.dynamic_slice_in_dim(deviation, start, TILE) - moved
        return jax.lax.dynamic_update_slice_in_dim(deviation, own, start, axis=0), new

    tiles = (channels + missing) // TILE
    scanned = (jnp.arange(tiles), rounded.reshape(tiles, TILE, -1), group.reshape(tiles, TILE))
    _, new = jax.lax.scan(update_tile, deviation, scanned)
    return new.reshape(channels + missing, -1)[:channels]
