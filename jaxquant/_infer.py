"""Finds each parameter's contracting axes by following it through the float model's program."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant._arguments import split_arguments
from jaxquant._interpreter import Frame, Interpreter, Value, bind
from jaxquant._tree import named_leaves
from jaxquant._views import common_factors


@dataclasses.dataclass(frozen=True)
class Tracked:
    """A parameter on its way through a program.

    Attributes:
        array: its value.
        path: where it lies in the tree.
        dims: for each dimension of the value, the parameter's own dimensions it is made of, negative.
    """

    array: jax.Array
    path: str
    dims: tuple[tuple[int, ...], ...]


jax.tree_util.register_dataclass(Tracked, data_fields=["array"], meta_fields=["path", "dims"])


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Finds which axes of each parameter the model's products sum over, without computing anything.

    Args:
        fn: the float model, called as `fn(params, *args, **kwargs)`.
        params: its parameters; arrays or `jax.ShapeDtypeStruct`.
        *args: the other arguments, likewise.
        **kwargs: keyword arguments.

    Returns:
        For each path of a parameter that meets a product, a convolution or a lookup: its contracting axes, negative and
        ascending, in its own dimensions whatever transposes, reshapes and slices lie between. A table that is only looked
        up contracts the dimensions of its rows. Where uses disagree the first product decides.

    >>> infer_axes(lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["out"]), {"out": jnp.ones((4, 8, 32))}, jnp.ones((1, 3, 4, 8)))
    {'out': (-3, -2)}
    """
    form, arrays = split_arguments((params, *args), kwargs)
    names = [path for path, leaf in named_leaves(params) if hasattr(leaf, "shape")]
    finder = AxisFinder()

    def trace(arrays: list) -> list:
        jaxpr = jax.make_jaxpr(lambda *arrays: form.call(fn, arrays))(*arrays)
        paths = [*names, *([None] * (len(arrays) - len(names)))]
        values = [_track(array, path) for array, path in zip(arrays, paths, strict=True)]
        outs, _ = finder.run(jaxpr, values)
        return [out.array if isinstance(out, Tracked) else out for out in outs]

    jax.eval_shape(trace, arrays)
    return {path: axes for path, axes in (finder.lookups | finder.products).items() if axes}


def _track(array: jax.Array, path: str | None) -> Value:
    if path is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return Tracked(array, path, tuple((d - array.ndim,) for d in range(array.ndim)))


class AxisFinder(Interpreter):
    """Writes down the contracting axes of each parameter at its first product, and at its first lookup."""

    def __init__(self) -> None:
        """Starts with nothing found."""
        self.products: dict[str, tuple[int, ...]] = {}
        self.lookups: dict[str, tuple[int, ...]] = {}

    def is_special(self, value: Value) -> bool:
        """Parameters that are still recognisable."""
        return isinstance(value, Tracked)

    def lower(self, value: Value, eqn: core.JaxprEqn, frame: Frame, reason: str) -> jax.Array:
        """Loses track."""
        return value.array

    def sliceable(self, value: Value) -> Value:
        """The value itself."""
        return value

    def sliced(self, value: Value) -> Value:
        """The value without its leading dimension."""
        return dataclasses.replace(value, dims=value.dims[1:])

    def stacked(self, value: Value) -> Value:
        """The value with a new leading dimension."""
        return dataclasses.replace(value, dims=((), *value.dims))

    def found(self, table: dict, value: Tracked, dims: Sequence[int]) -> None:
        """Writes down what the first use says."""
        axes = tuple(sorted({own for d in dims for own in value.dims[d]}))
        table.setdefault(value.path, axes)


def _dot(finder: AxisFinder, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    for value, dims in zip(values, eqn.params["dimension_numbers"][0], strict=True):
        if isinstance(value, Tracked):
            finder.found(finder.products, value, dims)
    return bind(frame, eqn, finder.lowered(frame, eqn, values, ""))


def _ragged(finder: AxisFinder, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    dims = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0]
    for value, contracted in zip(values[:2], dims, strict=True):
        if isinstance(value, Tracked):
            finder.found(finder.products, value, contracted)
    return bind(frame, eqn, finder.lowered(frame, eqn, values, ""))


def _convolve(finder: AxisFinder, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    if isinstance(values[1], Tracked):
        finder.found(finder.products, values[1], eqn.params["dimension_numbers"].rhs_spec[1:])
    return bind(frame, eqn, finder.lowered(frame, eqn, values, ""))


def _gather(finder: AxisFinder, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    value, indices = values
    outs = bind(frame, eqn, finder.lowered(frame, eqn, values, ""))
    if not isinstance(value, Tracked):
        return outs
    numbers, looked_up = eqn.params["dimension_numbers"], set(eqn.params["dimension_numbers"].start_index_map)
    rest = [d for d in range(value.array.ndim) if d not in looked_up]
    if len(rest) > 1 and tuple(numbers.collapsed_slice_dims) == tuple(sorted(looked_up)):  # matrices, as an expert's
        places = dict(zip(numbers.offset_dims, rest, strict=True))
        return [
            Tracked(
                outs[0], value.path, tuple(value.dims[places[d]] if d in places else () for d in range(outs[0].ndim))
            )
        ]
    finder.found(finder.lookups, value, rest)
    return outs


def _moved(order: Callable[[Tracked, core.JaxprEqn], Sequence[tuple[int, ...]]]) -> Callable:
    """A rule from a function that gives the result's dimensions in terms of the parameter's."""

    def rule(finder: AxisFinder, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
        value, *rest = values
        if not isinstance(value, Tracked) or any(map(finder.is_special, rest)):
            return "parameters are mixed"
        dims = tuple(order(value, eqn))
        return [Tracked(out, value.path, dims) for out in bind(frame, eqn, [value.array, *rest])]

    return rule


def _elementwise(finder: AxisFinder, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    """Arithmetic with anything else leaves the parameter what it is, as far as axes go."""
    value = next(v for v in values if finder.is_special(v))
    arrays = [v.array if finder.is_special(v) else v for v in values]
    out = bind(frame, eqn, arrays)[0]
    return [Tracked(out, value.path, value.dims) if out.shape == value.array.shape else out]


def _reshaped(value: Tracked, eqn: core.JaxprEqn) -> list[tuple[int, ...]]:
    shape = eqn.outvars[0].aval.shape
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

AxisFinder.rules = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolve,
    "gather": _gather,
    "transpose": _moved(lambda value, eqn: [value.dims[d] for d in eqn.params["permutation"]]),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _moved(_reshaped)),
    "broadcast_in_dim": _moved(_broadcast),
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "stop_gradient", "name", "slice", "dynamic_slice", "split", "neg",
         "sharding_constraint", "pvary", "reduce_precision"),
        _same,
    ),
    **dict.fromkeys(("mul", "div", "add", "sub", "concatenate"), _elementwise),
}  # fmt: skip
