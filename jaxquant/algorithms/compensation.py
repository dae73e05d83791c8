"""Compensation of input errors: the weight makes up for what quantizing the layers before it did to its inputs.

The layer sees x where the float model had x_float. The weight W* whose outputs x W* are nearest to x_float W is
W + H^-1 (C - H) W with H = x^T x and C = x^T x_float; this transform goes a part of the way there, and leaves rounding
to the next transform in the chain.

Differs from the papers in:
1. QEP (Arai and Ichikawa 2025) and GPTAQ (Li et al. 2025) couple the correction with GPTQ; here it is a step before any
   algorithm that rounds, so the chain needs no other code.
2. The strength is 0.5 by default; 1 follows the calibration tokens too closely and was worse when tried.
3. `residual` adds a part of the deviation of the stream that the output is added to: x^T r with r = float - quantized.

Symbols: H [K, K] Hessian, C [K, K] cross statistics, W [K, N] weight.

References:
    Arai, Ichikawa 2025, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization",
    arXiv:2504.09629. Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    arXiv:2504.02692.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.algorithms._factor import factor_upper, regularize
from jaxquant.algorithms._statistics import require
from jaxquant.algorithms._transform import WeightState, WeightTransform, make_transform
from jaxquant.arrays._spec import QuantSpec


def compensate(*, strength: float = 0.5, residual: float = 0.0, damping: float = 0.01) -> WeightTransform:
    """Moves a weight towards the one that gives the float model's outputs on the quantized model's inputs.

    Args:
        strength: the part of the way, in [0, 1].
        residual: the part of the residual stream's deviation that the outputs also make up for, in [0, 1].
        damping: added to the Hessian's diagonal, as a part of its mean.

    Returns:
        The transform; it needs the Hessian of the quantized model's inputs and their cross statistics with the float
        model's. Put it before what rounds: `chain(compensate(), gptq())`.

    Raises:
        ValueError: an argument out of range.

    >>> sorted(compensate().needs)
    ['cross', 'hessian']
    """
    for name, part in (("strength", strength), ("residual", residual)):
        if not 0 <= part <= 1:
            raise ValueError(f"compensate: {name} must lie in [0, 1], got {part!r}")
    if damping <= 0:
        raise ValueError(f"compensate: damping must be positive, got {damping!r}; 0.01 is usual")
    needs = {"hessian", "cross"} | ({"residual"} if residual else set())
    return make_transform(_apply_compensate, "compensate", needs, strength=strength, residual=residual, damping=damping)


def _apply_compensate(
    state: WeightState, spec: QuantSpec, *, strength: float, residual: float, damping: float
) -> WeightState:
    hessian, cross = require(state.stats, "hessian"), require(state.stats, "cross")
    owed = strength * jnp.matmul(cross - hessian, state.weight, precision="high")
    if residual:
        owed = owed + residual * require(state.stats, "residual")
    regular, dead = regularize(hessian)
    mean = jnp.sum(jnp.diagonal(hessian)) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    factor, used = factor_upper(regular, damping)
    half = jax.lax.linalg.triangular_solve(factor, owed / jnp.where(mean > 0, mean, 1.0), left_side=True, lower=False)
    moved = jax.lax.linalg.triangular_solve(factor, half, left_side=True, lower=False, transpose_a=True)
    moved = jnp.where(jnp.expand_dims(dead, 1) | ~jnp.isfinite(used), 0.0, moved)
    report = state.report | {"compensation": jnp.linalg.norm(moved) / jnp.linalg.norm(state.weight)}
    return dataclasses.replace(state, weight=state.weight + moved, report=report)
