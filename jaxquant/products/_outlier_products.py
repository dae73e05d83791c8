"""The parts of a product with an `OutlierArray`: what its base multiplies, and the float channels' own term.

The float rows are K/n times fewer than the codes, and so are the outliers that meet them, so the second product costs
little. Where the base rounds its activation, outliers are zero there: they would stretch the scale that a token's other
channels share.
"""

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._outliers import OutlierArray, split_activation
from jaxquant.arrays._views import Unrepresentable
from jaxquant.products._products import refusal
from jaxquant.products._ragged import expert_of_rows


def outlier_refusal(w: OutlierArray, dims: Dims) -> str | None:
    """Says why a weight has no quantized product over these dimensions, or None when it has.

    Args:
        w: the weight.
        dims: how it would meet an activation.

    Returns:
        The reason in words.
    """

    def wide(along: tuple[int, ...]) -> set[int]:
        return {d for d in along if w.shape[d] > 1}

    channels = _channels(w)
    if wide(channels) != wide(dims.w_contract) or channels[-1] not in dims.w_contract:
        return "its outlier channels are counted along other axes than it is summed over"
    if any(w.index.shape[d] > 1 for d in dims.w_free(w.ndim)):
        return "its outlier channels differ between outputs"
    return refusal(w.base, dims)


def split_outliers(x: jax.Array, w: OutlierArray, dims: Dims) -> tuple[jax.Array, jax.Array]:
    """Takes the outlier channels out of an activation.

    Args:
        x: floating activation.
        w: the weight that it meets.
        dims: how they meet.

    Returns:
        (the activation with zeros at the outliers, the outliers [*batch, *free of x, n]).

    Raises:
        Unrepresentable: see `outlier_refusal`.
    """
    why = outlier_refusal(w, dims)
    if why is not None:
        raise Unrepresentable(why)
    spots, channels = dict(zip(dims.w_contract, dims.x_contract, strict=True)), _channels(w)
    inner = [d for d in dims.w_contract if d not in channels] + [d for d in channels if d in spots]
    order = (*dims.x_batch, *dims.x_free(x.ndim), *(spots[d] for d in inner))
    ordered = x.transpose(order)
    flat = ordered.reshape(*ordered.shape[: x.ndim - len(inner)], -1)
    index = _laid(w.index, w, dims, ())
    free = range(len(dims.x_batch), flat.ndim - 1)
    base, outliers = split_activation(flat, jax.lax.expand_dims(index, free))
    return base.reshape(ordered.shape).transpose(sorted(range(x.ndim), key=order.__getitem__)), outliers


def outlier_product(outliers: jax.Array, w: OutlierArray, dims: Dims) -> jax.Array:
    """Multiplies the outliers by their float rows.

    Args:
        outliers: [*batch, *free of x, n].
        w: the weight.
        dims: how it meets the activation.

    Returns:
        float32 [*batch, *free of x, *free of the weight].
    """
    free, batch = dims.w_free(w.ndim), tuple(range(len(dims.w_batch)))
    sizes = [w.shape[d] for d in dims.w_batch], [w.shape[d] for d in free]
    rows = _laid(w.rows, w, dims, free).astype(outliers.dtype)
    rows = jnp.broadcast_to(rows, (*sizes[0], outliers.shape[-1], *sizes[1]))
    numbers = (((outliers.ndim - 1,), (len(batch),)), (batch, batch))

    def product(outliers: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dot_general(outliers, rows, numbers, preferred_element_type=jnp.dtype(jnp.float32))

    def in_float32(outliers: jax.Array, rows: jax.Array) -> jax.Array:
        return product(outliers.astype(jnp.float32), rows.astype(jnp.float32))

    # XLA's CPU backend compiles some bfloat16 products under a scan to a call that it then cannot run.
    return jax.lax.platform_dependent(outliers, rows, cpu=in_float32, default=product)


def ragged_outliers(x: jax.Array, w: OutlierArray, group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the outlier channels out of rows sorted by expert, and multiplies them by the float rows.

    Args:
        x: [M, K] floating rows.
        w: [E, K, N], contracting K alone.
        group_sizes: [E] rows of each expert.

    Returns:
        (x with zeros at the outliers of each row's expert, the float rows' share of the product, float32 [M, N]).
    """
    experts, _, outputs = w.shape
    count = w.rows.shape[1]
    index = jnp.broadcast_to(w.index[:, :, 0], (experts, count))[expert_of_rows(group_sizes, x.shape[0])]
    base, outliers = split_activation(x, index)
    rows = jnp.broadcast_to(w.rows, (experts, count, outputs)).astype(x.dtype)
    term = jax.lax.ragged_dot(outliers, rows, group_sizes, preferred_element_type=jnp.dtype(jnp.float32))
    return base, term


def _channels(w: OutlierArray) -> tuple[int, ...]:
    """The dimensions that outliers are counted in, counted from the front."""
    return tuple(w.ndim + a for a in w.axis)


def _laid(picked: jax.Array, w: OutlierArray, dims: Dims, free: tuple[int, ...]) -> jax.Array:
    """Rows or their index as [*batch, n, *free]."""
    kept = (*dims.w_batch, _channels(w)[-1], *free)
    ones = tuple(d for d in range(w.ndim) if d not in kept)
    return jax.lax.squeeze(picked.transpose(*kept, *ones), range(len(kept), w.ndim))
