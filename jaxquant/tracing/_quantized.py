"""`quantized(fn)`: an unmodified model function that takes quantized parameters."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays._packing import is_packed, packing_refusal
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._spec import QuantConfig
from jaxquant.parameters._rules import NO_RULE, Assignment, assign
from jaxquant.parameters._tree import is_quantized, named_leaves
from jaxquant.tracing._arguments import Form, split_arguments
from jaxquant.tracing._execution import Execution, OnDense, Use
from jaxquant.tracing._weights import Weight, dense


def quantized(fn: Callable[..., Any], on_dense: OnDense = "record") -> Callable[..., Any]:
    """Makes a function of float parameters run on quantized ones, wherever in its arguments a quantized weight stands.

    The function is traced with float placeholders, so the model's own shape checks and dtype promotion behave, and its
    program is then evaluated with the quantized weights: products, lookups and convolutions multiply codes; views of a
    weight stay quantized; jit, checkpoint, scan, while, cond, vmap and shard_map are gone through. Whatever else meets
    a weight dequantizes it (see `explain`).

    Args:
        fn: a linen `apply`, a function around an nnx split and merge, a Haiku apply, any function of arrays. Arguments
            that are no arrays (flags, strings, modules) reach it as they are.
        on_dense: `"record"` dequantizes where there is no quantized form, `"error"` refuses.

    Returns:
        A function of the same signature; transform and jit it as any other.

    Raises:
        ValueError: `on_dense` is unknown; when called: a QArray that the function never used, a weight sliced inside
            its packed bytes, or a dense use under `on_dense="error"`. The message names the parameter and the remedy.

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> w = quantize_array(jnp.ones((128, 16)), PRESETS["w4a16"])
    >>> jax.jit(quantized(lambda w, x: jnp.tanh(x @ w)))(w, jnp.ones((2, 128))).shape
    (2, 16)
    """
    if on_dense not in ("record", "error"):
        raise ValueError(f"quantized: on_dense={on_dense!r}; accepted: 'record', 'error'")

    @functools.partial(jax.jit, static_argnums=0)
    def run(form: Form, arrays: list) -> Any:
        return _execute(fn, form, arrays, on_dense)[0]

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return run(*split_arguments(args, kwargs))

    return wrapped


def einsum(subscripts: str, *operands: jax.Array | QArray, **kwargs: Any) -> jax.Array:
    """Sums products as `jnp.einsum` does, with quantized weights among the operands.

    Args:
        subscripts: the sum, as for `jnp.einsum`.
        *operands: arrays and QArrays.
        **kwargs: as for `jnp.einsum`.

    Returns:
        The result; a weight that meets no product is dequantized.

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> w = quantize_array(jnp.ones((4, 128, 16)), PRESETS["w4a16"])
    >>> einsum("btd,ndh->btnh", jnp.ones((2, 3, 128)), w).shape
    (2, 3, 4, 16)
    """
    return _einsum(subscripts, *operands, **kwargs)


_einsum = quantized(jnp.einsum)


def _execute(fn: Callable[..., Any], form: Form, arrays: list, on_dense: OnDense) -> tuple[Any, dict[tuple, Use]]:
    """Traces the float model and evaluates it: its result, and what became of each weight."""
    placeholders = [jax.ShapeDtypeStruct(a.shape, a.dtype) if is_quantized(a) else a for a in arrays]
    jaxpr, shapes = jax.make_jaxpr(lambda *arrays: form.call(fn, arrays), return_shape=True)(*placeholders)
    values = [Weight(a, path) if is_quantized(a) else a for a, path in zip(arrays, form.paths, strict=True)]
    execution = Execution(on_dense)
    outs, _ = execution.run(jaxpr, values)
    returned = {out.path for out in outs if isinstance(out, Weight)}
    _check_used([v.path for v in values if isinstance(v, Weight)], execution.uses, returned)
    results = [
        out.array if isinstance(out, Weight) else dense(out) if execution.is_special(out) else out for out in outs
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), results), execution.uses


def _check_used(paths: list[str], uses: dict[tuple, Use], returned: set[str]) -> None:
    used = returned | {path for use in uses.values() for path in use.path.split(" + ")}
    unused = [path for path in paths if path not in used]
    if unused:
        raise ValueError(
            f"the function never used these quantized parameters: {', '.join(unused)}. Its parameters may be closed"
            " over instead of passed: make them an argument of the function and use that; or pass only what it uses"
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What becomes of each parameter in a program; print it.

    Attributes:
        rows: for each weight and way of using it: path, format, bits, shape, op, implementation, reason, uses.
        left: (path, dtype and shape, why) of each parameter left in float.
    """

    rows: tuple[tuple[str, str, float, tuple[int, ...], str, str, str, int], ...]
    left: tuple[tuple[str, str, str], ...]

    @property
    def dense(self) -> tuple[str, ...]:
        """The paths of weights that are dequantized somewhere."""
        return tuple(dict.fromkeys(row[0] for row in self.rows if row[5] == "DENSE"))

    @property
    def products(self) -> int:
        """How many equations use a weight in quantized form."""
        return sum(row[7] for row in self.rows if row[5] != "DENSE")

    def __str__(self) -> str:
        """The two tables as text."""
        header = ("parameter", "format", "bits", "shape", "op", "implementation", "uses")
        lines = [
            (path, name, f"{bits:.2f}", "x".join(map(str, shape)), op, f"{how}: {why}" if why else how, str(uses))
            for path, name, bits, shape, op, how, why, uses in self.rows
        ]
        text = _table([header, *lines])
        if self.left:
            text += "\n\n" + _table([("left in float", "array", "why"), *self.left])
        return text


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def explain(fn: Callable[..., Any], *args: Any, config: QuantConfig | None = None, **kwargs: Any) -> Explanation:
    """Says what `quantized(fn)` does with each parameter, without computing anything.

    Args:
        fn: the model function.
        *args: its arguments; arrays may be `jax.ShapeDtypeStruct`.
        config: the configuration the parameters were quantized with, to say why the rest was left in float.
        **kwargs: its keyword arguments.

    Returns:
        A table to print: each weight with its format, bits an element, shape, op, implementation (a kernel's name,
        `xla`, or `DENSE` and why) and number of uses; each float parameter and why it was left.

    Raises:
        ValueError: the function never used a quantized parameter.

    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> w = quantize_array(jnp.ones((128, 16)), PRESETS["w4a16"])
    >>> params = {"kernel": w, "bias": jnp.ones(16)}
    >>> print(explain(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 128))))
    parameter  format  bits  shape   op           implementation  uses
    kernel     int4    4.12  128x16  dot_general  xla             1
    <BLANKLINE>
    left in float  array        why
    bias           float32[16]  a vector stays in float
    """
    form, arrays = split_arguments(args, kwargs)
    uses: dict[tuple, Use] = {}

    def trace(arrays: list) -> Any:
        result, found = _execute(fn, form, arrays, "record")
        uses.update(found)
        return result

    jax.eval_shape(trace, arrays)
    weights = {path: a for path, a in zip(form.paths, arrays, strict=True) if is_quantized(a)}
    counts = Counter(uses.values())
    some_packed = any(map(is_packed, weights.values()))
    rows = [
        (path, q.qtype, q.bits, q.shape, use.op, use.implementation, _reason(use, q, some_packed), n)
        for use, n in counts.items()
        for path in use.path.split(" + ")
        for q in (weights[path],)
    ]
    return Explanation(tuple(rows), tuple(_left_in_float(args, kwargs, config)))


def _reason(use: Use, weight: Any, some_packed: bool) -> str:
    """A use's own reason, or why XLA multiplies this weight: no kernel takes it, or it alone is not packed."""
    if use.reason or use.implementation != "xla":
        return use.reason
    if is_packed(weight):
        return "unpacked in the program: this use or a view before it has no form in its packed layout"
    return packing_refusal(weight) or ("not packed" if some_packed else "")


def _left_in_float(args: tuple, kwargs: dict, config: QuantConfig | None) -> list[tuple[str, str, str]]:
    """The float leaves of every argument that holds a quantized one."""
    left = []
    for tree in (*args, *kwargs.values()):
        leaves = named_leaves(tree)
        if not any(is_quantized(leaf) for _, leaf in leaves):
            continue
        arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, "dtype")]
        chosen = assign(dict(arrays), config or QuantConfig())
        for path, leaf in arrays:
            if not is_quantized(leaf):
                name = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
                left.append((path, name, _why_left(chosen[path], config)))
    return left


def _why_left(chosen: Assignment, config: QuantConfig | None) -> str:
    if chosen.spec is not None:
        return "the configuration asks for it: quantize has not been applied"
    if config is None and chosen.reason == NO_RULE:
        return "give explain the config to learn why"
    return chosen.reason
