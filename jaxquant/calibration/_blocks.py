"""Blocks of a flat program: what lies between two cuts, places through which one array carries all that follows.

Nothing about a model's structure is written down for it. *Carried* values are the floating ones that the first
product's inputs are made of, and whatever depends on those or on a weight: the activations, but not a mask or a table
of angles. A *cut* is an equation behind which a single carried value is still to be read, those aside that were made
before the block (a skip connection over it). A residual stream has one behind each addition to it, a plain chain of
layers one behind each product; a model whose every layer reads the first one's result has none, and is one block.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.extend import core

from jaxquant.calibration._plan import Meet, Plan, variables_of
from jaxquant.tracing._control import aval


@dataclasses.dataclass(frozen=True)
class Block:
    """Meets whose weights are trained together.

    Attributes:
        meets: in the program's order.
        start: number of the last equation before it.
        outs: what it is trained on.
    """

    meets: tuple[Meet, ...]
    start: int
    outs: tuple[core.Var, ...]


def find_blocks(body: core.Jaxpr, plan: Plan, depends: Callable[[core.Var], bool], cuts: int) -> list[Block]:
    """Splits the meets of a program into blocks.

    Args:
        body: the flat program.
        plan: where it meets weights.
        depends: whether a variable depends on a batch.
        cuts: how many a block reaches over.

    Returns:
        The blocks; what follows the last cut is a block of its own, trained on the program's outputs.
    """
    carried = _carried(body, plan, depends)
    last = {var: number for number, eqn in enumerate(body.eqns) for var in variables_of(eqn)}
    made = {var: number for number, eqn in enumerate(body.eqns) for var in eqn.outvars}
    live = {var for var in carried if var not in made}
    meets, pieces, start, before = list(plan.meets), [], -1, -1
    for number, eqn in enumerate(body.eqns):
        live = {var for var in [*live, *eqn.outvars] if var in carried and last.get(var, -1) > number}
        through = [var for var in live if made.get(var, -1) >= before]
        if len(through) == 1 and meets:
            inside = tuple(itertools.takewhile(lambda meet, end=number: meet.number <= end, meets))
            pieces += [Block(inside, start, tuple(through))] if inside else []
            meets, start, before = meets[len(inside) :], number, made.get(through[0], -1)
    blocks = [_join(some) for some in itertools.batched(pieces, cuts)]
    if meets:
        ends = [var for var in body.outvars if isinstance(var, core.Var) and var in carried and made[var] > start]
        blocks.append(
            Block(tuple(meets), start, tuple(dict.fromkeys(ends)) or tuple(body.eqns[meets[-1].number].outvars))
        )
    return blocks


def _join(pieces: Sequence[Block]) -> Block:
    return Block(tuple(meet for piece in pieces for meet in piece.meets), pieces[0].start, pieces[-1].outs)


def _carried(body: core.Jaxpr, plan: Plan, depends: Callable[[core.Var], bool]) -> set[core.Var]:
    """The activations: what the first product reads, what that is made of, and all that follows from it."""
    makers = {var: eqn for eqn in body.eqns for var in eqn.outvars}
    found: set[core.Var] = set()
    pending = list(plan.meets[0].inputs)
    while pending:
        var = pending.pop()
        if var not in found and depends(var) and jnp.issubdtype(aval(var).dtype, jnp.floating):
            found.add(var)
            pending += variables_of(makers[var]) if var in makers else []
    weights = set(plan.born)
    for eqn in body.eqns:
        if any(var in found or var in weights for var in variables_of(eqn)):
            found |= {var for var in eqn.outvars if depends(var)}
            weights |= {var for var in eqn.outvars if not depends(var)}
    return found
