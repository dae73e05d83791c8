"""Evaluates a jaxpr whose parameters are quantized: the rules of the interpreter for `QArray`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant import _ops, _views
from jaxquant._convolution import convolution, convolution_refusal
from jaxquant._interpreter import Frame, Interpreter, Value, bind
from jaxquant._qarray import QArray, dequantize_array
from jaxquant._views import Unrepresentable

OnDense = Literal["record", "error"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized weight on its way through a program.

    Attributes:
        array: the weight, or the view of it that the program has made.
        path: where its parameter lies in the tree.
    """

    array: QArray
    path: str


@dataclasses.dataclass(frozen=True)
class Shifted:
    """`weight + delta + sum of a @ b`, kept as a sum so that products with it are sums of products (LoRA).

    Attributes:
        weight: the quantized term.
        delta: float array of the weight's shape, or None.
        factors: pairs (a [K, r], b [r, N]).
    """

    weight: Weight
    delta: jax.Array | None
    factors: tuple[tuple[jax.Array, jax.Array], ...] = ()

    @property
    def path(self) -> str:
        """The path of the quantized term."""
        return self.weight.path

    def total_delta(self, dtype: jnp.dtype) -> jax.Array:
        """The float terms added up."""
        parts = [self.delta] if self.delta is not None else []
        parts += [jnp.matmul(a, b) for a, b in self.factors]
        return sum((part.astype(dtype) for part in parts[1:]), parts[0].astype(dtype))


jax.tree_util.register_dataclass(Weight, data_fields=["array"], meta_fields=["path"])
jax.tree_util.register_dataclass(Shifted, data_fields=["weight", "delta", "factors"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that met a quantized weight.

    Attributes:
        path: the parameter.
        op: the primitive.
        implementation: `"xla"`, a kernel's name, or `"DENSE"` where the weight was dequantized.
        reason: why it was dequantized, else empty.
    """

    path: str
    op: str
    implementation: str
    reason: str = ""


class Execution(Interpreter):
    """Runs a program on quantized weights, and writes down what became of each.

    Attributes:
        uses: every equation that consumed a weight, once for each place in the program.
    """

    def __init__(self, on_dense: OnDense = "record") -> None:
        """Takes what to do where a weight would be dequantized."""
        self.on_dense = on_dense
        self.uses: dict[tuple, Use] = {}

    def is_special(self, value: Value) -> bool:
        """Weights, alone or in a sum."""
        return isinstance(value, Weight | Shifted)

    def record(self, frame: Frame, eqn: core.JaxprEqn, path: str, implementation: str, reason: str = "") -> None:
        """Writes a use down; the same equation reached the same way is one use, however often JAX traces it."""
        key = (*frame.stack, id(eqn), path)
        self.uses[key] = Use(path, eqn.primitive.name, implementation, reason)

    def lower(self, value: Value, eqn: core.JaxprEqn, frame: Frame, reason: str) -> jax.Array:
        """Dequantizes a weight that meets a primitive without a quantized form."""
        if self.on_dense == "error":
            raise ValueError(
                f"{value.path}: {eqn.primitive.name} would dequantize this weight ({reason}); leave it in float with"
                f" Rule({value.path!r}, None), use it in products only, or allow the copy with on_dense='record'"
            )
        self.record(frame, eqn, value.path, "DENSE", reason)
        return dense(value)

    def sliceable(self, value: Value) -> Value:
        """Gives every leaf the leading dimension in full."""
        try:
            if isinstance(value, Shifted):
                delta = value.total_delta(value.weight.array.dtype)
                return Shifted(self.sliceable(value.weight), delta)
            return Weight(_views.with_leading(value.array), value.path)
        except Unrepresentable:
            return None

    def shards(self, value: Value, spec: Any, mesh: Any) -> tuple[Value, Any, Callable] | None:
        """Cuts codes and grids alike."""
        return _shards(value, spec, mesh) if isinstance(value, Weight) else None


def dense(value: Weight | Shifted) -> jax.Array:
    """The float array that a weight, or a sum with one, stands for."""
    if isinstance(value, Weight):
        return dequantize_array(value.array)
    weight = dequantize_array(value.weight.array)
    return weight + value.total_delta(weight.dtype)


def _shards(value: Weight, spec: Any, mesh: Any) -> tuple[Weight, Any, Callable] | None:
    q = value.array
    names = [*spec, *([None] * (q.ndim - len(spec)))]
    cuts = [math.prod(mesh.shape[n] for n in ((s,) if isinstance(s, str) else s or ())) for s in names]
    packed = _views.packed_dim(q)
    aligned = q.padded == q.shape[packed] and (not q.format.packed or q.padded // cuts[packed] % 8 == 0)
    if cuts[packed] > 1 and (q.perm is not None or not aligned):
        return None

    def cut_grid(grid: jax.Array | None) -> jax.Array | None:
        if grid is None:
            return None
        for d, cut in enumerate(cuts):
            grid = grid if grid.shape[d] == 1 else _views.refine(grid, d, math.lcm(grid.shape[d], cut))
        return grid

    def grid_spec(grid: jax.Array | None) -> Any:
        if grid is None:
            return None
        return jax.sharding.PartitionSpec(*(n if size > 1 else None for n, size in zip(names, grid.shape, strict=True)))

    grids = {name: cut_grid(getattr(q, name)) for name in _views.GRIDS}
    specs = {name: grid_spec(grid) for name, grid in grids.items()} | {"qvalue": jax.sharding.PartitionSpec(*names)}

    def localize(local: Weight) -> Weight:
        ends = cuts[len(cuts) - len(q.trailing) :]
        trailing = tuple(size // cut for size, cut in zip(q.trailing, ends, strict=True))
        return Weight(dataclasses.replace(local.array, trailing=trailing, padded=q.padded // cuts[packed]), local.path)

    ready = dataclasses.replace(q, **grids)
    return Weight(ready, value.path), Weight(dataclasses.replace(ready, **specs), value.path), localize


def _product(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    lhs, rhs = values
    if run.is_special(lhs) and run.is_special(rhs):
        lhs = run.lower(lhs, eqn, frame, "two quantized weights meet")
    weight, x = (lhs, rhs) if run.is_special(lhs) else (rhs, lhs)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"it meets {x.dtype}"
    numbers, dtype = eqn.params["dimension_numbers"], eqn.outvars[0].aval.dtype
    q = (weight.weight if isinstance(weight, Shifted) else weight).array
    why = _ops.why_dense(q, run.is_special(lhs), numbers)
    if why is not None:
        return why
    run.record(frame, eqn, weight.path, "xla")
    pair = (q, rhs) if run.is_special(lhs) else (lhs, q)
    result = _ops.dot_general(
        *pair, numbers, jnp.float32 if isinstance(weight, Shifted) else dtype, shared=frame.region.shared
    )
    if isinstance(weight, Shifted):
        result = (result + _delta_product(weight, x, numbers, run.is_special(lhs))).astype(dtype)
    return [result]


def _delta_product(value: Shifted, x: jax.Array, numbers: Any, weight_first: bool) -> jax.Array:
    """The float terms' share of a product, float32; low-rank factors are multiplied one after the other."""
    (lhs_contract, rhs_contract), batch = numbers
    w_contract, x_contract = (lhs_contract, rhs_contract) if weight_first else (rhs_contract, lhs_contract)
    if value.delta is not None or len(w_contract) != 1 or any(map(len, batch)):
        delta = value.total_delta(x.dtype)
        pair = (delta, x) if weight_first else (x, delta)
        return jax.lax.dot_general(*pair, numbers, preferred_element_type=jnp.float32)
    terms = []
    for a, b in value.factors:
        first, second = (a, b) if tuple(w_contract) == (0,) else (b.T, a.T)
        inner = jax.lax.dot_general(x, first.astype(x.dtype), ((tuple(x_contract), (0,)), ((), ())))
        terms.append(jnp.einsum("...r,rn->...n", inner, second.astype(x.dtype), preferred_element_type=jnp.float32))
    total = sum(terms[1:], terms[0])
    return jnp.moveaxis(total, -1, 0) if weight_first else total


def _gather(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    weight, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(weight, Weight) or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return "this form of gather has no rule"
    q, dim = weight.array, numbers.start_index_map[0]
    whole = all(size == q.shape[d] for d, size in enumerate(sizes) if d != dim)
    if tuple(numbers.collapsed_slice_dims) != (dim,) or not whole:
        return "it gathers parts of rows"
    indices, mode = jax.lax.squeeze(indices, [indices.ndim - 1]), eqn.params["mode"]
    rank = q.ndim - 1 + indices.ndim
    rests = [d if d < dim else d + indices.ndim for d in range(q.ndim - 1)]
    spots = iter(range(dim, dim + indices.ndim))
    order = [rests[numbers.offset_dims.index(d)] if d in numbers.offset_dims else next(spots) for d in range(rank)]
    try:
        if dim < len(q.lead) and len(q.trailing) > 1:  # whole matrices, as an expert's: they stay quantized
            return [Weight(_views.transpose(_views.take(q, indices, dim, mode), order), weight.path)]
        rows = _ops.take_rows(q, indices, dim, mode)
    except (Unrepresentable, NotImplementedError) as error:
        return str(error)
    run.record(frame, eqn, weight.path, "xla")
    return [jnp.transpose(rows, order)]


def _ragged(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    lhs, rhs, group_sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = (
        tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,))
        and not any(map(len, numbers.dot_dimension_numbers[1]))
        and (tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)) == ((0,), (0,))
        and eqn.params["group_offset"] is None
    )
    if not plain or not isinstance(rhs, Weight) or run.is_special(lhs):
        return "only [M, K] x [E, K, N] ragged products have a quantized form"
    run.record(frame, eqn, rhs.path, "xla")
    return [_ops.ragged_dot(lhs, rhs.array, group_sizes, eqn.outvars[0].aval.dtype)]


def _convolve(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    x, kernel = values
    if not isinstance(kernel, Weight) or run.is_special(x):
        return "only the kernel of a convolution may be quantized"
    try:
        why = convolution_refusal(kernel.array, eqn.params)
        result = None if why else convolution(x, kernel.array, eqn.params, eqn.outvars[0].aval.dtype)
    except Unrepresentable as error:
        why = str(error)
    if why is not None:
        return why
    run.record(frame, eqn, kernel.path, "xla")
    return [result]


def _scalar(frame: Frame, atom: Any, value: Any) -> Any:
    """The scalar that a factor is, whether or not it has been broadcast to the weight's shape; None if it is none."""
    maker = frame.maker(atom)
    if maker is not None and maker.primitive.name == "broadcast_in_dim":
        value = frame.read(maker.invars[0])
    return value if jnp.ndim(value) == 0 else None


def _scale(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    place = 0 if run.is_special(values[0]) else 1
    weight = values[place]
    factor = None if run.is_special(values[1 - place]) else _scalar(frame, eqn.invars[1 - place], values[1 - place])
    if factor is None or (eqn.primitive.name == "div" and place == 1):
        return "only a scalar factor folds into the scale"
    factor = jnp.asarray(factor, jnp.float32)
    return [_scaled(weight, 1 / factor if eqn.primitive.name == "div" else factor)]


def _negate(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    return [_scaled(values[0], jnp.float32(-1))]


def _scaled(value: Weight | Shifted, factor: jax.Array) -> Weight | Shifted:
    if isinstance(value, Weight):
        return Weight(_views.multiply(value.array, factor), value.path)
    delta = None if value.delta is None else value.delta * factor.astype(value.delta.dtype)
    factors = tuple((a * factor.astype(a.dtype), b) for a, b in value.factors)
    return Shifted(_scaled(value.weight, factor), delta, factors)


def _add(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    place = 0 if run.is_special(values[0]) else 1
    value, other, atom = values[place], values[1 - place], eqn.invars[1 - place]
    if run.is_special(other) or jnp.shape(other) != eqn.outvars[0].aval.shape or eqn.primitive.name == "sub":
        return "only float terms of the weight's own shape are added lazily"
    held = value if isinstance(value, Shifted) else Shifted(value, None)
    pair = _low_rank(frame, atom)
    if pair is not None:
        return [dataclasses.replace(held, factors=(*held.factors, pair))]
    return [dataclasses.replace(held, delta=other if held.delta is None else held.delta + other)]


def _low_rank(frame: Frame, atom: Any) -> tuple[jax.Array, jax.Array] | None:
    """The factors (a, b) of a term that this jaxpr made as a @ b, or as a scalar times that."""
    maker = frame.maker(atom)
    if maker is None:
        return None
    if maker.primitive.name == "mul":
        for inner, outer in (maker.invars, maker.invars[::-1]):
            scalar, pair = _scalar(frame, outer, frame.read(outer)), _low_rank(frame, inner)
            if scalar is not None and pair is not None:
                return pair[0] * jnp.asarray(scalar, pair[0].dtype), pair[1]
    if maker.primitive.name != "dot_general" or maker.params["dimension_numbers"] != (((1,), (0,)), ((), ())):
        return None
    a, b = map(frame.read, maker.invars)
    return (a, b) if a.ndim == b.ndim == 2 and a.size + b.size < a.shape[0] * b.shape[1] else None


View = Callable[[QArray, core.JaxprEqn, list], QArray]


def _view(make: View) -> Callable:
    """A rule from a function that gives the view of a weight which an equation makes."""

    def rule(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
        value, *rest = values
        if not run.is_special(value) or any(map(run.is_special, rest)):
            return "a quantized weight is where an index or shape should be"
        if isinstance(value, Shifted):
            delta = bind(frame, eqn, [value.total_delta(value.weight.array.dtype), *rest])
            parts = rule(run, frame, eqn, [value.weight, *rest])
            return parts if isinstance(parts, str) else [Shifted(p, d) for p, d in zip(parts, delta, strict=True)]
        try:
            made = make(value.array, eqn, rest)
        except Unrepresentable as error:
            return str(error)
        except ValueError as error:
            raise ValueError(f"{value.path}: {eqn.primitive.name} {error}") from error
        return [Weight(q, value.path) for q in (made if isinstance(made, list) else [made])]

    return rule


def _convert(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unrepresentable(f"it becomes {eqn.params['new_dtype']}")
    return _views.astype(q, eqn.params["new_dtype"])


def _reshape(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    return _views.reshape(q, eqn.outvars[0].aval.shape)


def _slice(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    for d, cut in enumerate(zip(starts, limits, eqn.params["strides"] or [1] * q.ndim, strict=True)):
        q = _views.slice_dim(q, d, *cut)
    return q


def _dynamic_slice(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    """One row of a matrix is a lookup; any other part of a weight is a view."""
    value, *starts = values
    sizes = eqn.params["slice_sizes"]
    if isinstance(value, Weight) and value.array.ndim == 2 and sizes.count(1) == 1:
        dim = sizes.index(1)
        if value.array.shape[dim] > 1 and sizes[1 - dim] == value.array.shape[1 - dim]:
            row = _ops.take_rows(value.array, jnp.asarray(starts[dim])[None], dim, "clip")
            run.record(frame, eqn, value.path, "xla")
            return [row]
    return _cut(run, frame, eqn, values)


_cut = _view(lambda q, eqn, starts: _views.dynamic_slice(q, starts, eqn.params["slice_sizes"]))


def _split(q: QArray, eqn: core.JaxprEqn, _: list) -> list[QArray]:
    parts, start = [], 0
    for size in map(int, eqn.params["sizes"]):
        parts.append(_views.slice_dim(q, eqn.params["axis"], start, start + size))
        start += size
    return parts


def _vary(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    return jax.tree.map(lambda leaf: eqn.primitive.bind(leaf, **eqn.params), q)


def _constrain(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    """Constrains the codes; the grids are small and follow them."""
    if q.qvalue.shape != q.shape:
        return q
    return dataclasses.replace(q, qvalue=jax.lax.with_sharding_constraint(q.qvalue, eqn.params["sharding"]))


def _barrier(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    return jax.lax.optimization_barrier(values)


def _concatenate(run: Execution, frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    if not all(isinstance(value, Weight) for value in values):
        return "it joins quantized and float weights"
    try:
        joined = _views.concatenate([value.array for value in values], eqn.params["dimension"])
    except Unrepresentable as error:
        return str(error)
    return [Weight(joined, " + ".join(dict.fromkeys(value.path for value in values)))]


Execution.rules = {
    "dot_general": _product,
    "gather": _gather,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolve,
    "mul": _scale,
    "div": _scale,
    "neg": _negate,
    "add": _add,
    "optimization_barrier": _barrier,
    "concatenate": _concatenate,
    "convert_element_type": _view(_convert),
    "transpose": _view(lambda q, eqn, _: _views.transpose(q, eqn.params["permutation"])),
    "reshape": _view(_reshape),
    "squeeze": _view(_reshape),
    "expand_dims": _view(_reshape),
    "broadcast_in_dim": _view(
        lambda q, eqn, _: _views.broadcast_in_dim(q, eqn.params["shape"], eqn.params["broadcast_dimensions"])
    ),
    "slice": _view(_slice),
    "dynamic_slice": _dynamic_slice,
    "split": _view(_split),
    "pvary": _view(_vary),
    "sharding_constraint": _view(_constrain),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "name"), _view(lambda q, eqn, _: q)),
}
