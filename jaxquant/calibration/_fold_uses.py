"""How weights with an input scale are used in a flat program: what `fold_pre_scale` starts from."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxquant.tracing._control import aval
from jaxquant.tracing._interpreter import Frame
from jaxquant.tracing._tracking import Meeting, Tracked, Tracker, track

Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """A product of an input with a scaled weight.

    Attributes:
        path: the weight.
        index: own dimensions, negative, of a stack, each with the index picked of it.
        eqn: the product.
        var: its input.
        dims: own dimension of the weight for each dimension of the input that is summed over; None where the weight is
            used in another way.
    """

    path: str
    index: Index
    eqn: core.JaxprEqn | None
    var: core.Var | None
    dims: Mapping[int, int] | None


class Listener(Tracker):
    """Writes down how scaled weights are used."""

    def __init__(self) -> None:
        """Starts with no use."""
        self.uses: list[Use] = []

    def product(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, meeting: Meeting) -> None:
        """A product; of a whole weight, if it can be folded."""
        var = eqn.invars[1 - meeting.place]
        owns = [value.dims[d] for d in meeting.w_contract]
        known = not any(isinstance(index, Tracer) for index in value.indices)
        plain = known and not meeting.w_batch and all(len(own) == 1 for own in owns)
        dims = {x: own[0] for x, own in zip(meeting.x_contract, owns, strict=True)} if plain else None
        index = (
            tuple(sorted((own, int(np.asarray(i))) for own, i in zip(value.picked, value.indices, strict=True)))
            if plain
            else ()
        )
        self.uses.append(Use(value.path, index, eqn, None if isinstance(var, core.Literal) else var, dims))

    def ragged(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, sizes: jax.Array) -> None:
        """Experts keep their scales."""
        self.uses.append(Use(value.path, (), None, None, None))

    def convolution(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array) -> None:
        """So does a kernel."""
        self.uses.append(Use(value.path, (), None, None, None))

    def lower(self, value: Tracked, eqn: core.JaxprEqn, frame: Frame, reason: str) -> jax.Array:
        """A use that is no product, unless it is one's operand."""
        if eqn.primitive.name not in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            self.uses.append(Use(value.path, (), None, None, None))
        return value.array


def find_uses(flat: core.ClosedJaxpr, paths: Sequence[str | None], scaled: set[str]) -> list[Use]:
    """The uses of scaled weights in a flat program.

    Args:
        flat: the program.
        paths: of each of its inputs that is a parameter, None for others.
        scaled: the weights with an input scale.

    Returns:
        The uses in order.
    """
    listener = Listener()

    def trace(arrays: list) -> list:
        names = [path if path in scaled else None for path in paths]
        outs, _ = listener.run(flat, [track(array, path) for array, path in zip(arrays, names, strict=True)])
        return [out.array if isinstance(out, Tracked) else out for out in outs]

    jax.eval_shape(trace, [jax.ShapeDtypeStruct(aval(var).shape, aval(var).dtype) for var in flat.jaxpr.invars])
    return listener.uses
