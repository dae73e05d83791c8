"""Round to nearest: the data-free baseline, and what finishes a chain that has not rounded."""

import dataclasses

import jax.numpy as jnp

from jaxquant.algorithms._transform import (
    WeightState,
    WeightTransform,
    find_cells,
    make_transform,
    matrix_grid,
    output_error,
)
from jaxquant.arrays._numerics import decode, encode
from jaxquant.arrays._spec import QuantSpec


def rtn() -> WeightTransform:
    """Rounds each weight to the nearest code of its cell's range.

    Returns:
        The transform; it needs no data.

    >>> rtn().needs
    frozenset()
    """
    return make_transform(apply_rtn, "rtn", set())


def apply_rtn(state: WeightState, spec: QuantSpec) -> WeightState:
    """Rounds a state to nearest; ranges follow `spec.weight.range` and the state's `clip`."""
    grid = matrix_grid(state.weight.shape, spec.weight)
    scale, zero_point = find_cells(state.weight, grid, spec.weight, state.clip)
    codes = encode(state.weight, scale, zero_point, spec.weight)
    return dataclasses.replace(state, codes=codes, scale=scale, zero_point=zero_point)


def finish(start: WeightState, state: WeightState, spec: QuantSpec) -> WeightState:
    """Rounds what is not yet rounded, and reports output errors beside round-to-nearest's where a Hessian was gathered.

    Args:
        start: the state before any transform.
        state: the state after them.
        spec: the spec.

    Returns:
        The finished state; its report holds `tokens`, and `error`, `error_rtn`: mean squared error of an output element
        over the mean square of the outputs.
    """
    if state.codes is None:
        state = apply_rtn(state, spec)
    report = state.report | {"tokens": state.stats.count}
    if start.stats.hessian is not None:
        hessian = start.stats.hessian
        power = jnp.maximum(output_error(hessian, start.weight), jnp.finfo(jnp.float32).tiny)
        nearest = dequantize_state(apply_rtn(start, spec), spec)
        report["error"] = output_error(hessian, dequantize_state(state, spec) - start.weight) / power
        report["error_rtn"] = output_error(hessian, nearest - start.weight) / power
    return dataclasses.replace(state, report=report)


def dequantize_state(state: WeightState, spec: QuantSpec):
    """The [K, N] float weight that a finished state stands for, in units of the unscaled inputs."""
    if state.codes is None or state.scale is None:
        raise ValueError("dequantize_state: the weight is not rounded yet; finish(...) it first")
    weight = decode(state.codes, state.scale, state.zero_point, spec.weight)
    if state.outliers is not None:
        weight = weight.at[state.outliers.index].add(state.outliers.rows, mode="drop")
    if state.pre_scale is not None:
        weight = weight * jnp.expand_dims(state.pre_scale, 1)
    return weight
