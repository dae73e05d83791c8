"""Finds each parameter's contracting axes by following it through the float model's program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxquant.parameters._tree import named_leaves
from jaxquant.tracing._arguments import split_arguments
from jaxquant.tracing._interpreter import Frame
from jaxquant.tracing._tracking import Meeting, Tracked, Tracker, track


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Finds which axes of each parameter the model's products sum over, without computing anything.

    Args:
        fn: the float model, called as `fn(params, *args, **kwargs)`.
        params: its parameters; arrays or `jax.ShapeDtypeStruct`.
        *args: the other arguments, likewise.
        **kwargs: keyword arguments.

    Returns:
        For each path of a parameter that meets a product, a convolution or a lookup: its contracting axes, negative and
        ascending, in its own dimensions whatever transposes, reshapes and slices lie between. A table that is only
        looked up contracts the dimensions of its rows. Where uses disagree the first product decides.

    >>> import jax.numpy as jnp
    >>> out, x = jnp.ones((4, 8, 32)), jnp.ones((1, 3, 4, 8))
    >>> infer_axes(lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["out"]), {"out": out}, x)
    {'out': (-3, -2)}
    """
    form, arrays = split_arguments((params, *args), kwargs)
    names = [path for path, leaf in named_leaves(params) if hasattr(leaf, "shape")]
    finder = AxisFinder()

    def trace(arrays: list) -> list:
        jaxpr = jax.make_jaxpr(lambda *arrays: form.call(fn, arrays))(*arrays)
        paths = [*names, *([None] * (len(arrays) - len(names)))]
        values = [track(array, path) for array, path in zip(arrays, paths, strict=True)]
        outs, _ = finder.run(jaxpr, values)
        return [out.array if isinstance(out, Tracked) else out for out in outs]

    jax.eval_shape(trace, arrays)
    return {path: axes for path, axes in (finder.lookups | finder.products).items() if axes}


class AxisFinder(Tracker):
    """Writes down the contracting axes of each parameter at its first product, and at its first lookup."""

    def __init__(self) -> None:
        """Starts with nothing found."""
        self.products: dict[str, tuple[int, ...]] = {}
        self.lookups: dict[str, tuple[int, ...]] = {}

    def product(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, meeting: Meeting) -> None:
        """Writes the summed dimensions down."""
        _found(self.products, value, meeting.w_contract)

    def ragged(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, sizes: jax.Array) -> None:
        """Writes the dimension of K down."""
        _found(self.products, value, (1,))

    def convolution(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array) -> None:
        """Writes the window and the input features down."""
        _found(self.products, value, eqn.params["dimension_numbers"].rhs_spec[1:])

    def lookup(self, value: Tracked, dims: Sequence[int]) -> None:
        """Writes down what a row is made of."""
        _found(self.lookups, value, dims)


def _found(table: dict, value: Tracked, dims: Sequence[int]) -> None:
    """Writes down what the first use says."""
    table.setdefault(value.path, tuple(sorted({own for d in dims for own in value.dims[d]})))
