"""RMSNorms in a program, found from what they give back to what they take.

Models write them in many ways: `x * rsqrt(mean(x**2) + epsilon) * weight` in any order and grouping, with casts in
between. What is common is a product of which one factor is x, one the reciprocal root of its own mean square, and all
others are vectors over the last dimension.
"""

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax.extend import core

from jaxquant.products._rows import Norm
from jaxquant.tracing._control import aval
from jaxquant.tracing._interpreter import Frame

Atom = core.Var | core.Literal


def rms_norm_of(frame: Frame, atom: Atom) -> Norm | None:
    """The RMSNorm that made a variable, or None where none did.

    What the model rounds between its parts is not rounded in the result.

    Args:
        frame: the program.
        atom: a floating variable of it.

    Returns:
        The norm, its arrays values of the frame.
    """
    shape, whole, roots, vectors = aval(atom).shape, [], [], []
    for factor in _factors(frame, atom):
        if _made_by(frame, factor, "rsqrt") is not None:
            roots.append(factor)
        elif aval(factor).shape == shape:
            whole.append(_uncast(frame, factor))
        else:
            vectors.append(factor)
    if len(whole) != 1 or len(roots) != 1 or isinstance(whole[0], core.Literal):
        return None
    epsilon = _epsilon(frame, roots[0], whole[0])
    source, gains = frame.read(whole[0]), [frame.read(vector) for vector in vectors]
    if epsilon is None or not all(hasattr(value, "dtype") for value in (source, *gains)):
        return None
    if any(gain.shape[-1:] != shape[-1:] or gain.size != shape[-1] for gain in gains):
        return None
    flat = [jnp.asarray(gain, jnp.float32).reshape(-1) for gain in gains]
    return Norm(source, functools.reduce(jnp.multiply, flat) if flat else None, epsilon)


def _factors(frame: Frame, atom: Atom) -> Iterator[Atom]:
    """The variables that a variable is the product of, casts and broadcasts left out."""
    maker = frame.maker(atom)
    name = None if maker is None else maker.primitive.name
    if maker is not None and name == "mul":
        for inner in maker.invars:
            yield from _factors(frame, inner)
    elif maker is not None and (name == "broadcast_in_dim" or (name == "convert_element_type" and _is_float(maker))):
        yield from _factors(frame, maker.invars[0])
    else:
        yield atom


def _is_float(cast: core.JaxprEqn) -> bool:
    return jnp.issubdtype(aval(cast.invars[0]).dtype, jnp.floating)


def _made_by(frame: Frame, atom: Atom, *names: str) -> core.JaxprEqn | None:
    """The equation of one of some primitives that made a variable, or None."""
    maker = frame.maker(atom)
    return maker if maker is not None and maker.primitive.name in names else None


def _uncast(frame: Frame, atom: Atom) -> Atom:
    """What a variable was before it was given more bits, or a mean of zero was subtracted as Flax does."""
    difference = _made_by(frame, atom, "sub")
    if difference is not None and _is_zero(frame, difference.invars[1]):
        return _uncast(frame, difference.invars[0])
    cast = _made_by(frame, atom, "convert_element_type")
    if cast is None or not _is_float(cast) or aval(cast.invars[0]).dtype.itemsize > aval(atom).dtype.itemsize:
        return atom
    return _uncast(frame, cast.invars[0])


def _is_zero(frame: Frame, atom: Atom) -> bool:
    laid = _made_by(frame, atom, "broadcast_in_dim")
    return isinstance(atom, core.Literal) and atom.val == 0 if laid is None else _is_zero(frame, laid.invars[0])


def _epsilon(frame: Frame, root: Atom, source: Atom) -> float | None:
    """The constant of `rsqrt(mean(source ** 2) + constant)`, or None where a root is another."""
    made = _made_by(frame, root, "rsqrt")
    added = None if made is None else _made_by(frame, made.invars[0], "add")
    if added is None:
        return None
    mean, constant = sorted(added.invars, key=lambda atom: isinstance(atom, core.Literal))
    if not isinstance(constant, core.Literal):
        return None
    divided = _made_by(frame, _unlaid(frame, mean), "div")
    if divided is None or not isinstance(divided.invars[1], core.Literal):
        return None
    total = _made_by(frame, _unlaid(frame, divided.invars[0]), "reduce_sum")
    last = aval(source).ndim - 1
    size = aval(source).shape[last]
    if total is None or tuple(total.params["axes"]) != (last,) or divided.invars[1].val != size:
        return None
    squared = _made_by(frame, total.invars[0], "square", "integer_pow", "mul")
    if squared is None or squared.params.get("y", 2) != 2:
        return None
    same = all(_uncast(frame, atom) is source for atom in squared.invars)
    return float(constant.val) if same else None


def _unlaid(frame: Frame, atom: Atom) -> Atom:
    """What a variable was before dimensions of size one were added or taken away."""
    laid = _made_by(frame, atom, "broadcast_in_dim", "reshape", "squeeze", "expand_dims")
    if laid is None or math.prod(aval(laid.invars[0]).shape) != math.prod(aval(atom).shape):
        return atom
    return _unlaid(frame, laid.invars[0])
