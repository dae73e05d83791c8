"""Gathers the statistics of the inputs that meet chosen parameters, as results of the traced float program itself."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.algorithms._statistics import Statistics, init_statistics, merge_statistics, update_statistics
from jaxquant.calibration._expert_rows import all_rows, pooled_rows, ragged_weights, rows_of_all, through_every_expert
from jaxquant.tracing._interpreter import Frame
from jaxquant.tracing._tracking import Meeting, Tracked, Tracker

EMPTY = {"low": jnp.inf, "high": -jnp.inf, "exponent": -126, "priority": -1.0}  # of fields whose zero is no neutral


@dataclasses.dataclass(frozen=True)
class Watch:
    """What to gather for one parameter.

    Attributes:
        shape: the parameter's shape.
        axis: its contracting axes, negative and ascending.
        needs: names out of `jaxquant.algorithms._statistics.NEEDS`.
        expert_tokens: `"routed"` or `"all"`: what an expert sees, see `jaxquant.calibration._expert_rows`.
        borrow: the weight with which it counts the tokens of the layer's other experts.
    """

    shape: tuple[int, ...]
    axis: tuple[int, ...]
    needs: frozenset[str]
    expert_tokens: str = "routed"
    borrow: float = 0.0

    @property
    def channels(self) -> int:
        """K."""
        return math.prod(self.shape[a] for a in self.axis)


@dataclasses.dataclass(frozen=True)
class Observation:
    """Statistics on their way out of the program.

    Attributes:
        stats: the leaves have one leading dimension for each of `lead`.
        lead: the parameter's own dimensions they stand for.
        scans: own dimensions that scans further out will add, each with the scan's place in the program.
    """

    stats: Statistics
    lead: tuple[int, ...]
    scans: tuple[tuple[int, tuple], ...]


jax.tree_util.register_dataclass(Observation, data_fields=["stats"], meta_fields=["lead", "scans"])


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the inputs of one product become the rows that meet a weight.

    Attributes:
        key: equal for readings that do the same.
        watch: what is gathered.
        lead: the parameter's own dimensions that the rows' leading ones stand for.
        rows: function of the product's inputs: ([*lead, T, K], [*lead, T] weights of the rows or None).
    """

    key: Any
    watch: Watch
    lead: tuple[int, ...]
    rows: Callable[..., tuple[jax.Array, jax.Array | None]] = dataclasses.field(compare=False)


def read_product(value: Tracked, meeting: Meeting, watch: Watch, rank: int) -> Reading:
    """The rows that meet a matrix, or each matrix of a batch.

    Args:
        value: the parameter.
        meeting: how the input, of `rank` dimensions, meets it.
        watch: the parameter's contracting axes.
        rank: of the input.

    Raises:
        NotImplementedError: the product sums over other axes or over a part of them.
    """
    check_axes(value, meeting.w_contract, watch)
    summed = sorted(zip(meeting.w_contract, meeting.x_contract, strict=True), key=lambda pair: value.dims[pair[0]])
    batches = [(value.dims[w], d) for w, d in zip(meeting.w_batch, meeting.x_batch, strict=True)]
    stacked = sorted((own, d) for own, d in batches if own)
    held = {*meeting.x_contract, *(d for _, d in stacked)}
    lead = tuple(own for owns, _ in stacked for own in owns)
    order = (*(d for _, d in stacked), *(d for d in range(rank) if d not in held), *(d for _, d in summed))
    sizes = [watch.shape[own] for own in lead]

    def rows(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        inputs = x.transpose(order).reshape(*sizes, -1, watch.channels)
        if not lead or not watch.borrow:
            return inputs, live_rows(inputs) if lead else None
        one = inputs.reshape(-1, *inputs.shape[-2:])
        shown, weights = pooled_rows(one, live_rows(one), watch.borrow)
        return shown.reshape(*sizes, *shown.shape[1:]), weights.reshape(*sizes, -1)

    return Reading(("product", watch.channels, watch.needs, watch.borrow, tuple(sizes), order), watch, lead, rows)


def read_ragged(value: Tracked, watch: Watch) -> Reading:
    """For each expert the rows sorted to it, or all; the inputs are rows [M, K] and their number for each expert.

    Rows may be [E, M, K]: all of them, as each expert would get them.
    """
    check_axes(value, (1,), watch)

    def rows(x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        if watch.expert_tokens == "all":
            shown = jnp.broadcast_to(x, (*sizes.shape, *x.shape[-2:]))
            return shown, rows_of_all(shown, sizes)
        weights = ragged_weights(x.shape[0], sizes, watch.borrow)
        return jnp.broadcast_to(x, (weights.shape[0], *x.shape)), weights

    return Reading(("ragged", watch), watch, value.dims[0], rows)


def read_convolution(value: Tracked, params: Mapping[str, Any], watch: Watch) -> Reading:
    """The patches under the window."""
    check_axes(value, params["dimension_numbers"].rhs_spec[1:], watch)
    key = ("convolution", watch, value.dims, value.array.shape, str(sorted(params.items())))
    return Reading(key, watch, (), lambda x: (patches(x, params, value, watch), None))


class Observer(Tracker):
    """Emits an `Observation` under the path of each watched parameter that meets an input."""

    def __init__(self, watches: Mapping[str, Watch]) -> None:
        """Takes what to gather, by path; `met` then holds what each weight was multiplied with, product by product."""
        self.watches = watches
        self.met: dict[str, list] = {}

    def product(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, meeting: Meeting) -> None:
        """Gathers the rows."""
        if (watch := self.watches.get(value.path)) is not None:
            reading = read_product(value, meeting, watch, x.ndim)
            self.gather(frame, value, reading, [eqn.invars[1 - meeting.place]], x)

    def ragged(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array, sizes: jax.Array) -> None:
        """Gathers the rows of each expert, or all rows as each expert would get them."""
        if (watch := self.watches.get(value.path)) is None:
            return
        reading = read_ragged(value, watch)
        if watch.expert_tokens == "all":
            again = all_rows(frame, eqn.invars[0], eqn.invars[2], eqn, lambda atom: self.array(frame, atom))
            reading = dataclasses.replace(reading, rows=lambda _, sizes: through_every_expert(again, sizes))
        self.gather(frame, value, reading, [eqn.invars[0], eqn.invars[2]], x, sizes)

    def array(self, frame: Frame, atom: core.Var | core.Literal) -> jax.Array:
        """The array of a variable, that of a parameter too."""
        value = frame.read(atom)
        return value.array if self.is_special(value) else value

    def convolution(self, frame: Frame, eqn: core.JaxprEqn, value: Tracked, x: jax.Array) -> None:
        """Gathers the patches."""
        if (watch := self.watches.get(value.path)) is not None:
            self.gather(frame, value, read_convolution(value, eqn.params, watch), [eqn.invars[0]], x)

    def gather(self, frame: Frame, value: Tracked, reading: Reading, atoms: list, *inputs: jax.Array) -> None:
        """Emits the statistics of what a product reads, out of the variables `atoms`."""
        self.met.setdefault(value.path, []).append((frame.stack, [id(atom) for atom in atoms], reading.key))
        stats, lead, watch = read_statistics(reading, *inputs), reading.lead, reading.watch
        for own, index in zip(value.picked, value.indices, strict=True):
            if own < watch.axis[0]:
                stats, lead = _place(stats, watch.shape[own], index), (own, *lead)
        order = tuple(sorted(range(len(lead)), key=lead.__getitem__))
        stats = jax.tree.map(lambda leaf: leaf.transpose(*order, *range(len(lead), leaf.ndim)), stats)
        self.emit(frame, value.path, Observation(stats, tuple(sorted(lead)), value.scans))

    def join(self, held: Observation, new: Observation) -> Observation:
        """Pools two uses of one parameter."""
        if (held.lead, held.scans) != (new.lead, new.scans):
            raise NotImplementedError(
                "a parameter is used both as a stack of matrices and as one; leave it with Rule(path, None)"
            )
        return Observation(merge_stacks(held.stats, new.stats), held.lead, held.scans)

    def pool(self, emitted: dict[str, Observation], scan: tuple) -> dict[str, Observation]:
        """A parameter that the scan sliced gets its leading dimension back; one used in each step pools over steps."""
        return {path: self._pool(observed, scan) for path, observed in emitted.items()}

    def _pool(self, observed: Observation, scan: tuple) -> Observation:
        owns = [own for own, place in observed.scans if place == scan]
        if not owns:
            inner = dataclasses.replace(observed, stats=jax.tree.map(lambda leaf: leaf[0], observed.stats))
            rest = dataclasses.replace(observed, stats=jax.tree.map(lambda leaf: leaf[1:], observed.stats))
            return jax.lax.scan(lambda held, new: (self.join(held, new), None), inner, rest)[0]
        lead = (*owns, *observed.lead)
        order = tuple(sorted(range(len(lead)), key=lead.__getitem__))
        stats = jax.tree.map(lambda leaf: leaf.transpose(*order, *range(len(lead), leaf.ndim)), observed.stats)
        left = tuple(entry for entry in observed.scans if entry[1] != scan)
        return Observation(stats, tuple(sorted(lead)), left)

    def blank(self, emitted: Observation) -> Observation:
        """The statistics of no token."""
        return dataclasses.replace(emitted, stats=_nothing(emitted.stats))


def empty_like(forms: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The statistics of no token for each of some, given as arrays or in abstract form."""
    return {path: _nothing(form) for path, form in forms.items()}


def merge_stacks(a: Statistics, b: Statistics) -> Statistics:
    """Joins the statistics of two sets of tokens, matrix by matrix of a stack."""
    merge = merge_statistics
    for _ in range(a.count.ndim):
        merge = jax.vmap(merge)
    return merge(a, b)


def _nothing(form: Statistics) -> Statistics:
    """Statistics of zero tokens in the shapes of others."""
    fields = {f.name: getattr(form, f.name) for f in dataclasses.fields(form)}
    empty = {
        name: jnp.full(leaf.shape, EMPTY.get(name, 0), leaf.dtype) for name, leaf in fields.items() if leaf is not None
    }
    return dataclasses.replace(form, **empty)


def _place(stats: Statistics, size: int, index: jax.Array) -> Statistics:
    """Statistics of one index of a stack, as those of the stack."""
    form = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), stats)
    return jax.tree.map(lambda whole, leaf: whole.at[index].set(leaf), _nothing(form), stats)


def empty_statistics(reading: Reading, outputs: int = 0) -> Statistics:
    """Statistics of no token, with the leading dimensions of a reading."""
    sizes = [reading.watch.shape[own] for own in reading.lead]
    stats = init_statistics(reading.watch.needs, reading.watch.channels, outputs)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*sizes, *leaf.shape)), stats)


def read_statistics(reading: Reading, *inputs: jax.Array) -> Statistics:
    """The statistics of what a product reads, each leaf with the reading's leading dimensions."""
    return add_statistics(empty_statistics(reading), reading, inputs)


def add_statistics(
    stats: Statistics,
    reading: Reading,
    inputs: Sequence[jax.Array],
    float_inputs: Sequence[jax.Array] | None = None,
    residual: jax.Array | None = None,
) -> Statistics:
    """Adds what a product reads to statistics.

    Args:
        stats: of the batches before, each leaf with the reading's leading dimensions.
        reading: how inputs become rows.
        inputs: of the product.
        float_inputs: what the float model has there, where cross statistics are gathered.
        residual: [T, N] what the outputs should make up for, where that is gathered; None is nothing.

    Returns:
        The new statistics.
    """
    rows, weights = reading.rows(*inputs)
    beside = None if float_inputs is None else reading.rows(*float_inputs)[0]
    if residual is None and stats.residual is not None:
        residual = jnp.zeros((rows.shape[-2], stats.residual.shape[-1]), rows.dtype)

    def update(stats, rows, weights, beside):
        return update_statistics(stats, rows, weights=weights, x_float=beside, residual=residual)

    for _ in reading.lead:
        update = jax.vmap(update)
    return update(stats, rows, weights, beside)


def live_rows(rows: jax.Array) -> jax.Array:
    """1 for each row that holds anything: an expert's places not taken are rows of zeros."""
    return jnp.any(rows != 0, axis=-1).astype(jnp.float32)


def check_axes(value: Tracked, dims: Any, watch: Watch) -> None:
    """Raises unless these dimensions of a value are the watched axes in full."""
    own = tuple(sorted({own for d in dims for own in value.dims[d]}))
    size = math.prod(value.array.shape[d] for d in dims)
    if own != watch.axis:
        raise NotImplementedError(
            f"{value.path}: a product sums over its axes {own}, but it is to be quantized along {watch.axis};"
            f" give Rule({value.path!r}, spec, axis={own}), or leave it with Rule({value.path!r}, None)"
        )
    if size != watch.channels:
        raise NotImplementedError(
            f"{value.path}: a product sums over {size} of its {watch.channels} input channels; calibration needs all of"
            f" them in one product: leave it with Rule({value.path!r}, None), or quantize without an algorithm"
        )


def patches(x: jax.Array, params: Mapping[str, Any], value: Tracked, watch: Watch) -> jax.Array:
    """The rows that a convolution multiplies its kernel with, in the kernel's own order of input channels.

    Raises:
        NotImplementedError: the convolution has groups.
    """
    numbers = params["dimension_numbers"]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise NotImplementedError(
            f"{value.path}: calibration of a convolution in groups; leave it with Rule({value.path!r}, None)"
        )
    window = [value.array.shape[d] for d in numbers.rhs_spec[2:]]
    channels = value.array.shape[numbers.rhs_spec[1]]
    cut = jax.lax.conv_general_dilated_patches(
        x,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, numbers.lhs_spec),
    )
    rows = jnp.moveaxis(cut, numbers.lhs_spec[1], -1).reshape(-1, channels, *window)
    dims = [value.dims[d] for d in numbers.rhs_spec[1:]]  # of the channels and of the window, in the order of `rows`
    order = sorted(range(len(dims)), key=dims.__getitem__)
    return rows.transpose(0, *(1 + place for place in order)).reshape(-1, watch.channels)
