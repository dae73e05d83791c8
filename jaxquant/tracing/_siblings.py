"""Products of one activation, brought together in a program: q, k and v; gate and up.

Models compute them one after the other, with other equations in between. `in_steps` gives an order of the same
equations in which such siblings follow one another, so that they may run as one launch.
"""

from collections.abc import Iterator, Sequence

from jax.extend import core

PRODUCT = "dot_general"


def in_steps(eqns: Sequence[core.JaxprEqn]) -> Iterator[tuple[core.JaxprEqn, ...]]:
    """Orders the equations of a program in steps of one equation, or of several siblings.

    Siblings are products that share an operand, or a conversion of it, and of which none depends on another. What a
    later one needs is moved before the first; all else stays where it is, and so does the order of effects.

    Args:
        eqns: the equations of a jaxpr.

    Yields:
        Each step; an equation comes after all that it needs.
    """
    needs = _needs(eqns)
    done: set[int] = set()
    for place, family in enumerate(_families(eqns, needs)):
        if place in done:
            continue
        members = [member for member in family if member not in done]
        for needed in _missing(needs, members, done):
            yield (eqns[needed],)
        yield tuple(eqns[member] for member in members)
        done.update(members)


def _needs(eqns: Sequence[core.JaxprEqn]) -> list[list[int]]:
    """For each equation, the places of those it needs: what made its inputs, and the effect before its own."""
    makers: dict[core.Var, int] = {}
    needs, effect = [], None
    for place, eqn in enumerate(eqns):
        needed = [makers[atom] for atom in eqn.invars if isinstance(atom, core.Var) and atom in makers]
        if eqn.effects:
            needed += [] if effect is None else [effect]
            effect = place
        needs.append(needed)
        makers.update((var, place) for var in eqn.outvars)
    return needs


def _families(eqns: Sequence[core.JaxprEqn], needs: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """For each equation, the places of its siblings and its own.

    The depth of an equation is the number of products on the longest way to it: products of equal depth do not depend
    on one another.
    """
    depths: list[int] = []
    origins: dict[core.Var, object] = {}
    found: dict[object, list[int]] = {}
    for place, eqn in enumerate(eqns):
        depths.append(max((depths[i] + (eqns[i].primitive.name == PRODUCT) for i in needs[place]), default=0))
        inputs = [atom for atom in eqn.invars if isinstance(atom, core.Var)]
        if eqn.primitive.name == "convert_element_type" and inputs:
            origins[eqn.outvars[0]] = origins.get(inputs[0], inputs[0]), eqn.params["new_dtype"]
        if eqn.primitive.name == PRODUCT:
            for origin in {origins.get(var, var) for var in inputs}:
                found.setdefault((origin, depths[place]), []).append(place)
    families: list[Sequence[int]] = [(place,) for place in range(len(eqns))]
    for family in sorted(found.values(), key=len):  # of its two operands, the one that more products share
        for place in family:
            families[place] = family
    return families


def _missing(needs: Sequence[Sequence[int]], members: Sequence[int], done: set[int]) -> list[int]:
    """The places of all that some equations need and that is not done yet, in order; counted as done from here on."""
    found: set[int] = set()
    pending = list(members)
    while pending:
        missing = set(needs[pending.pop()]) - found - done
        found |= missing
        pending.extend(missing)
    done |= found
    return sorted(found)
