"""`quantize` and `dequantize`: parameter trees in, parameter trees out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant._numerics import all_finite
from jaxquant._qarray import QArray, dequantize_array, quantize_array
from jaxquant._rules import Assignment, assign
from jaxquant._spec import QuantConfig, QuantSpec
from jaxquant._tree import is_quantized, map_named, named_leaves


def quantize(params: Any, config: QuantConfig) -> Any:
    """Quantizes the weights of a parameter tree to the nearest codes.

    Everything is checked before the first weight is touched; weights are then quantized one by one, so that beside the
    result no more than one weight lives twice. Each shape and spec is compiled once.

    Args:
        params: pytree of arrays (NumPy, memory-mapped or device): a linen dict, an nnx State, any pytree.
        config: which parameters, and how.

    Returns:
        A tree of the same structure with a `QArray` for each quantized weight; other leaves are the caller's own.

    Raises:
        ValueError: an empty tree, an unmatched rule, a group that does not divide, a zero-size weight, NaN or Inf. The
            message names the parameter.
        TypeError: a leaf that is no array.

    >>> qparams = quantize({"dense": {"kernel": jnp.ones((256, 64))}}, QuantConfig.preset("w4a16"))
    >>> qparams["dense"]["kernel"]
    QArray(int4[256, 64], axis=(-2,), scale=[2, 64], plain)
    """
    assignments = assign(params, config)
    for path, leaf in named_leaves(params):
        _check_fits(path, leaf, assignments[path])

    def quantize_leaf(path: str, leaf: Any) -> Any:
        chosen = assignments[path]
        return leaf if chosen.spec is None else _round_to_nearest(path, leaf, chosen.spec, chosen.axis)

    return map_named(quantize_leaf, params)


def _check_fits(path: str, leaf: Any, chosen: Assignment) -> None:
    """Raises now what would fail for this leaf later, with its path."""
    if chosen.spec is None:
        return
    if 0 in leaf.shape:
        raise ValueError(
            f"{path}: shape {tuple(leaf.shape)} has an axis of zero size; leave it with Rule({path!r}, None)"
        )
    if len(leaf.shape) < -chosen.axis[0]:
        raise ValueError(
            f"{path}: axis {chosen.axis} does not exist in shape {tuple(leaf.shape)}; give Rule(..., axis=)"
        )
    try:
        jax.eval_shape(lambda w: quantize_array(w, chosen.spec, chosen.axis), _abstract(leaf))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; or leave it with Rule({path!r}, None)") from error


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype a leaf has on the device: float64 is float32 there, unless 64-bit mode is on."""
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


@functools.partial(jax.jit, static_argnames=("spec", "axis"))
def _quantize_checked(w: jax.Array, spec: QuantSpec, axis: tuple[int, ...]) -> tuple[QArray, jax.Array]:
    return quantize_array(w, spec, axis), all_finite(w)


def _round_to_nearest(path: str, leaf: Any, spec: QuantSpec, axis: tuple[int, ...]) -> QArray:
    quantized, finite = _quantize_checked(leaf, spec, axis)
    if not finite:  # waiting here also bounds the memory in flight to one weight
        raise not_finite(path, leaf)
    return quantized


def not_finite(path: str, leaf: Any) -> ValueError:
    """The error for a weight that holds NaN or Inf: says how many and where the first is."""
    bad = ~jnp.isfinite(jnp.asarray(leaf))
    first = tuple(int(i) for i in jnp.unravel_index(jnp.argmax(bad), bad.shape))
    return ValueError(
        f"{path}: {int(bad.sum())} of {bad.size} values are NaN or Inf, the first at index {first}; finite weights"
        f" are accepted: repair the checkpoint, or leave it with Rule({path!r}, None)"
    )


def dequantize(qparams: Any) -> Any:
    """Gives the float tree that a quantized tree stands for.

    Args:
        qparams: a tree with QArrays.

    Returns:
        The same tree with a float array, of the original dtype, for each QArray.

    >>> params = {"kernel": jnp.ones((128, 8))}
    >>> dequantize(quantize(params, QuantConfig.preset("w8a16")))["kernel"].dtype
    dtype('float32')
    """
    dequantize_jit = jax.jit(dequantize_array)
    return jax.tree.map(
        lambda leaf: dequantize_jit(leaf) if is_quantized(leaf) else leaf, qparams, is_leaf=is_quantized
    )
