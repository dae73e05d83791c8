"""Products of rows sorted by expert with a stack of quantized weights, by the grouped kernel or by XLA."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant._kernels import activation_quant, grouped_matmul, grouped_supports
from jaxquant.arrays import _packed
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._packed import INT4_LAYOUTS, LOW_BIT_LAYOUT
from jaxquant.arrays._packing import Quantized, plain
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._spec import PerGroup, TensorSpec
from jaxquant.products._outlier_products import ragged_outliers
from jaxquant.products._ragged import expert_of_rows, ragged_product, ready_rows, round_rows
from jaxquant.products._rows import kernel_grid

GROUPED = "grouped_matmul"


def ragged_dot(
    lhs: jax.Array, rhs: Quantized, group_sizes: jax.Array, preferred_element_type: jnp.dtype | None = None
) -> jax.Array:
    """Multiplies as `jax.lax.ragged_dot` does: rows sorted by expert, each with its expert's quantized weight.

    Args:
        lhs: [M, K] floating rows.
        rhs: [E, K, N] quantized weight.
        group_sizes: [E] rows of each expert.
        preferred_element_type: dtype of the result; that of `lhs` by default.

    Returns:
        [M, N].

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> experts = quantize_array(jnp.ones((2, 128, 16)), PRESETS["w4a16"])
    >>> ragged_dot(jnp.ones((5, 128)), experts, jnp.asarray([2, 3])).shape
    (5, 16)
    """
    if rhs.ndim != 3 or lhs.ndim != 2:
        raise NotImplementedError(
            f"ragged_dot: lhs [M, K] and rhs [E, K, N] are accepted, got {lhs.shape}, {rhs.shape}"
        )
    dtype = preferred_element_type or lhs.dtype
    if not isinstance(rhs, OutlierArray):
        if ragged_implementation(rhs, lhs.dtype, dtype)[0] == GROUPED:
            return grouped_product(lhs, rhs, group_sizes, dtype)
        return ragged_product(lhs, plain(rhs), group_sizes, dtype)
    if rhs.axis != (-2,):
        raise NotImplementedError(
            f"ragged_dot: outlier channels along axis {rhs.axis}; those of K, (-2,), are accepted"
        )
    base, term = ragged_outliers(lhs, rhs, group_sizes)
    kept = lhs if rhs.base.activation is None else base
    return (ragged_product(kept, plain(rhs.base), group_sizes, term.dtype) + term).astype(dtype)


def grouped_product(
    x: jax.Array,
    q: QArray,
    group_sizes: jax.Array,
    dtype: jnp.dtype,
    *,
    activation: Literal["silu_mul"] | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """The ragged product by the grouped kernel, for which `ragged_implementation` has found the weight fit.

    Args:
        x: [M, K] rows sorted by expert.
        q: packed [E, K, N].
        group_sizes: [E].
        dtype: of the result.
        activation: `"silu_mul"` where the columns are a gate and an up projection, interleaved.
        row_scale: [M] factors of the result's rows.

    Returns:
        [M, N], or [M, N / 2] after an activation.
    """
    expert = expert_of_rows(group_sizes, x.shape[0])
    rows, x_scale = ready_rows(x, q, expert), None
    if q.activation is not None:
        rows, x_scale = _rounded_rows(rows, q, q.activation, expert)
    zero = None if q.zero_point is None else _packed.grid_to_matrix(q.zero_point, q)
    options = {"x_scale": x_scale, "activation": activation, "row_scale": row_scale, "out_dtype": dtype}
    return grouped_matmul(rows, q.qvalue, _packed.grid_to_matrix(q.scale, q), zero, group_sizes=group_sizes, **options)


def _rounded_rows(rows: jax.Array, q: QArray, spec: TensorSpec, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes, scales [M, 1]) of ready rows."""
    grid = None if q.act_scale is not None else kernel_grid(spec)
    if grid is not None:
        return activation_quant(rows, **grid)
    codes = round_rows(rows, q, spec, expert)
    return codes.qvalue, jnp.broadcast_to(codes.scale, (rows.shape[0], 1)).astype(jnp.float32)


def ragged_implementation(q: Quantized, x_dtype: jnp.dtype, dtype: jnp.dtype) -> tuple[str, str]:
    """What `ragged_dot` multiplies this weight [E, K, N] with, and why not with the grouped kernel."""
    q = q.base if isinstance(q, OutlierArray) else q
    if q.layout == "plain":
        return "xla", ""
    if (_packed.stack_dims(q), _packed.contracting_dims(q)) != (1, (1,)):
        return "xla", "unpacked in the program: it is summed over other axes than it was packed for"
    why = grouped_refusal(q, x_dtype, dtype)
    return (GROUPED, "") if why is None else ("xla", f"unpacked in the program: {why}")


def grouped_refusal(q: QArray, x_dtype: jnp.dtype, dtype: jnp.dtype) -> str | None:
    """Why the grouped kernel cannot multiply rows sorted by the matrices of a packed stack, or None."""
    if q.layout == LOW_BIT_LAYOUT:
        return f"the grouped kernel takes no {q.qtype} weights with float activations"
    (k, _), groups = _packed.matrix_shape(q), math.prod(_packed.group_cells(q))
    codes = jnp.dtype(jnp.int32) if q.layout in INT4_LAYOUTS else q.qvalue.dtype
    if groups > 1 and q.layout not in INT4_LAYOUTS:
        return "the grouped kernel takes 8-bit weights with one scale a column"
    if q.activation is not None and (not q.activation.symmetric or isinstance(q.activation.granularity, PerGroup)):
        return "the grouped kernel takes activations with one scale a row and no zero point"
    return grouped_supports(
        k,
        groups,
        x_dtype if q.activation is None else q.activation.format.code_dtype,
        codes,
        has_zero_point=q.zero_point is not None,
        scale_dtype=q.scale.dtype,
        out_dtype=dtype,
    )
