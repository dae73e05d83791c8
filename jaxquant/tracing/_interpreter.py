"""Evaluates a jaxpr in which some variables hold values that are not arrays: quantized weights, watched activations.

An `Interpreter` knows how every control-flow primitive carries such *special values* through; a subclass says what
they are and gives a rule for each primitive that means something to them. Anything else that meets one gets what
`lower` makes of it, an ordinary array. Special values are pytrees, so `scan`, `while`, `cond` and `checkpoint` are
re-issued through their public functions with the interpreter as body. Only `jax.extend.core` is used.

A rule may `emit` arrays under a name (calibration statistics). They are results of the region, a trace of its own, in
which they came up: a scan stacks them and hands them to `pool`, a `cond` fills those of the branches not taken.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.tracing._control import CONTROL

Value = Any  # an array, or a special value


@dataclasses.dataclass
class Region:
    """What one trace shares: quantized activations by what they come from, and emitted arrays by name."""

    shared: dict = dataclasses.field(default_factory=dict)
    emitted: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Frame:
    """The evaluation of one jaxpr: its variables so far, what made them, and the equations that led here."""

    body: core.Jaxpr
    region: Region
    stack: tuple
    values: dict[core.Var, Value] = dataclasses.field(default_factory=dict)
    makers: dict[core.Var, core.JaxprEqn] = dataclasses.field(default_factory=dict)

    def read(self, atom: core.Var | core.Literal) -> Value:
        """The value of a variable or literal."""
        return atom.val if isinstance(atom, core.Literal) else self.values[atom]

    def maker(self, atom: core.Var | core.Literal) -> core.JaxprEqn | None:
        """The equation of this jaxpr that made a variable, or None."""
        return None if isinstance(atom, core.Literal) else self.makers.get(atom)


Rule = Callable[[Any, Frame, core.JaxprEqn, list[Value]], Any]


class Interpreter:
    """Evaluates jaxprs; see the module. Subclasses fill `rules` and the methods that raise here."""

    rules: ClassVar[Mapping[str, Rule]] = {}

    def is_special(self, value: Value) -> bool:
        """Whether a value is one that the rules are about."""
        raise NotImplementedError

    def lower(self, value: Value, eqn: core.JaxprEqn, frame: Frame, reason: str) -> Any:
        """The array that a primitive without a rule gets instead of a special value."""
        raise NotImplementedError

    def sliceable(self, value: Value) -> Value:
        """A special value whose leaves all hold dimension 0, for a scan to slice; None when it has none."""
        raise NotImplementedError

    def sliced(self, value: Value, scan: tuple) -> Value:
        """What `sliceable(value)` is inside the scan at that place, its leaves having lost dimension 0."""
        return value

    def stacked(self, value: Value) -> Value:
        """What a special value made in a scan is outside, its leaves having got dimension 0."""
        return value

    def pool(self, emitted: dict[str, Any], scan: tuple) -> dict[str, Any]:
        """Reduces what the scan at that place emitted, dimension 0 being its steps."""
        return emitted

    def blank(self, emitted: Any) -> Any:
        """What is emitted where a rule did not run, from the abstract form of what it emits."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), emitted)

    def shards(self, value: Value, spec: Any, mesh: Any) -> tuple[Value, Any, Callable[[Value], Value]] | None:
        """(value, tree of specs, what makes the shard of its leaves) for `shard_map`; None when it must be lowered."""
        return None

    def emit(self, frame: Frame, name: str, value: Any) -> None:
        """Adds an array tree to the results of the region, summing what has the same name."""
        held = frame.region.emitted.get(name)
        frame.region.emitted[name] = value if held is None else self.join(held, value)

    def join(self, held: Any, new: Any) -> Any:
        """Joins two emissions of one name."""
        return jax.tree.map(jnp.add, held, new)

    def run(self, jaxpr: core.ClosedJaxpr, values: Sequence[Value], stack: tuple = ()) -> tuple[list[Value], dict]:
        """Evaluates a jaxpr as a region of its own: its results, and what it emitted."""
        region = Region()
        return self.evaluate(jaxpr, values, region, stack), region.emitted

    def evaluate(
        self, jaxpr: core.ClosedJaxpr, values: Sequence[Value], region: Region, stack: tuple = ()
    ) -> list[Value]:
        """Evaluates a jaxpr inside a region."""
        body = jaxpr.jaxpr
        frame = Frame(body, region, stack)
        frame.values.update(zip(body.constvars, jaxpr.consts, strict=True))
        frame.values.update(zip(body.invars, values, strict=True))
        for step in self.steps(body.eqns):
            for eqn, outs in zip(step, self.apply_step(frame, step), strict=True):
                frame.values.update(zip(eqn.outvars, outs, strict=True))
                frame.makers.update((var, eqn) for var in eqn.outvars)
        return [frame.read(atom) for atom in body.outvars]

    def steps(self, eqns: Sequence[core.JaxprEqn]) -> Iterable[Sequence[core.JaxprEqn]]:
        """The equations of a jaxpr in the order, and in the groups, in which they are evaluated."""
        return ((eqn,) for eqn in eqns)

    def apply_step(self, frame: Frame, eqns: Sequence[core.JaxprEqn]) -> list[Sequence[Value]]:
        """Evaluates the equations of a step, of which none needs another."""
        return [self.apply(frame, eqn, [frame.read(atom) for atom in eqn.invars]) for eqn in eqns]

    def apply(self, frame: Frame, eqn: core.JaxprEqn, values: list[Value]) -> Sequence[Value]:
        """Evaluates one equation; a rule that returns NotImplemented, or a reason, declines it."""
        if not any(map(self.is_special, values)):
            return bind(frame, eqn, values)
        name, reason = eqn.primitive.name, "no rule for this primitive"
        for rule in (self.rules.get(name), CONTROL.get(name)):
            if rule is not None:
                outs = rule(self, frame, eqn, values)
                if not isinstance(outs, str):
                    return outs
                reason = outs
        return bind(frame, eqn, self.lowered(frame, eqn, values, reason))

    def lowered(self, frame: Frame, eqn: core.JaxprEqn, values: Sequence[Value], reason: str) -> list[Value]:
        """The values with every special one lowered."""
        return [self.lower(value, eqn, frame, reason) if self.is_special(value) else value for value in values]


def result_of(eqn: core.JaxprEqn) -> Any:
    """The abstract value, with shape and dtype, of an equation's first result."""
    return eqn.outvars[0].aval


def bind(frame: Frame, eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on arrays, as a jaxpr of that equation alone."""
    pairs = zip(eqn.invars, values, strict=True)
    given = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    single = frame.body.replace(
        constvars=[], invars=list(given), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(single, []))(*given.values())
