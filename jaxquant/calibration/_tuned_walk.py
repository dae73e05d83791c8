"""The walk of an algorithm that trains the rounded weights of a block together."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.algorithms._transform import BlockTuning
from jaxquant.arrays._outliers import dequantize_weight
from jaxquant.calibration._blocks import Block, find_blocks
from jaxquant.calibration._lanes import COMMON, FLOAT, LANE, QUANTIZED, WEIGHT
from jaxquant.calibration._plan import Unit
from jaxquant.calibration._segments import print_part
from jaxquant.calibration._walk import Quantizer, Walk
from jaxquant.parameters._tree import is_quantized
from jaxquant.tracing._control import aval


class Trainer(Quantizer, Protocol):
    """What makes quantized weights and trains them."""

    def is_kept(self, name: str) -> bool:
        """Whether an interrupted run finished a weight."""
        ...

    def train(
        self, names: Sequence[str], floats: Sequence[Any], run: Callable, inputs: list, targets: list
    ) -> dict[str, Any]:
        """Trains quantized weights of a block, and finishes all that it holds."""
        ...


@dataclasses.dataclass(frozen=True)
class Program:
    """A block as equations.

    Attributes:
        eqns: from what is made before the block to its outputs.
        read: the variables they read, by kind.
        outs: the outputs.
    """

    eqns: list[core.JaxprEqn]
    read: dict[int, list[core.Var]]
    outs: list[core.Var]


class TunedWalk(Walk):
    """A walk that trains each block's weights once they are rounded, and goes on from what they are then."""

    quantizer: Trainer

    def __init__(self, *args: Any, tuning: BlockTuning) -> None:
        """Takes what a walk takes, and how blocks are trained."""
        self.tuning = tuning
        self.runs: dict[Any, Callable] = {}
        super().__init__(*args)

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The blocks of the program."""
        return find_blocks(self.body, self.plan, lambda var: self.kinds[var] == LANE, self.tuning.cuts)

    def ends(self) -> tuple[core.Var, ...]:
        """The last block's outputs."""
        return self.blocks[-1].outs

    def restore(self) -> dict[Unit, Any]:
        """Finished weights, of blocks that an interrupted run finished as a whole."""
        blocks = [units_of(block) for block in self.blocks]
        kept = [units for units in blocks if all(self.quantizer.is_kept(str(unit)) for unit in units)]
        return {unit: self.quantizer.restore(str(unit)) for units in kept for unit in units}

    def run(self) -> dict[Unit, Any]:
        """Walks to the last product, block after block."""
        groups = self.groups()
        for block in self.blocks:
            program, restored = self.program(block), all(unit in self.known for unit in units_of(block))
            self.hold(program)
            for group in groups:
                if block.start < group[0].number <= block.meets[-1].number:
                    self.reach(group)
            if not restored:
                self.train(block, program)
            self.release([*program.read[COMMON], *program.read[LANE]])
        return self.done

    def program(self, block: Block) -> Program:
        """The equations of a block, back to units, parameters, and what batches have before it."""
        numbers: set[int] = set()
        read: dict[core.Var, None] = {}
        pending = list(block.outs)
        while pending:
            var = pending.pop()
            number = self.makers.get(var)
            before = self.kinds[var] == LANE and (number is None or number <= block.start)
            if before or number is None or var in self.common or var in self.plan.born:
                read[var] = None
            elif number not in numbers:
                numbers.add(number)
                pending += [atom for atom in self.body.eqns[number].invars if not isinstance(atom, core.Literal)]
        kinds = {kind: [var for var in read if self.kinds[var] == kind] for kind in (WEIGHT, COMMON, LANE)}
        return Program([self.body.eqns[n] for n in sorted(numbers)], kinds, list(block.outs))

    def hold(self, program: Program) -> None:
        """Evaluates what a block reads, and keeps it until the block is trained."""
        self.materialize(program.read[LANE])
        for var in [*program.read[COMMON], *program.read[LANE]]:
            self.pending[var] = self.pending.get(var, 0) + 1

    def train(self, block: Block, program: Program) -> None:
        """Trains a block's weights, and takes the walk to its outputs."""
        others = {unit for other in self.blocks if other is not block for unit in units_of(other)}
        units = [unit for unit in units_of(block) if unit in self.done and unit not in others]
        segment = self.segments.get(self.body, program.eqns, list(program.read.values()), program.outs)
        common, places = [self.read_common(var) for var in program.read[COMMON]], range(len(self.inputs.batches))

        def lanes(stream: int, place: int) -> list:
            return [self.lanes[var][stream][place] for var in program.read[LANE]]

        def outputs(weights_of: int, lanes_of: int) -> list[list]:
            weights = [self.weight(var, weights_of) for var in program.read[WEIGHT]]
            values = [segment(weights, common, lanes(lanes_of, place)) for place in places]
            return jax.device_get(values) if self.inputs.offload else values

        exact, near = outputs(FLOAT, FLOAT), outputs(FLOAT, QUANTIZED)
        targets = [_between(*pair, self.tuning.strength) for pair in zip(near, exact, strict=True)]
        fixed = [self.dense(var) for var in program.read[WEIGHT] if self.plan.born[var].unit not in units]
        inputs = [(fixed, common, lanes(QUANTIZED, place)) for place in places]
        floats = [self.float_unit(unit) for unit in units]
        names = [str(unit) for unit in units]
        trained = self.quantizer.train(names, floats, self.runner(program, units), inputs, targets)
        self.done.update({unit: trained[str(unit)] for unit in units})
        unused = [self.body.eqns[n] for n in self.slice_to(program.outs)]
        if block is not self.blocks[-1]:
            after = [outputs(QUANTIZED, QUANTIZED), exact]
            self.lanes |= {var: [[outs[n] for outs in s] for s in after] for n, var in enumerate(program.outs)}
        for eqn in unused:
            if self.kinds[eqn.outvars[0]] != WEIGHT:
                self.release([atom for atom in eqn.invars if not isinstance(atom, core.Literal)])
        self.floats = {unit: w for unit, w in self.floats.items() if unit not in self.done}

    def dense(self, var: core.Var) -> jax.Array:
        """A unit that is not trained, as the float array its codes stand for."""
        weight = self.weight(var, QUANTIZED)
        return dequantize_weight(weight) if is_quantized(weight) else weight

    def runner(self, program: Program, units: Sequence[Unit]) -> Callable[[list, tuple], list]:
        """The block as a differentiable function of `units` and the rest; one object for all blocks alike."""
        key, part = print_part(self.body, program.eqns, list(program.read.values()), program.outs)
        born = [self.plan.born[var] for var in program.read[WEIGHT]]
        places = [units.index(each.unit) if each.unit in units else None for each in born]
        dims = [[d for d, own in enumerate(each.dims) if own is None] for each in born]
        dtypes = [aval(var).dtype for var in program.read[WEIGHT]]
        evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))

        def run(weights: list, rest: tuple) -> list:
            fixed, common, lanes = rest
            left = iter(fixed)
            held = [
                next(left) if at is None else jnp.expand_dims(weights[at], spread).astype(dtype)
                for at, spread, dtype in zip(places, dims, dtypes, strict=True)
            ]
            return evaluate(*held, *common, *lanes)

        return self.runs.setdefault((key, str(places), str(dims)), run)


@jax.jit
def _between(near: list[jax.Array], far: list[jax.Array], part: float) -> list[jax.Array]:
    """Arrays a part of the way from some to others."""
    return [
        (a.astype(jnp.float32) * (1 - part) + b.astype(jnp.float32) * part).astype(a.dtype)
        for a, b in zip(near, far, strict=True)
    ]


def units_of(block: Block) -> list[Unit]:
    """The units that a block multiplies."""
    return list(dict.fromkeys(unit for meet in block.meets for unit in meet.units))
