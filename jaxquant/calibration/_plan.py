"""Where a flat program meets its weights: what the walk has to stop at, found before anything is computed."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxquant.calibration._expert_rows import equations_between
from jaxquant.calibration._observe import Reading, Watch, read_convolution, read_product, read_ragged
from jaxquant.tracing._control import aval
from jaxquant.tracing._interpreter import Frame, Value
from jaxquant.tracing._tracking import Meeting, Tracked, Tracker, track

PASSED_ON = ("convert_element_type", "reshape", "copy", "optimization_barrier")


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is quantized at once: a parameter, or one layer of a stack.

    Attributes:
        path: the parameter.
        index: own dimensions, negative and ascending, each with the index picked of it.
    """

    path: str
    index: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        """The path, with the indices of a layer."""
        return self.path + "".join(f"[{index}]" for _, index in self.index)


@dataclasses.dataclass(frozen=True)
class Born:
    """The variable that first holds a unit on its own.

    Attributes:
        unit: which.
        dims: for each dimension of the variable, the own dimension it is, or None for one that was picked of.
    """

    unit: Unit
    dims: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Meet:
    """One product of a unit.

    Attributes:
        number: of its equation.
        units: the unit, or all that a branch uses, in the order of `owners`.
        inputs: the variables whose values are read.
        reading: how they become rows; None for a branch, which is observed as a whole.
        stream: variable that the product's result is added to, or None.
        owners: of a branch: the variables that hold units, and which of the parameter's dimensions they hold.
        again: of a ragged product whose experts are to see all tokens: the equations from group sizes to rows.
        beside: what those read, group sizes and their own results aside.
    """

    number: int
    units: tuple[Unit, ...]
    inputs: tuple[core.Var, ...]
    reading: Reading | None
    stream: core.Var | None = None
    owners: tuple[tuple[core.Var, Tracked], ...] = ()
    again: tuple[core.JaxprEqn, ...] = ()
    beside: tuple[core.Var, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The meets of a program in its order, and the variables in which units begin."""

    meets: tuple[Meet, ...]
    born: Mapping[core.Var, Born]


def plan_walk(flat: core.ClosedJaxpr, paths: Sequence[str | None], watches: Mapping[str, Watch]) -> Plan:
    """Finds the products of a flat program with watched weights.

    Args:
        flat: the program.
        paths: of each of its inputs that is a parameter, None for others.
        watches: what to gather, by path.

    Returns:
        The plan.

    Raises:
        NotImplementedError: a use whose statistics cannot be gathered, named.
    """
    planner = Planner(flat.jaxpr, watches)

    def trace(arrays: list) -> list:
        names = [path if path in watches else None for path in paths]
        values = [track(array, path) for array, path in zip(arrays, names, strict=True)]
        for var, value in zip(flat.jaxpr.invars, values, strict=True):
            planner.note(var, value)
        outs, _ = planner.run(flat, values)
        return [out.array if isinstance(out, Tracked) else out for out in outs]

    jax.eval_shape(trace, [jax.ShapeDtypeStruct(aval(var).shape, aval(var).dtype) for var in flat.jaxpr.invars])
    return Plan(tuple(planner.meets), planner.born)


class Planner(Tracker):
    """Writes down every product with a watched weight."""

    def __init__(self, body: core.Jaxpr, watches: Mapping[str, Watch]) -> None:
        """Takes the flat program and what is watched."""
        self.body, self.watches = body, watches
        self.numbers = {id(eqn): number for number, eqn in enumerate(body.eqns)}
        self.readers: dict[core.Var, list[core.JaxprEqn]] = {}
        for eqn in body.eqns:
            for atom in eqn.invars:
                if not isinstance(atom, core.Literal):
                    self.readers.setdefault(atom, []).append(eqn)
        self.tracked: dict[core.Var, Tracked] = {}
        self.meets: list[Meet] = []
        self.born: dict[core.Var, Born] = {}

    def note(self, var: core.Var, value: Value) -> None:
        """Remembers which parameter a variable holds."""
        if isinstance(value, Tracked):
            self.tracked[var] = value

    def apply(self, frame: Frame, eqn: core.JaxprEqn, values: list[Value]) -> Sequence[Value]:
        """Follows parameters; a branch that uses some is met as a whole."""
        if eqn.primitive.name == "cond" and any(map(self.is_special, values)):
            operands = [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]
            owners = [atom for atom in operands if self.is_special(frame.read(atom))]
            units = tuple(self.unit_of(frame, atom) for atom in owners)
            inputs = tuple(atom for atom in operands if atom not in owners)
            held = tuple((atom, self.tracked[atom]) for atom in owners)
            self.meets.append(Meet(self.numbers[id(eqn)], units, inputs, None, owners=held))
            values = self.lowered(frame, eqn, values, "")
        outs = super().apply(frame, eqn, values)
        for var, out in zip(eqn.outvars, outs, strict=True):
            self.note(var, out)
        return outs

    def product(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, meeting: Meeting) -> None:
        """Writes a product down."""
        if (watch := self.watches.get(value.path)) is not None:
            reading = read_product(value, meeting, watch, x.ndim)
            atoms = [eqn.invars[meeting.place], eqn.invars[1 - meeting.place]]
            plain = meeting.place == 1 and not reading.lead
            self.meet(frame, eqn, atoms, reading, self.stream_of(eqn) if plain else None)

    def ragged(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, sizes: jax.Array) -> None:
        """Writes a product with sorted rows down."""
        if (watch := self.watches.get(value.path)) is None:
            return
        atoms = [eqn.invars[1], eqn.invars[0], eqn.invars[2]]
        self.meet(frame, eqn, atoms, read_ragged(value, watch))
        if watch.expert_tokens == "all":
            self.meets[-1] = self.shown_to_all(self.meets[-1])

    def shown_to_all(self, meet: Meet) -> Meet:
        """A meet whose every expert sees all rows, as it would get them."""
        rows, sizes = meet.inputs
        again = equations_between(self.body.eqns, rows, sizes, self.body.eqns[meet.number])
        made = {sizes, *(var for eqn in again for var in eqn.outvars)}
        beside = dict.fromkeys(atom for eqn in again for atom in variables_of(eqn) if atom not in made)
        return dataclasses.replace(meet, again=tuple(again), beside=tuple(beside))

    def convolution(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array) -> None:
        """Writes a convolution down."""
        if (watch := self.watches.get(value.path)) is not None:
            self.meet(frame, eqn, [eqn.invars[1], eqn.invars[0]], read_convolution(value, eqn.params, watch))

    def meet(
        self, frame: Frame, eqn: core.JaxprEqn, atoms: Sequence, reading: Reading, stream: core.Var | None = None
    ) -> None:
        """Writes down that the unit in the first variable meets the others."""
        inputs = tuple(atom for atom in atoms[1:] if not isinstance(atom, core.Literal))
        unit = self.unit_of(frame, atoms[0])
        self.meets.append(Meet(self.numbers[id(eqn)], (unit,), inputs, reading, stream))

    def unit_of(self, frame: Frame, var: core.Var) -> Unit:
        """The unit in a variable; the first variable that held it is written down."""
        picked = self.tracked[var].picked
        while (maker := frame.maker(var)) is not None:
            before = next(atom for atom in maker.invars if atom in self.tracked)
            if len(self.tracked[before].picked) < len(picked):
                break
            var = before
        value = self.tracked[var]
        known = [int(np.asarray(index)) for index in value.indices if not isinstance(index, Tracer)]
        rest = [own for own in range(-len(self.watches[value.path].shape), 0) if own not in value.picked]
        if len(known) < len(value.indices) or [own for dims in value.dims for own in dims] != rest:
            what = (
                "picks layers by an index that depends on data"
                if len(known) < len(value.indices)
                else "reorders it before slicing"
            )
            raise NotImplementedError(
                f"{value.path}: the model {what}, so it cannot be walked layer by layer; calibrate with"
                f" sequential=False, or leave it with Rule({value.path!r}, None)"
            )
        unit = Unit(value.path, tuple(sorted(zip(value.picked, known, strict=True))))
        self.born[var] = Born(unit, tuple(dims[0] if dims else None for dims in value.dims))
        return unit

    def stream_of(self, eqn: core.JaxprEqn) -> core.Var | None:
        """The variable of the same form that a product's result is added to, perhaps after a bias."""
        (var,) = eqn.outvars
        while len(readers := self.readers.get(var, [])) == 1:
            (reader,) = readers
            if reader.primitive.name == "add":
                other = reader.invars[1] if reader.invars[0] is var else reader.invars[0]
                if not isinstance(other, core.Literal) and self.from_batch(other):
                    return other if aval(other).size == aval(eqn.outvars[0]).size else None
            elif reader.primitive.name not in PASSED_ON:
                return None
            (var,) = reader.outvars
        return None

    def from_batch(self, var: core.Var) -> bool:
        """Whether a variable varies along more than one dimension: a bias, spread over tokens, does not."""
        maker = next((eqn for eqn in self.body.eqns if var in eqn.outvars), None)
        return maker is None or maker.primitive.name != "broadcast_in_dim"


def variables_of(eqn: core.JaxprEqn) -> list[core.Var]:
    """What an equation reads, without literals."""
    return [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]
