"""Activations as the kernels take them: rows, or the codes of rows with their scales."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant._kernels import activation_quant
from jaxquant.arrays import _packed
from jaxquant.arrays._dims import Dims
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import as_signed
from jaxquant.arrays._spec import PerGroup, PerToken, TensorSpec
from jaxquant.products._activation import padding
from jaxquant.products._products import ready_activation


class Rows(NamedTuple):
    """An activation as the kernels take it: [*batch, *free, K].

    Attributes:
        ready: the activation before it was laid out so, and rounded.
        values: itself, or its codes.
        scale: [..., 1], or a scale for each group of inputs, of codes.
        zero_point: int32 [..., 1] of codes that have one.
    """

    ready: jax.Array
    values: jax.Array
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """`source * rsqrt(mean(source ** 2) + epsilon) * weight`, over the last dimension.

    Attributes:
        source: [..., K].
        weight: float32 [K], or None.
        epsilon: the constant under the root.
    """

    source: jax.Array
    weight: jax.Array | None
    epsilon: float


def rows_of(x: jax.Array, q: QArray, dims: Dims, shared: dict) -> Rows:
    """Prepares and rounds an activation: once for all weights that need the same."""
    grid = None if q.activation is None or q.act_scale is not None else kernel_grid(q.activation)
    by_kernel = dataclasses.replace(q, activation=None) if grid else q
    ready, codes = ready_activation(x, by_kernel, dims, shared)
    key = "rows", id(ready), id(codes), dims.x_batch, tuple(_packed.contracting_order(q, dims)), q.activation
    if key in shared:
        return shared[key]
    if codes is not None:
        shared[key] = _rounded_by_xla(ready, codes, q, dims)
    elif grid is None:
        shared[key] = Rows(ready, _packed.to_rows(ready, q, dims))
    else:
        _, norm = shared.get(("norm", id(x)), (x, None))  # left by whoever walks the program
        shared[key] = Rows(ready, *_rounded_by_kernel(x, ready, norm, q, dims, grid))
    return shared[key]


def _rounded_by_kernel(
    x: jax.Array, ready: jax.Array, norm: Norm | None, q: QArray, dims: Dims, grid: dict
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of an activation; factors of the last dimension and the RMSNorm before them in the same pass."""
    by_last = (dims.x_contract, q.perm, padding(q, dims)[1]) == ((x.ndim - 1,), None, 0)
    factors = q.pre_scale
    if not by_last or (factors is not None and factors.size != x.shape[-1]):
        return activation_quant(_packed.to_rows(ready, q, dims), **grid)
    factors = None if factors is None else factors.reshape(-1)
    if norm is None:
        return activation_quant(_packed.to_rows(x, q, dims), pre_scale=factors, **grid)
    source = _packed.to_rows(norm.source, q, dims)
    return activation_quant(source, pre_scale=factors, norm_weight=norm.weight, epsilon=norm.epsilon, **grid)


def _rounded_by_xla(ready: jax.Array, codes: QArray, q: QArray, dims: Dims) -> Rows:
    """The codes of an activation, those of uint8 as -128..127 with a zero point that follows them."""

    def every_row(grid: jax.Array) -> jax.Array:
        laid = _packed.to_rows(grid, q, dims)
        sizes = [ready.shape[d] for d in dims.x_batch]
        return jnp.broadcast_to(laid, (*sizes, *laid.shape[len(sizes) :]))

    values, scale = _packed.to_rows(codes.qvalue, q, dims), every_row(codes.scale)
    if codes.zero_point is None:
        return Rows(ready, values, scale)
    zero = jnp.broadcast_to(every_row(codes.zero_point), (*values.shape[:-1], 1)).astype(jnp.int32) - 128
    return Rows(ready, as_signed(values ^ jnp.uint8(128)), scale, zero)


def kernel_grid(spec: TensorSpec) -> dict | None:
    """What `activation_quant` is to round to, or None where it has no such grid."""
    if not isinstance(spec.granularity, PerGroup | PerToken) or spec.range != "absmax":
        return None
    if spec.scale_dtype != "float32" or spec.grid == "signed" or spec.qtype not in ("int8", "float8_e4m3fn"):
        return None
    levels = {"full": 127.5, "restricted": 127.0, "power": 128.0}
    limit = levels[spec.grid] if spec.format.is_integer else spec.format.qmax
    return {
        "dtype": spec.format.code_dtype,
        "limit": limit,
        "group_size": spec.granularity.size if isinstance(spec.granularity, PerGroup) else None,
    }
