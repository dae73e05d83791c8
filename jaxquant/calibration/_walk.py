"""The one-pass, true-sequential walk: each weight is quantized when its products are reached.

A flat program is evaluated once, with all calibration batches side by side (`jaxquant/calibration/_lanes.py`). At a
product with a watched weight its inputs are evaluated, by a segment in which the weights met before are quantized
already. They yield the statistics, the weight is quantized, and its product waits for the next segment.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxquant.algorithms._statistics import Statistics
from jaxquant.calibration._expert_rows import alone_in_groups
from jaxquant.calibration._lanes import COMMON, FLOAT, LANE, QUANTIZED, WEIGHT, Evaluation, Inputs, tally
from jaxquant.calibration._observe import Observer, Reading, Watch, add_statistics, empty_statistics, merge_stacks
from jaxquant.calibration._plan import Meet, Plan, Unit, variables_of
from jaxquant.calibration._segments import nested_constants
from jaxquant.tracing._interpreter import bind


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


class Walk(Evaluation):
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
        super().__init__(flat, plan, watches, inputs)
        self.quantizer = quantizer
        self.left = tally(unit for meet in plan.meets for unit in meet.units)
        self.known = self.restore()
        self.statistics: dict[Unit, Statistics] = {}
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
            self.release(self.targets(meet))

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

    def observe(self, group: Sequence[Meet]) -> dict[Unit, Statistics]:
        """The statistics of meets that share their inputs; the next group may share them too."""
        first = group[0]
        if first.reading is None:
            return self.observe_branch(first)
        stream, outputs = first.stream if self.needs(first, "residual") else None, sum(map(self._outputs, group))
        key = (first.reading.key, first.inputs, stream, outputs)
        if self.last is None or self.last[0] != key:
            self.last = key, self.gather(first, first.reading, stream, outputs)
        return dict.fromkeys((unit for meet in group for unit in meet.units), self.last[1])

    def _outputs(self, meet: Meet) -> int:
        """N where the statistics depend on it, else 0."""
        if meet.reading is None or not self.needs(meet, "residual"):
            return 0
        size = math.prod(self.shape(meet.units[0]))
        held = math.prod(meet.reading.watch.shape[own] for own in meet.reading.lead)
        return size // (meet.reading.watch.channels * held)

    def gather(self, meet: Meet, reading: Reading, stream: core.Var | None, outputs: int) -> Statistics:
        """Adds what a product reads, batch by batch.

        The rows of experts lie where the routing put them, and the quantized model may route a token elsewhere: row by
        row there is nothing to compare, so such rows are compared with themselves, and nothing is compensated.
        """
        crossed = self.needs(meet, "cross")
        update = self.updates.setdefault(
            reading.key,
            jax.jit(lambda stats, *inputs: add_statistics(stats, reading, *inputs), donate_argnums=0),
        )
        stats = empty_statistics(reading, outputs)
        for place in range(len(self.inputs.batches)):
            inputs, beside = (self.read(meet, stream, place) for stream in (QUANTIZED, self.streams - 1))
            owed = None
            if stream is not None:
                owed = self.value(stream, FLOAT, place) - self.value(stream, QUANTIZED, place)
                owed = owed.reshape(-1, outputs)
            stats = update(stats, inputs, (inputs if reading.lead else beside) if crossed else None, owed)
        return stats

    def read(self, meet: Meet, stream: int, place: int) -> list[Any]:
        """What a product reads in a batch; rows that all experts are to see, as each would get them."""
        inputs = [self.value(var, stream, place) for var in meet.inputs]
        if not meet.again:
            return inputs
        rows, sizes = meet.inputs
        order = {kind: [var for var in meet.beside if self.kinds[var] == kind] for kind in (WEIGHT, COMMON, LANE)}
        segment = self.segments.get(
            self.body, list(meet.again), [*list(order.values())[:2], [*order[LANE], sizes]], [rows]
        )
        weights, common = (
            [self.weight(var, stream) for var in order[WEIGHT]],
            list(map(self.read_common, order[COMMON])),
        )
        lanes = [self.value(var, stream, place) for var in order[LANE]]
        made = [segment(weights, common, [*lanes, alone])[0] for alone in alone_in_groups(inputs[1])]
        return [jnp.stack(made), inputs[1]]

    def observe_branch(self, meet: Meet) -> dict[Unit, Statistics]:
        """The statistics of all weights that the branches of a `cond` use, gathered as one traced program."""
        eqn = self.body.eqns[meet.number]
        owners = {var: dataclasses.replace(held, path=str(n), picked=(), indices=(), scans=())
                  for n, (var, held) in enumerate(meet.owners)}  # fmt: skip
        watches = {str(n): self.watches[unit.path] for n, unit in enumerate(meet.units)}
        weights = [self.owner(var) for var in owners]
        read = list(dict.fromkeys(variables_of(eqn)))
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
