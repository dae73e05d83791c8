"""A model's program as one flat list of equations: calls inlined, and scans that slice watched weights unrolled."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxquant.tracing._arguments import Form
from jaxquant.tracing._control import CALLS, aval, close, inline, split_scan
from jaxquant.tracing._interpreter import Frame, Value, bind
from jaxquant.tracing._tracking import Tracked, Tracker, track

MAX_COUNTS = 4096  # elements of an array of integers that is computed while flattening


def flatten_program(
    fn: Callable[..., Any], form: Form, arrays: Sequence[Any], watched: Collection[str]
) -> core.ClosedJaxpr:
    """Traces a model into a program in which every product with a watched weight is an equation of its own.

    Args:
        fn: the float model.
        form: the static part of its arguments.
        arrays: the rest, arrays or `jax.ShapeDtypeStruct`.
        watched: paths of the weights that matter.

    Returns:
        The program; its inputs are `arrays`. Branches stay what they are.

    Raises:
        NotImplementedError: a watched weight enters a while loop or a `shard_map`.
    """
    jaxpr = jax.make_jaxpr(lambda *arrays: form.call(fn, arrays))(*arrays)

    def flat(*arrays: jax.Array) -> list:
        paths = [path if path in watched else None for path in form.parameters]
        values = [track(array, path) for array, path in zip(arrays, paths, strict=True)]
        unroller = Unroller()
        outs, _ = unroller.run(jaxpr, values)
        return [out.array if isinstance(out, Tracked) else out for out in outs]

    return jax.make_jaxpr(flat)(*arrays)


class Unroller(Tracker):
    """Re-issues a program equation by equation, without calls and without scans over weights."""

    def apply(self, frame: Frame, eqn: core.JaxprEqn, values: list[Value]) -> Sequence[Value]:
        """Inlines calls whether or not they carry a weight; what else carries one is unrolled, kept or refused."""
        name, special = eqn.primitive.name, [value for value in values if self.is_special(value)]
        if name in CALLS:
            return inline(self, frame, eqn, values)
        if _counts(eqn, values):
            with jax.ensure_compile_time_eval():
                return bind(frame, eqn, values)
        if name == "scan" and special:
            return self.unroll(frame, eqn, values)
        if name in ("while", "shard_map") and special:
            raise NotImplementedError(
                f"{special[0].path}: a {name} uses this weight, which cannot be walked layer by layer; calibrate with"
                f" sequential=False, or leave it with Rule({special[0].path!r}, None)"
            )
        if name == "cond":
            return bind(frame, eqn, self.lowered(frame, eqn, values, ""))
        return super().apply(frame, eqn, values)

    def unroll(self, frame: Frame, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """The steps of a scan, one after the other."""
        body, length = close(eqn.params["jaxpr"]), eqn.params["length"]
        consts, carry, xs = split_scan(eqn, values)
        steps, ys = range(length), []
        for step in reversed(steps) if eqn.params["reverse"] else steps:
            slices = [_step_of(x, step) for x in xs]
            outs = self.evaluate(body, [*consts, *carry, *slices], frame.region, (*frame.stack, id(eqn), step))
            carry = outs[: len(carry)]
            ys.append(self.lowered(frame, eqn, outs[len(carry) :], ""))
        if eqn.params["reverse"]:
            ys.reverse()
        return [*carry, *(jnp.stack(column) for column in zip(*ys, strict=True))]


def _counts(eqn: core.JaxprEqn, values: Sequence[Value]) -> bool:
    """Whether an equation computes small known integers, as loop counters are, by which layers are then picked."""
    known = not any(isinstance(value, Tracer | Tracked) for value in values)
    return known and all(aval(var).dtype.kind in "iub" and aval(var).size <= MAX_COUNTS for var in eqn.outvars)


def _step_of(x: Value, step: int) -> Value:
    """One slice of what a scan goes over; of a weight, as the program itself would have picked it."""
    if not isinstance(x, Tracer | Tracked):
        return np.asarray(x)[step]
    if not isinstance(x, Tracked):
        return jax.lax.index_in_dim(x, step, keepdims=False)
    array = jax.lax.index_in_dim(x.array, step, keepdims=False)
    return Tracked(array, x.path, x.dims[1:])
