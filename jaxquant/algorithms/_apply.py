"""From a weight of any rank and its statistics to a quantized array, through a transform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxquant.algorithms._statistics import Statistics
from jaxquant.algorithms._transform import Outliers, WeightState, WeightTransform, chain, rescale_inputs
from jaxquant.algorithms.ranges import activation_scale, channel_scales, range_needs
from jaxquant.algorithms.rtn import finish
from jaxquant.arrays._matrix import (
    MatrixForm,
    from_matrix,
    grid_from_matrix,
    matrix_form,
    picked_from_matrix,
    rows_from_matrix,
    rows_to_matrix,
    scalars_from_matrix,
    to_matrix,
)
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray, from_codes
from jaxquant.arrays._spec import PerChannel, PerTensor, QuantSpec


def needed_statistics(transform: WeightTransform | None, spec: QuantSpec) -> frozenset[str]:
    """Names the statistics that a weight's calibration must gather.

    Args:
        transform: the algorithm, or None for round-to-nearest.
        spec: the weight's spec; a static activation needs its range.

    Returns:
        Names out of `jaxquant.algorithms._statistics.NEEDS`.
    """
    needs = transform.needs if transform is not None else frozenset()
    return needs | (range_needs(spec.activation) if spec.activation is not None else frozenset())


def quantize_weight(
    w: jax.Array,
    spec: QuantSpec,
    transform: WeightTransform | None = None,
    stats: Statistics | None = None,
    *,
    axis: tuple[int, ...] = (-2,),
    batch_dims: int = 0,
) -> tuple[QArray | OutlierArray, dict[str, jax.Array]]:
    """Quantizes one weight by an algorithm, from the statistics of its inputs.

    Args:
        w: floating array.
        spec: how.
        transform: the algorithm; None rounds to nearest.
        stats: statistics of the inputs over the flattened contracting axes, each leaf with `batch_dims` leading
            dimensions; None where nothing was gathered.
        axis: contracting axes, negative and ascending.
        batch_dims: leading dimensions that are scan stacks or experts: quantized each on its own, in one program.

    Returns:
        (the quantized weight, the report: float32 and int32 arrays of the batch's shape).

    Raises:
        ValueError: statistics that the transform needs were not gathered.

    >>> from jaxquant.arrays._spec import PRESETS
    >>> q, report = quantize_weight(jnp.ones((128, 8)), PRESETS["w4a16"])
    >>> q.shape
    (128, 8)
    """
    form = matrix_form(w.shape, axis, batch_dims, spec.weight)
    gathered = stats if stats is not None else Statistics(jnp.zeros(form.batch))
    return _quantize_form(w, gathered, transform if transform is not None else chain(), spec, form)


# Every shape is compiled once and run a few times. XLA's search for the fastest kernel of each float32 product takes
# seconds for each product and shape, more than the weights themselves take; cuBLAS' own choice is good.
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


@functools.partial(jax.jit, static_argnames=("transform", "spec", "form"), compiler_options=OPTIONS)
def _quantize_form(
    w: jax.Array, stats: Statistics, transform: WeightTransform, spec: QuantSpec, form: MatrixForm
) -> tuple[QArray | OutlierArray, dict[str, jax.Array]]:
    one = functools.partial(_quantize_matrix, transform=transform, spec=spec)
    for _ in range(form.batch_dims):
        one = jax.vmap(one)
    state, act_scale, act_zero_point = one(to_matrix(w, form), pad_statistics(stats, form))
    return _to_container(state, act_scale, act_zero_point, stored_spec(spec), form, w.dtype), state.report


def _quantize_matrix(w: jax.Array, stats: Statistics, *, transform: WeightTransform, spec: QuantSpec):
    start = WeightState(w, stats)
    activation = spec.activation
    if activation is None or not activation.static:
        return finish(start, transform.apply(start, spec), spec), None, None
    if isinstance(activation.granularity, PerChannel):
        scaled = rescale_inputs(start, 1 / channel_scales(stats, activation))
        return finish(start, transform.apply(scaled, stored_spec(spec)), spec), jnp.ones(()), None
    state = finish(start, transform.apply(start, spec), spec)
    return state, *activation_scale(state.stats, activation)


def stored_spec(spec: QuantSpec) -> QuantSpec:
    """The spec as products see it: scales for each channel of an activation lie in `pre_scale` and the weight."""
    activation = spec.activation
    if activation is None or not isinstance(activation.granularity, PerChannel):
        return spec
    return dataclasses.replace(spec, activation=dataclasses.replace(activation, granularity=PerTensor()))


def pad_statistics(stats: Statistics, form: MatrixForm) -> Statistics:
    """Gives statistics over logical channels the padded K of the matrix; padded channels never fired."""
    last = {name: getattr(stats, name) for name in ("absmax", "sum_abs", "low", "high", "samples")}
    new = {name: rows_to_matrix(x, form, -1) for name, x in last.items() if x is not None}
    squares = {name: getattr(stats, name) for name in ("hessian", "cross")}
    new |= {n: rows_to_matrix(rows_to_matrix(x, form, -1), form, -2) for n, x in squares.items() if x is not None}
    if stats.residual is not None:
        new["residual"] = rows_to_matrix(stats.residual, form, -2)
    return dataclasses.replace(stats, **new)


def _to_container(state: WeightState, act_scale, act_zero_point, spec: QuantSpec, form: MatrixForm, dtype):
    if state.codes is None or state.scale is None:
        raise ValueError("a finished state has codes and scales")
    zero_point = None if state.zero_point is None else grid_from_matrix(state.zero_point, form, spec.weight)
    base = from_codes(
        from_matrix(state.codes, form),
        grid_from_matrix(state.scale, form, spec.weight),
        zero_point,
        spec,
        form.axis,
        form.shape,
        dtype,
        pre_scale=None if state.pre_scale is None else rows_from_matrix(state.pre_scale, form),
        act_scale=None if act_scale is None else scalars_from_matrix(act_scale, form),
        act_zero_point=None if act_zero_point is None else scalars_from_matrix(act_zero_point, form),
    )
    if state.outliers is None:
        return base
    return _with_outliers(base, state.outliers, state.pre_scale, form)


def _with_outliers(base: QArray, outliers: Outliers, pre_scale: jax.Array | None, form: MatrixForm) -> OutlierArray:
    """Puts the float channels beside the codes: rows in units of the unscaled inputs, channels without K's padding."""
    index, rows = outliers.index, outliers.rows
    if pre_scale is not None:
        factor = jnp.take_along_axis(pre_scale, index, axis=-1, mode="fill", fill_value=0)
        rows = rows * jnp.expand_dims(factor, -1)
    length = form.shape[form.axis[-1]]
    outer, inner = index // form.padded, index % form.padded
    index = jnp.where(inner < length, outer * length + inner, form.matrix_shape[0] // form.padded * length)
    index = picked_from_matrix(jnp.expand_dims(index, -1), form)
    return OutlierArray(base, picked_from_matrix(rows, form).astype(base.dtype), index)
