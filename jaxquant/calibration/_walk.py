"""The one-pass, true-sequential walk: each weight is quantized when its products are reached.

A flat program is evaluated once, with all calibration batches side by side (*lanes*). Nothing is computed before it is
needed: at a product with a watched weight, the equations its input depends on become one jitted *segment*, run for each
batch, in which the weights met before are quantized already. The inputs yield the statistics, the weight is quantized,
and its product waits for the next segment. Segments are cached by their printed form, so that layers alike compile
once. Where an algorithm compares with the float model, a second stream of lanes keeps the float weights.

Values are dropped once nothing needs them; with `offload` they wait in the host's memory.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxquant.algorithms._statistics import FLOAT_NEEDS, Statistics
from jaxquant.arrays._outliers import dequantize_weight
from jaxquant.calibration._observe import Observer, Reading, Watch, add_statistics, empty_statistics, merge_stacks
from jaxquant.calibration._plan import Meet, Plan, Unit
from jaxquant.calibration._segments import Segments, nested_constants, weight_only, with_dtype
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


class Quantizer(Protocol):
    """What makes quantized weights."""

    def restore(self, name: str) -> Any | None:
        """A weight that an interrupted run finished, or None."""

    def joins(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether weights that meet the same inputs may be quantized side by side."""
        ...

    def quantize(
        self, paths: Sequence[str], names: Sequence[str], leaves: Sequence[Any], stats: Statistics | None
    ) -> list[Any]:
        """Quantizes units of the parameters at `paths`."""
        ...


class Walk:
    """One evaluation of a flat program; `run` gives the quantized units."""

    def __init__(
        self,
        flat: core.ClosedJaxpr,
        plan: Plan,
        watches: Mapping[str, Watch],
        inputs: Inputs,
        quantizer: Quantizer,
    ) -> None:
        """Takes the program, where it meets weights, what it starts from, and what quantizes."""
        self.body, self.plan, self.watches, self.inputs = flat.jaxpr, plan, watches, inputs
        self.quantizer = quantizer
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
        self.left = _count([unit for meet in plan.meets for unit in meet.units])
        self.known = self.restore()
        self.floats: dict[Unit, jax.Array] = {}
        self.statistics: dict[Unit, Statistics] = {}
        self.done: dict[Unit, Any] = {}
        self.segments = Segments()
        self.updates: dict[Any, Callable] = {}
        self.last: tuple[Any, Statistics] | None = None

    def run(self) -> dict[Unit, Any]:
        """Walks to the last product."""
        for group in self.groups():
            self.reach(group)
        return self.done

    def restore(self) -> dict[Unit, Any]:
        """The weights that an interrupted run finished."""
        return {unit: weight for unit in self.left if (weight := self.quantizer.restore(str(unit))) is not None}

    def reach(self, group: Sequence[Meet]) -> None:
        """Gathers what meets read, and quantizes their units once all products of them were met."""
        for meet in group:
            self.materialize(self.targets(meet))
        units = [unit for meet in group for unit in meet.units]
        if not all(unit in self.known for unit in units):
            for unit, seen in self.observe(group).items():
                held = self.statistics.get(unit)
                self.statistics[unit] = seen if held is None else merge_stacks(held, seen)
        for unit in units:
            self.left[unit] -= 1
        self.finish([unit for unit in dict.fromkeys(units) if not self.left[unit]], len(group) > 1)
        for meet in group:
            self._release(self.targets(meet))

    def groups(self) -> list[list[Meet]]:
        """The meets in order, those together whose units are quantized side by side."""
        groups: list[list[Meet]] = []
        for meet in self.plan.meets:
            if groups and self._joins(groups[-1], meet):
                groups[-1].append(meet)
            else:
                groups.append([meet])
        return groups

    def _joins(self, group: list[Meet], meet: Meet) -> bool:
        """Whether a meet has the inputs of those before it, and all of them units met nowhere else."""
        first, both = group[0], [*group, meet]
        if meet.reading is None or first.reading is None or len(self.targets(first)) > len(first.inputs):
            return False
        units = [unit for each in both for unit in each.units]
        single = len(set(units)) == len(units) and all(
            self.left[unit] == 1 and unit not in self.known for unit in units
        )
        alike = (first.reading.key, first.inputs) == (meet.reading.key, tuple(self.targets(meet)))
        return single and alike and self.quantizer.joins([u.path for u in units], [self.shape(u) for u in units])

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """The shape of a unit."""
        full, picked = self.watches[unit.path].shape, dict(unit.index)
        return tuple(size for own, size in zip(range(-len(full), 0), full, strict=True) if own not in picked)

    def finish(self, units: list[Unit], together: bool) -> None:
        """Quantizes units whose products have all been met; a branch may hold one that it never multiplies."""
        ready = [unit for unit in units if unit in self.statistics]
        for some in [ready] if together else [[unit] for unit in ready]:
            weights, stats = [self.float_unit(unit) for unit in some], self.statistics[some[0]]
            made = self.quantizer.quantize([unit.path for unit in some], [str(unit) for unit in some], weights, stats)
            self.done.update(zip(some, made, strict=True))
        for unit in units:
            self.statistics.pop(unit, None)
            if unit in self.known:
                self.done[unit] = self.known.pop(unit)

    def targets(self, meet: Meet) -> list[core.Var]:
        """What a meet reads."""
        stream = [meet.stream] if meet.stream is not None and self._needs(meet, "residual") else []
        return [*meet.inputs, *stream]

    def _needs(self, meet: Meet, need: str) -> bool:
        return meet.reading is not None and need in meet.reading.watch.needs

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
        read = [atom for n in useful for atom in set(_variables(self.body.eqns[n]))]
        return _count([*read, *targets])

    def ends(self) -> tuple[core.Var, ...]:
        """What the walk evaluates beside what its meets read."""
        return ()

    def slice_to(self, targets: Sequence[core.Var]) -> list[int]:
        """Numbers of the equations not yet evaluated that lead to variables, in order."""
        found, pending = set(), list(targets)
        while pending:
            var = pending.pop()
            number = self.makers.get(var)
            if var in self.common or var in self.lanes or var in self.plan.born or number is None or number in found:
                continue
            found.add(number)
            pending += _variables(self.body.eqns[number])
        return sorted(found)

    def materialize(self, targets: Sequence[core.Var]) -> None:
        """Evaluates what leads to variables: what batches share once, the rest for each batch in one segment."""
        numbers = self.slice_to(targets)
        for number in numbers:
            eqn = self.body.eqns[number]
            if self.kinds[eqn.outvars[0]] == COMMON:
                outs = bind(self.frame, eqn, [self.read_common(atom) for atom in eqn.invars])
                self.common.update(zip(eqn.outvars, outs, strict=True))
                self._release(_variables(eqn))
        eqns = [self.body.eqns[n] for n in numbers if self.kinds[self.body.eqns[n].outvars[0]] != COMMON]
        if eqns:
            self.run_segment(eqns, targets)

    def read_common(self, atom: core.Var | core.Literal) -> Any:
        """A value that all batches share; a parameter is loaded when it is first read."""
        if isinstance(atom, core.Literal):
            return atom.val
        if atom not in self.common:
            self.common[atom] = jnp.asarray(load_leaf(self.leaves[atom]))
        return self.common[atom]

    def run_segment(self, eqns: list[core.JaxprEqn], targets: Sequence[core.Var]) -> None:
        """Runs equations as one program for each stream and batch, and keeps what is needed later."""
        made = {var for eqn in eqns for var in eqn.outvars}
        read = dict.fromkeys(atom for eqn in eqns for atom in _variables(eqn) if atom not in made)
        evaluated = [eqn for eqn in eqns if self.kinds[eqn.outvars[0]] == LANE]
        inside = _count([atom for eqn in evaluated for atom in set(_variables(eqn))])
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
            self._release(_variables(eqn))
        self.floats = {unit: w for unit, w in self.floats.items() if unit not in self.done}

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

    def observe(self, group: Sequence[Meet]) -> dict[Unit, Statistics]:
        """The statistics of meets that share their inputs; the next group may share them too."""
        first = group[0]
        if first.reading is None:
            return self.observe_branch(first)
        stream, outputs = first.stream if self._needs(first, "residual") else None, sum(map(self._outputs, group))
        key = (first.reading.key, first.inputs, stream, outputs)
        if self.last is None or self.last[0] != key:
            self.last = key, self.gather(first, first.reading, stream, outputs)
        return dict.fromkeys((unit for meet in group for unit in meet.units), self.last[1])

    def _outputs(self, meet: Meet) -> int:
        """N where the statistics depend on it, else 0."""
        if meet.reading is None or not self._needs(meet, "residual"):
            return 0
        size = math.prod(self.shape(meet.units[0]))
        held = math.prod(meet.reading.watch.shape[own] for own in meet.reading.lead)
        return size // (meet.reading.watch.channels * held)

    def gather(self, meet: Meet, reading: Reading, stream: core.Var | None, outputs: int) -> Statistics:
        """Adds what a product reads, batch by batch.

        The rows of experts lie where the routing put them, and the quantized model may route a token elsewhere: row by
        row there is nothing to compare, so such rows are compared with themselves, and nothing is compensated.
        """
        crossed = self._needs(meet, "cross")
        update = self.updates.setdefault(
            reading.key,
            jax.jit(lambda stats, *inputs: add_statistics(stats, reading, *inputs), donate_argnums=0),
        )
        stats = empty_statistics(reading, outputs)
        for place in range(len(self.inputs.batches)):
            inputs, beside = ([self.value(var, s, place) for var in meet.inputs] for s in (0, self.streams - 1))
            owed = None
            if stream is not None:
                owed = self.value(stream, FLOAT, place) - self.value(stream, QUANTIZED, place)
                owed = owed.reshape(-1, outputs)
            stats = update(stats, inputs, (inputs if reading.lead else beside) if crossed else None, owed)
        return stats

    def observe_branch(self, meet: Meet) -> dict[Unit, Statistics]:
        """The statistics of all weights that the branches of a `cond` use, gathered as one traced program."""
        eqn = self.body.eqns[meet.number]
        owners = {var: dataclasses.replace(held, path=str(n), picked=(), indices=(), scans=())
                  for n, (var, held) in enumerate(meet.owners)}  # fmt: skip
        watches = {str(n): self.watches[unit.path] for n, unit in enumerate(meet.units)}
        weights = [self.owner(var) for var in owners]
        read = list(dict.fromkeys(_variables(eqn)))
        body = self.body.replace(constvars=[], invars=read, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)

        def observe(weights: list, others: list) -> dict:
            held, rest = dict(zip(owners, weights, strict=True)), iter(others)
            values = [
                dataclasses.replace(owners[var], array=held[var]) if var in owners else next(rest) for var in read
            ]
            return Observer(watches).run(core.ClosedJaxpr(body, []), values)[1]

        shapes = [(held.dims, watch) for held, watch in zip(owners.values(), watches.values(), strict=True)]
        key = ("branch", str(body), str(nested_constants([eqn])), str(shapes))
        update = self.updates.setdefault(key, jax.jit(observe))
        total: dict[Unit, Statistics] = {}
        for place in range(len(self.inputs.batches)):
            seen = update(weights, [self.value(var, 0, place) for var in read if var not in owners])
            for name, observation in seen.items():
                unit = meet.units[int(name)]
                total[unit] = merge_stacks(total[unit], observation.stats) if unit in total else observation.stats
        return total

    def owner(self, var: core.Var) -> jax.Array:
        """The float value of a variable that depends on a unit only."""
        if var in self.plan.born:
            return self.weight(var, FLOAT)
        eqn = self.body.eqns[self.makers[var]]
        values = [
            self.owner(atom)
            if not isinstance(atom, core.Literal) and self.kinds[atom] == WEIGHT
            else self.read_common(atom)
            for atom in eqn.invars
        ]
        return bind(self.frame, eqn, values)[eqn.outvars.index(var)]

    def _release(self, read: Sequence[core.Var]) -> None:
        """Drops values that nothing needs any more."""
        for var in set(read):
            self.pending[var] -= 1
            if self.pending[var] <= 0:
                self.lanes.pop(var, None)
                self.common.pop(var, None)


def _variables(eqn: core.JaxprEqn) -> list[core.Var]:
    """What an equation reads, without literals."""
    return [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]


def _count(items: Iterable[Any]) -> dict[Any, int]:
    return dict(Counter(items))


def stack_units(done: Mapping[Unit, Any], path: str, shape: tuple[int, ...]) -> Any:
    """Puts the quantized layers of a parameter back together.

    Args:
        done: quantized units.
        path: the parameter.
        shape: its shape.

    Returns:
        The quantized parameter.

    Raises:
        ValueError: no product reached some of its layers.
    """
    parts = {unit.index: value for unit, value in done.items() if unit.path == path}
    if () in parts:
        return parts[()]
    owns = [own for own, _ in next(iter(parts))]
    sizes = [shape[own] for own in owns]
    order = [tuple(zip(owns, index, strict=True)) for index in np.ndindex(*sizes)]
    missing = [index for index in order if index not in parts]
    if missing or owns != list(range(-len(shape), len(owns) - len(shape))):
        places = ", ".join(str([i for _, i in index]) for index in missing[:5]) or f"along axes {owns}"
        raise ValueError(
            f"{path}: the model's products use only some of its layers ({places} are missing); leave it with"
            f" Rule({path!r}, None), or calibrate with sequential=False"
        )
    if len({jax.tree.structure(part) for part in parts.values()}) > 1:
        raise ValueError(
            f"{path}: its layers differ in form (the inputs of some stay in float, as their outliers exceed"
            " llm_int8's capacity), and a stack has one: raise the capacity, or calibrate with sequential=False"
        )
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves).reshape(*sizes, *leaves[0].shape), *(parts[index] for index in order)
    )


_dequantize = jax.jit(dequantize_weight)
