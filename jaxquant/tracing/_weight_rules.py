"""What each primitive does with a quantized weight: products, lookups, views, sums; or a reason why it does nothing."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.arrays import _packed, _views
from jaxquant.arrays._dims import Dims
from jaxquant.arrays._outliers import OutlierArray, multiply_weight, view_weight
from jaxquant.arrays._packing import plain
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._views import Unrepresentable
from jaxquant.products import _ops
from jaxquant.products._convolution import convolution, convolution_refusal
from jaxquant.products._grouped import ragged_dot, ragged_implementation
from jaxquant.products._lookup import take_rows
from jaxquant.tracing._interpreter import Frame, Value, bind, result_of
from jaxquant.tracing._weights import Shifted, Weight

if TYPE_CHECKING:
    from jaxquant.tracing._execution import Execution


def _product(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    if all(map(run.is_special, values)):
        values = [run.lower(values[0], eqn, frame, "two quantized weights meet"), values[1]]
    first = run.is_special(values[0])
    weight, x = values if first else values[::-1]
    shifted = isinstance(weight, Shifted)
    q = weight.weight.array if shifted else weight.array
    numbers, dtype = eqn.params["dimension_numbers"], result_of(eqn).dtype
    why = _ops.why_dense(q, first, numbers)
    if why is not None or not jnp.issubdtype(x.dtype, jnp.floating):
        return why or f"it meets {x.dtype}"
    pair, (name, reason) = (q, x) if first else (x, q), _ops.implementation(q, first, numbers, x.dtype, dtype)
    run.record(frame, eqn, weight.path, name, reason)
    wide = jnp.float32 if shifted and name == "xla" else dtype
    result = _ops.dot_general(*pair, numbers, wide, shared=frame.region.shared)
    if not shifted:
        return [result]
    return [(result.astype(jnp.float32) + _delta_product(weight, x, numbers, first)).astype(dtype)]


def kernel_product(
    run: "Execution", frame: Frame, eqn: core.JaxprEqn
) -> tuple[core.Var | core.Literal, tuple[QArray, Dims, jnp.dtype]] | None:
    """(x, (weight, how they meet, dtype of the result)) of a product that a kernel multiplies, else None."""
    if eqn.primitive.name != "dot_general":
        return None
    values = [frame.read(atom) for atom in eqn.invars]
    if sum(map(run.is_special, values)) != 1:
        return None
    first = run.is_special(values[0])
    weight, x = values if first else values[::-1]
    q = weight.weight.array if isinstance(weight, Shifted) else weight.array
    numbers, dtype = eqn.params["dimension_numbers"], result_of(eqn).dtype
    if not isinstance(q, QArray) or _ops.why_dense(q, first, numbers) is not None:
        return None
    if _ops.implementation(q, first, numbers, x.dtype, dtype)[0] == "xla":
        return None
    return eqn.invars[1 if first else 0], (q, _ops.pairing(first, numbers), dtype)


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


def _gather(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
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
            taken = view_weight(q, lambda part: _permuted(_taken(part, indices, dim, mode), order))
            return [Weight(taken, weight.path)]
        rows = take_rows(q, indices, dim, mode)
    except (Unrepresentable, NotImplementedError) as error:
        return str(error)
    run.record(frame, eqn, weight.path, "xla")
    return [jnp.transpose(rows, order)]


def _ragged(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
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
    try:
        dtype = result_of(eqn).dtype
        result = ragged_dot(lhs, rhs.array, group_sizes, dtype)
    except NotImplementedError as error:
        return str(error)
    run.record(frame, eqn, rhs.path, *ragged_implementation(rhs.array, lhs.dtype, dtype))
    return [result]


def _convolve(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    x, kernel = values
    if not isinstance(kernel, Weight) or run.is_special(x):
        return "only the kernel of a convolution may be quantized"
    if isinstance(kernel.array, OutlierArray):
        return "convolutions have no form for outlier channels"
    try:
        q = plain(kernel.array)
        why = convolution_refusal(q, eqn.params)
        result = None if why else convolution(x, q, eqn.params, result_of(eqn).dtype)
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


def _scale(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    place = 0 if run.is_special(values[0]) else 1
    weight = values[place]
    factor = None if run.is_special(values[1 - place]) else _scalar(frame, eqn.invars[1 - place], values[1 - place])
    if factor is None or (eqn.primitive.name == "div" and place == 1):
        return "only a scalar factor folds into the scale"
    factor = jnp.asarray(factor, jnp.float32)
    return [_scaled(weight, 1 / factor if eqn.primitive.name == "div" else factor)]


def _negate(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    return [_scaled(values[0], jnp.float32(-1))]


def _scaled(value: Weight | Shifted, factor: jax.Array) -> Weight | Shifted:
    if isinstance(value, Weight):
        return Weight(multiply_weight(value.array, factor), value.path)
    delta = None if value.delta is None else value.delta * factor.astype(value.delta.dtype)
    factors = tuple((a * factor.astype(a.dtype), b) for a, b in value.factors)
    weight = Weight(multiply_weight(value.weight.array, factor), value.path)
    return Shifted(weight, delta, factors)


def _add(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    place = 0 if run.is_special(values[0]) else 1
    value, other, atom = values[place], values[1 - place], eqn.invars[1 - place]
    if run.is_special(other) or jnp.shape(other) != result_of(eqn).shape or eqn.primitive.name == "sub":
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


View = Callable[[QArray, core.JaxprEqn, list], QArray | list[QArray]]


def _view(make: View) -> Callable:
    """A rule from a function that gives the view of a weight which an equation makes."""

    def rule(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
        value, *rest = values
        if not run.is_special(value) or any(map(run.is_special, rest)):
            return "a quantized weight is where an index or shape should be"
        if isinstance(value, Shifted):
            delta = bind(frame, eqn, [value.total_delta(value.weight.array.dtype), *rest])
            parts = rule(run, frame, eqn, [value.weight, *rest])
            return parts if isinstance(parts, str) else [Shifted(p, d) for p, d in zip(parts, delta, strict=True)]
        try:
            made = view_weight(value.array, lambda q: make(q if _survives(q, eqn) else plain(q), eqn, rest))
        except Unrepresentable as error:
            return str(error)
        except ValueError as error:
            raise ValueError(f"{value.path}: {eqn.primitive.name} {error}") from error
        return [Weight(q, value.path) for q in (made if isinstance(made, list) else [made])]

    return rule


# Views that leave the codes as they are, whatever their layout, or that know how to keep it.
_KEEP_LAYOUT = {"convert_element_type", "copy", "copy_p", "stop_gradient", "name", "pvary", "sharding_constraint"}
_KEEP_LAYOUT |= {"transpose", "reshape", "squeeze", "expand_dims"}


def _survives(q: QArray, eqn: core.JaxprEqn) -> bool:
    """Whether a view keeps the layout that a weight is packed in: it touches no codes, or cuts only its stack."""
    if q.layout == "plain" or eqn.primitive.name in _KEEP_LAYOUT:
        return True
    whole = q.shape[_packed.stack_dims(q) :]
    cuts = eqn.primitive.name in ("slice", "dynamic_slice", "split")
    return cuts and result_of(eqn).shape[q.ndim - len(whole) :] == whole


def _permuted(q: QArray, order: Sequence[int]) -> QArray:
    packed = None if q.layout == "plain" else _packed.transposed(q, order)
    return _views.transpose(plain(q), order) if packed is None else packed


def _taken(q: QArray, indices: jax.Array, dim: int, mode: Any) -> QArray:
    return _views.take(q if dim < _packed.stack_dims(q) else plain(q), indices, dim, mode)


def _convert(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unrepresentable(f"it becomes {eqn.params['new_dtype']}")
    return _views.astype(q, eqn.params["new_dtype"])


def _reshape(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    packed = None if q.layout == "plain" else _packed.reshaped(q, result_of(eqn).shape)
    return _views.reshape(plain(q), result_of(eqn).shape) if packed is None else packed


def _slice(q: QArray, eqn: core.JaxprEqn, _: list) -> QArray:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    for d, cut in enumerate(zip(starts, limits, eqn.params["strides"] or [1] * q.ndim, strict=True)):
        q = _views.slice_dim(q, d, *cut)
    return q


def _dynamic_slice(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    """One row of a matrix is a lookup; any other part of a weight is a view."""
    value, *starts = values
    sizes = eqn.params["slice_sizes"]
    if isinstance(value, Weight) and value.array.ndim == 2 and sizes.count(1) == 1:
        dim = sizes.index(1)
        if value.array.shape[dim] > 1 and sizes[1 - dim] == value.array.shape[1 - dim]:
            try:
                row = take_rows(value.array, jnp.asarray(starts[dim])[None], dim, "clip")
            except (Unrepresentable, NotImplementedError) as error:
                return str(error)
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


def _barrier(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value]:
    return jax.lax.optimization_barrier(values)


def _concatenate(run: "Execution", frame: Frame, eqn: core.JaxprEqn, values: list) -> Sequence[Value] | str:
    if not all(isinstance(value, Weight) for value in values):
        return "it joins quantized and float weights"
    parts = [plain(value.array) for value in values if isinstance(value.array, QArray)]
    if len(parts) < len(values):
        return "it joins weights that have outlier channels"
    try:
        joined = _views.concatenate(parts, eqn.params["dimension"])
    except Unrepresentable as error:
        return str(error)
    return [Weight(joined, " + ".join(dict.fromkeys(value.path for value in values)))]


RULES = {
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
    "transpose": _view(lambda q, eqn, _: _permuted(q, eqn.params["permutation"])),
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
