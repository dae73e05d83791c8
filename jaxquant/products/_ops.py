"""Products that take a `QArray` where `jax.lax` takes an array: the explicit door for authors of quantized models.

`quantized(fn)` reaches the same functions from an unmodified model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.arrays._dims import Dims
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._packing import Quantized, plain
from jaxquant.arrays._views import Unrepresentable
from jaxquant.products._launches import kernel_name, kernel_refusal, multiply_siblings, product_key
from jaxquant.products._outlier_products import outlier_product, outlier_refusal, split_outliers
from jaxquant.products._products import product, refusal

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot_general(
    lhs: jax.Array | Quantized,
    rhs: jax.Array | Quantized,
    dimension_numbers: DimensionNumbers,
    preferred_element_type: jnp.dtype | None = None,
    *,
    shared: dict | None = None,
) -> jax.Array:
    """Multiplies as `jax.lax.dot_general` does, with a quantized weight on either side.

    The weight stays in codes: per-channel scales multiply the result, per-group scales each group's partial sum. With
    an `activation` spec in the weight the other side is quantized too, and integers (or float8s) meet in the product.
    Derivatives reach the floating side straight through its rounding.

    Args:
        lhs: floating array or quantized weight.
        rhs: quantized weight or floating array; one side at least is quantized.
        dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)).
        preferred_element_type: dtype of the result; the floating side's own by default. Sums are kept in float32.
        shared: a dict that products in one trace hand on, so that each activation is quantized once.

    Returns:
        [*batch, *free of lhs, *free of rhs].

    Raises:
        NotImplementedError: both sides are quantized, or this weight has no product over these dimensions; the message
            says why.

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> w = quantize_array(jnp.ones((128, 16)), PRESETS["w4a16"])
    >>> dot_general(jnp.ones((2, 128)), w, (((1,), (0,)), ((), ()))).shape
    (2, 16)
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
        tuple(tuple(map(int, dims)) for dims in pair) for pair in dimension_numbers
    )
    try:
        if isinstance(rhs, Quantized) and not isinstance(lhs, Quantized):
            dims = Dims(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
            return _multiply(lhs, rhs, dims, preferred_element_type or lhs.dtype, shared)
        if isinstance(rhs, Quantized) or not isinstance(lhs, Quantized):
            raise NotImplementedError("dot_general: one side must be quantized and the other a floating array")
        dims = Dims(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
        result = _multiply(rhs, lhs, dims, preferred_element_type or rhs.dtype, shared)
    except Unrepresentable as error:
        raise NotImplementedError(f"dot_general: {error}") from error
    batch, rows = len(rhs_batch), len(dims.x_free(rhs.ndim))
    return jnp.moveaxis(result, range(batch, batch + rows), range(result.ndim - rows, result.ndim))


def _multiply(x: jax.Array, q: Quantized, dims: Dims, dtype: jnp.dtype, shared: dict | None) -> jax.Array:
    """The product by the kernel that the weight is packed for, or by XLA; outlier channels are a term of their own."""
    if isinstance(q, OutlierArray):
        base, outliers = split_outliers(x, q, dims)
        term = outlier_product(outliers, q, dims)
        kept = x if q.base.activation is None else base  # the base's own rows are zero there
        partial_dtype = term.dtype if q.base.layout == "plain" else x.dtype
        return (_multiply(kept, q.base, dims, partial_dtype, shared).astype(term.dtype) + term).astype(dtype)
    if q.layout != "plain" and kernel_refusal(q, dims, x.dtype, dtype) is None:
        shared = {} if shared is None else shared
        if product_key(x, q, dims, dtype) not in shared:
            multiply_siblings(x, [(q, dims, dtype)], shared)
        return shared[product_key(x, q, dims, dtype)][-1]
    return product(x, plain(q), dims, dtype, shared)


def why_dense(q: Quantized, lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> str | None:
    """Why `dot_general` would refuse this weight, or None."""
    dims = pairing(lhs_is_weight, dimension_numbers)
    return outlier_refusal(q, dims) if isinstance(q, OutlierArray) else refusal(q, dims)


def implementation(
    q: Quantized, lhs_is_weight: bool, dimension_numbers: DimensionNumbers, x_dtype: jnp.dtype, dtype: jnp.dtype
) -> tuple[str, str]:
    """What `dot_general` multiplies this weight with, and why not with the kernel that it is packed for."""
    q = q.base if isinstance(q, OutlierArray) else q
    if q.layout == "plain":
        return "xla", ""
    dims = pairing(lhs_is_weight, dimension_numbers)
    why = kernel_refusal(q, dims, x_dtype, dtype)
    return (kernel_name(q, dims), "") if why is None else ("xla", f"unpacked in the program: {why}")


def pairing(lhs_is_weight: bool, dimension_numbers: DimensionNumbers) -> Dims:
    """How the activation and the weight of a `dot_general` meet."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
        tuple(tuple(map(int, dims)) for dims in pair) for pair in dimension_numbers
    )
    if lhs_is_weight:
        return Dims(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
    return Dims(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
