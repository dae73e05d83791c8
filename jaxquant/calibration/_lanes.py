"""The lazy evaluation of a flat program for all batches side by side, beneath the sequential walk.

Nothing is computed before it is needed: what leads to the variables asked for becomes one jitted *segment*, run for
each batch (*lane*), in which the weights finished so far are quantized. Segments are cached by their printed form, so
that layers alike compile once. A second stream of lanes keeps the float weights where an algorithm compares with them.
Values are dropped once nothing needs them; with `offload` they wait in the host's memory.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.algorithms._statistics import FLOAT_NEEDS
from jaxquant.arrays._outliers import dequantize_weight
from jaxquant.calibration._observe import Watch
from jaxquant.calibration._plan import Meet, Plan, Unit, variables_of
from jaxquant.calibration._segments import Segments, weight_only, with_dtype
from jaxquant.parameters._lazy import load_leaf
from jaxquant.tracing._control import aval
from jaxquant.tracing._interpreter import Frame, Region, bind

COMMON, WEIGHT, LANE = range(3)  # what a variable depends on: parameters only; a unit too; a batch too
QUANTIZED, FLOAT = range(2)  # streams
Lanes = list[list[Any]]  # values by stream (quantized, float) and batch


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a walk starts from.

    Attributes:
        parameters: the leaves that the program's first inputs stand for, by path.
        batches: the other inputs, by batch.
        offload: whether activations wait in the host's memory.
    """

    parameters: Mapping[str, Any]
    batches: Sequence[Sequence[Any]]
    offload: bool = False


class Evaluation:
    """The values of a flat program, by variable, stream and batch."""

    def __init__(self, flat: core.ClosedJaxpr, plan: Plan, watches: Mapping[str, Watch], inputs: Inputs) -> None:
        """Takes the program, where it meets weights, and what it starts from."""
        self.body, self.plan, self.watches, self.inputs = flat.jaxpr, plan, watches, inputs
        self.frame = Frame(self.body, Region(), ())
        self.streams = 2 if any(watch.needs & FLOAT_NEEDS for watch in watches.values()) else 1
        self.makers = {var: number for number, eqn in enumerate(self.body.eqns) for var in eqn.outvars}
        self.common: dict[core.Var, Any] = dict(zip(self.body.constvars, flat.consts, strict=True))
        self.leaves = dict(zip(self.body.invars, inputs.parameters.values(), strict=False))
        self.lanes: dict[core.Var, Lanes] = {}
        for place, var in enumerate(self.body.invars[len(inputs.parameters) :]):
            self.lanes[var] = [[batch[place] for batch in inputs.batches]] * self.streams
        self.kinds = self._classify()
        self.pending = self._count_readers()
        self.floats: dict[Unit, jax.Array] = {}
        self.done: dict[Unit, Any] = {}
        self.segments = Segments()

    def targets(self, meet: Meet) -> list[core.Var]:
        """What a meet reads."""
        stream = [meet.stream] if meet.stream is not None and self.needs(meet, "residual") else []
        beside = [var for var in meet.beside if self.kinds[var] != WEIGHT]
        return [*meet.inputs, *stream, *beside]

    def needs(self, meet: Meet, need: str) -> bool:
        return meet.reading is not None and need in meet.reading.watch.needs

    def ends(self) -> tuple[core.Var, ...]:
        """What the walk evaluates beside what its meets read."""
        return ()

    def _classify(self) -> dict[core.Var, int]:
        """What each variable depends on."""
        kinds = dict.fromkeys([*self.body.constvars, *self.leaves], COMMON) | dict.fromkeys(self.lanes, LANE)
        kinds |= dict.fromkeys(self.plan.born, WEIGHT)
        for eqn in self.body.eqns:
            held = [kinds[atom] for atom in eqn.invars if not isinstance(atom, core.Literal)]
            for var in eqn.outvars:
                kinds[var] = WEIGHT if var in self.plan.born else max(held, default=COMMON)
        return kinds

    def _count_readers(self) -> dict[core.Var, int]:
        """How many equations and meets that matter will still read each variable."""
        targets = [var for meet in self.plan.meets for var in set(self.targets(meet))]
        useful = self.slice_to([*targets, *self.ends()])
        read = [atom for n in useful for atom in set(variables_of(self.body.eqns[n]))]
        return tally([*read, *targets])

    def slice_to(self, targets: Sequence[core.Var]) -> list[int]:
        """Numbers of the equations not yet evaluated that lead to variables, in order."""
        found, pending = set(), list(targets)
        while pending:
            var = pending.pop()
            number = self.makers.get(var)
            if var in self.common or var in self.lanes or var in self.plan.born or number is None or number in found:
                continue
            found.add(number)
            pending += variables_of(self.body.eqns[number])
        return sorted(found)

    def materialize(self, targets: Sequence[core.Var]) -> None:
        """Evaluates what leads to variables: what batches share once, the rest for each batch in one segment."""
        numbers = self.slice_to(targets)
        for number in numbers:
            eqn = self.body.eqns[number]
            if self.kinds[eqn.outvars[0]] == COMMON:
                outs = bind(self.frame, eqn, [self.read_common(atom) for atom in eqn.invars])
                self.common.update(zip(eqn.outvars, outs, strict=True))
                self.release(variables_of(eqn))
        eqns = [self.body.eqns[n] for n in numbers if self.kinds[self.body.eqns[n].outvars[0]] != COMMON]
        if eqns:
            self.run_segment(eqns, targets)

    def run_segment(self, eqns: list[core.JaxprEqn], targets: Sequence[core.Var]) -> None:
        """Runs equations as one program for each stream and batch, and keeps what is needed later."""
        made = {var for eqn in eqns for var in eqn.outvars}
        read = dict.fromkeys(atom for eqn in eqns for atom in variables_of(eqn) if atom not in made)
        evaluated = [eqn for eqn in eqns if self.kinds[eqn.outvars[0]] == LANE]
        inside = tally([atom for eqn in evaluated for atom in set(variables_of(eqn))])
        lane_vars = [var for eqn in evaluated for var in eqn.outvars]
        outs = [var for var in lane_vars if var in targets or self.pending.get(var, 0) > inside.get(var, 0)]
        order = {kind: [var for var in read if self.kinds[var] == kind] for kind in (WEIGHT, COMMON, LANE)}
        segment = self.segments.get(self.body, eqns, list(order.values()), outs)
        for var in outs:
            self.lanes[var] = [[] for _ in range(self.streams)]
        for stream in range(self.streams):
            weights = [self.weight(var, stream) for var in order[WEIGHT]]
            common = [self.read_common(var) for var in order[COMMON]]
            for place in range(len(self.inputs.batches)):
                values = segment(weights, common, [self.lanes[var][stream][place] for var in order[LANE]])
                values = jax.device_get(values) if self.inputs.offload else values
                for var, value in zip(outs, values, strict=True):
                    self.lanes[var][stream].append(value)
        for eqn in evaluated:
            self.release(variables_of(eqn))
        self.floats = {unit: w for unit, w in self.floats.items() if unit not in self.done}

    def read_common(self, atom: core.Var | core.Literal) -> Any:
        """A value that all batches share; a parameter is loaded when it is first read."""
        if isinstance(atom, core.Literal):
            return atom.val
        if atom not in self.common:
            self.common[atom] = jnp.asarray(load_leaf(self.leaves[atom]))
        return self.common[atom]

    def weight(self, var: core.Var, stream: int) -> Any:
        """A unit as a segment's variable holds it: quantized once it is finished, in the first stream.

        Many rows are faster multiplied with the float weight that codes stand for, unless they are rounded themselves.
        """
        born = self.plan.born[var]
        dims = [place for place, own in enumerate(born.dims) if own is None]
        value = self.done.get(born.unit) if stream == QUANTIZED else None
        if value is None:
            value = self.float_unit(born.unit)
        elif weight_only(value):
            value = _dequantize(value)
        value = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, dims), value)
        return with_dtype(value, aval(var).dtype)

    def float_unit(self, unit: Unit) -> jax.Array:
        """The float weight of a unit, loaded when it is first needed."""
        if unit not in self.floats:
            leaf, picked = load_leaf(self.inputs.parameters[unit.path]), dict(unit.index)
            self.floats[unit] = jnp.asarray(leaf[tuple(picked.get(d, slice(None)) for d in range(-leaf.ndim, 0))])
        return self.floats[unit]

    def value(self, var: core.Var, stream: int, place: int) -> Any:
        """What a batch has in a variable."""
        return self.lanes[var][stream][place] if var in self.lanes else self.read_common(var)

    def release(self, read: Sequence[core.Var]) -> None:
        """Drops values that nothing needs any more."""
        for var in set(read):
            self.pending[var] -= 1
            if self.pending[var] <= 0:
                self.lanes.pop(var, None)
                self.common.pop(var, None)


def tally(items: Iterable[Any]) -> dict[Any, int]:
    """How often each item comes."""
    return dict(Counter(items))


_dequantize = jax.jit(dequantize_weight)
