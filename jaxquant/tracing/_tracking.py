"""Follows parameters through a float program: which of a parameter's own dimensions each dimension of a value is."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.arrays._views import common_factors
from jaxquant.tracing._interpreter import Frame, Interpreter, Value, bind, result_of


@dataclasses.dataclass(frozen=True)
class Tracked:
    """A parameter on its way through a program.

    Attributes:
        array: its value.
        path: where it lies in the tree.
        dims: for each dimension of the value, the parameter's own dimensions it is made of, negative.
        picked: own dimensions of which the program has picked one index each.
        indices: those indices, integers or int32 scalars.
        scans: own dimensions that scans slice, each with the scan's place in the program.
    """

    array: jax.Array
    path: str
    dims: tuple[tuple[int, ...], ...]
    picked: tuple[int, ...] = ()
    indices: tuple[Any, ...] = ()
    scans: tuple[tuple[int, tuple], ...] = ()


jax.tree_util.register_dataclass(
    Tracked, data_fields=["array", "indices"], meta_fields=["path", "dims", "picked", "scans"]
)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """The dimensions over which an input x and a parameter w meet in a product.

    Attributes:
        x_contract: dimensions of x summed over.
        w_contract: those of w, in the same order.
        x_batch: batch dimensions of x.
        w_batch: those of w.
        place: which operand of the product w is, 0 or 1.
    """

    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_batch: tuple[int, ...]
    place: int


def track(array: jax.Array, path: str | None) -> Value:
    """A parameter at the start of its way; an array that is no floating parameter stays as it is."""
    if path is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return Tracked(array, path, tuple((d - array.ndim,) for d in range(array.ndim)))


class Tracker(Interpreter):
    """Evaluates a float program and says where parameters meet what; a subclass listens."""

    def product(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, meeting: Meeting) -> None:
        """A product of an input and a parameter is reached."""

    def ragged(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, sizes: jax.Array) -> None:
        """A product of rows sorted by group and a parameter [groups, K, N] is reached."""

    def convolution(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array) -> None:
        """A convolution with a parameter as its kernel is reached."""

    def lookup(self, value: Tracked, dims: Sequence[int]) -> None:
        """Rows of a parameter are looked up; `dims` are what a row is made of."""

    def is_special(self, value: Value) -> bool:
        """Parameters that are still recognisable."""
        return isinstance(value, Tracked)

    def lower(self, value: Value, eqn: core.JaxprEqn, frame: Frame, reason: str) -> jax.Array:
        """Loses track."""
        return value.array

    def sliceable(self, value: Value) -> Value:
        """The value itself; indices picked before are the same in every step."""
        length = value.array.shape[0]
        return dataclasses.replace(value, indices=tuple(jnp.broadcast_to(i, (length,)) for i in value.indices))

    def sliced(self, value: Value, scan: tuple) -> Value:
        """The value without its leading dimension."""
        sliced = tuple((own, scan) for own in value.dims[0])
        return dataclasses.replace(value, dims=value.dims[1:], scans=(*value.scans, *sliced))

    def stacked(self, value: Value) -> Value:
        """The value with a new leading dimension."""
        return Tracked(value.array, value.path, ((), *value.dims))


def _dot(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    arrays = tracker.lowered(frame, eqn, values, "")
    contract, batch = ([tuple(map(int, dims)) for dims in pair] for pair in eqn.params["dimension_numbers"])
    for place, value in enumerate(values):
        if isinstance(value, Tracked):
            other = 1 - place
            meeting = Meeting(contract[other], contract[place], batch[other], batch[place], place)
            tracker.product(frame, eqn, value, arrays[other], meeting)
    return bind(frame, eqn, arrays)


def _ragged(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    arrays = tracker.lowered(frame, eqn, values, "")
    numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    if isinstance(values[1], Tracked) and tuple(map(tuple, numbers)) == ((1,), (1,)):
        tracker.ragged(frame, eqn, values[1], arrays[0], arrays[2])
    return bind(frame, eqn, arrays)


def _convolve(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    arrays = tracker.lowered(frame, eqn, values, "")
    if isinstance(values[1], Tracked):
        tracker.convolution(frame, eqn, values[1], arrays[0])
    return bind(frame, eqn, arrays)


def _gather(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    value = values[0]
    outs = bind(frame, eqn, tracker.lowered(frame, eqn, values, ""))
    if not isinstance(value, Tracked):
        return outs
    numbers, looked_up = eqn.params["dimension_numbers"], set(eqn.params["dimension_numbers"].start_index_map)
    rest = [d for d in range(value.array.ndim) if d not in looked_up]
    if len(rest) > 1 and tuple(numbers.collapsed_slice_dims) == tuple(sorted(looked_up)):  # matrices, as an expert's
        places = dict(zip(numbers.offset_dims, rest, strict=True))
        dims = tuple(value.dims[places[d]] if d in places else () for d in range(outs[0].ndim))
        return [Tracked(outs[0], value.path, dims, scans=value.scans)]
    tracker.lookup(value, rest)
    return outs


Move = Callable[[Tracked, core.JaxprEqn], Sequence[tuple[int, ...]]]


def _moved(order: Move) -> Callable:
    """A rule from a function that gives the result's dimensions in terms of the parameter's."""

    def rule(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
        value, *rest = values
        if not isinstance(value, Tracked) or any(map(tracker.is_special, rest)):
            return "parameters are mixed"
        dims = tuple(order(value, eqn))
        return [dataclasses.replace(value, array=out, dims=dims) for out in bind(frame, eqn, [value.array, *rest])]

    return rule


def _cut(starts_of: Callable[[core.JaxprEqn, list], Sequence]) -> Callable:
    """A rule for slices, which pick an index of each dimension they leave one element of."""

    def rule(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
        value, *rest = values
        if not isinstance(value, Tracked) or any(map(tracker.is_special, rest)):
            return "parameters are mixed"
        (out,) = bind(frame, eqn, [value.array, *rest])
        dims, picked, indices = list(value.dims), list(value.picked), list(value.indices)
        for d, start in enumerate(starts_of(eqn, rest)):
            if out.shape[d] == 1 < value.array.shape[d] and len(dims[d]) == 1:
                picked.append(dims[d][0])
                indices.append(start)
                dims[d] = ()
        return [dataclasses.replace(value, array=out, dims=tuple(dims), picked=tuple(picked), indices=tuple(indices))]

    return rule


def _elementwise(tracker: Tracker, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    """Arithmetic with anything else leaves the parameter what it is, as far as axes go."""
    value = next(v for v in values if tracker.is_special(v))
    out = bind(frame, eqn, tracker.lowered(frame, eqn, values, ""))[0]
    return [dataclasses.replace(value, array=out) if out.shape == value.array.shape else out]


def _reshaped(value: Tracked, eqn: core.JaxprEqn) -> list[tuple[int, ...]]:
    shape = result_of(eqn).shape
    dims: list[tuple[int, ...]] = [()] * len(shape)
    if math.prod(shape) == 0:
        return dims
    for before, after in common_factors(value.array.shape, shape):
        own = tuple(dict.fromkeys(o for d in before if value.array.shape[d] > 1 for o in value.dims[d]))
        held = [d for d in before if value.array.shape[d] > 1]
        wide = [d for d in after if shape[d] > 1]
        alike = [value.array.shape[d] for d in held] == [shape[d] for d in wide]
        for place, d in enumerate(wide):
            dims[d] = value.dims[held[place]] if alike else own
    return dims


def _broadcast(value: Tracked, eqn: core.JaxprEqn) -> list[tuple[int, ...]]:
    spots = {d: i for i, d in enumerate(eqn.params["broadcast_dimensions"])}
    return [value.dims[spots[d]] if d in spots else () for d in range(len(eqn.params["shape"]))]


_same = _moved(lambda value, _: value.dims)

Tracker.rules = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolve,
    "gather": _gather,
    "transpose": _moved(lambda value, eqn: [value.dims[d] for d in eqn.params["permutation"]]),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _moved(_reshaped)),
    "broadcast_in_dim": _moved(_broadcast),
    "slice": _cut(lambda eqn, _: eqn.params["start_indices"]),
    "dynamic_slice": _cut(lambda _, starts: starts),
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "stop_gradient", "name", "split", "neg", "sharding_constraint",
         "pvary", "reduce_precision"),
        _same,
    ),
    **dict.fromkeys(("mul", "div", "add", "sub", "concatenate"), _elementwise),
}  # fmt: skip
