"""Segments of a walk: equations as one jitted program, some weights of which are quantized, compiled once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxquant.arrays import _views
from jaxquant.arrays._outliers import OutlierArray
from jaxquant.parameters._tree import is_quantized
from jaxquant.tracing._execution import Execution, Weight, dense
from jaxquant.tracing._interpreter import Region


class Segments:
    """Compiled segments by their printed form.

    Attributes:
        compiled: the programs.
    """

    def __init__(self) -> None:
        """Starts with none."""
        self.compiled: dict[str, Callable] = {}

    def get(
        self,
        body: core.Jaxpr,
        eqns: list[core.JaxprEqn],
        order: Sequence[Sequence[core.Var]],
        outs: list[core.Var],
    ) -> Callable[[list, list, list], list]:
        """A function of the values of three lists of variables (units, what batches share, lanes).

        Args:
            body: the program the equations are from.
            eqns: the equations.
            order: the variables they read, in three lists.
            outs: the variables wanted.
        """
        key, part = print_part(body, eqns, order, outs)
        if key not in self.compiled:
            self.compiled[key] = jax.jit(lambda *values: _execute(part, *values))
        return self.compiled[key]


def print_part(
    body: core.Jaxpr, eqns: list[core.JaxprEqn], order: Sequence[Sequence[core.Var]], outs: list[core.Var]
) -> tuple[str, core.Jaxpr]:
    """Equations of a program as a program of their own, and a text that is equal for those that do the same."""
    invars = [var for kind in order for var in kind]
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    part = body.replace(constvars=[], invars=invars, outvars=outs, eqns=eqns, effects=effects)
    return f"{[len(kind) for kind in order]} {part} {nested_constants(eqns)}", part


def _execute(body: core.Jaxpr, weights: list, common: list, lanes: list) -> list:
    """Evaluates a segment in which some weights are quantized."""
    run = Execution()
    values = [Weight(w, "weight") if is_quantized(w) else w for w in weights]
    outs = run.evaluate(core.ClosedJaxpr(body, []), [*values, *common, *lanes], Region())
    return [dense(out) if run.is_special(out) else out for out in outs]


def nested_constants(value: Any) -> list[int]:
    """Identities of the constants inside equations, which their printed form does not show."""
    if isinstance(value, core.ClosedJaxpr):
        return [*map(id, value.consts), *nested_constants(value.jaxpr.eqns)]
    if isinstance(value, core.Jaxpr):
        return nested_constants(value.eqns)
    if isinstance(value, core.JaxprEqn):
        held = [id(atom.val) for atom in value.invars if isinstance(atom, core.Literal) and np.ndim(atom.val)]
        return held + nested_constants(list(value.params.values()))
    return [found for part in value for found in nested_constants(part)] if isinstance(value, list | tuple) else []


def with_dtype(w: Any, dtype: Any) -> Any:
    """A weight, float or quantized, of another dtype."""
    if not is_quantized(w):
        return w.astype(dtype)
    if isinstance(w, OutlierArray):
        return OutlierArray(_views.astype(w.base, dtype), w.rows.astype(dtype), w.index)
    return _views.astype(w, dtype)


def weight_only(w: Any) -> bool:
    """Whether the inputs of a quantized weight stay in float."""
    return (w.base if isinstance(w, OutlierArray) else w).activation is None
