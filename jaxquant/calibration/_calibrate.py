"""`calibrate`: statistics of the inputs of every weight an algorithm is to round, from the float model."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxquant.algorithms._apply import needed_statistics
from jaxquant.algorithms._statistics import FLOAT_NEEDS, Statistics
from jaxquant.arrays._spec import QuantConfig
from jaxquant.calibration._expert_rows import check_expert_tokens
from jaxquant.calibration._observe import Observation, Observer, Watch, empty_like, merge_stacks
from jaxquant.checkpoint import load, save
from jaxquant.parameters._rules import Assignment, assign
from jaxquant.parameters._tree import named_leaves
from jaxquant.tracing._arguments import Form, split_arguments
from jaxquant.tracing._infer import infer_axes
from jaxquant.tracing._tracking import track


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration saw: a pytree, so that it can be saved, sent between devices and merged.

    Attributes:
        statistics: by path of the weight; leaves have a leading dimension for each stack or expert axis.
        axes: contracting axes by path, as the model's products sum over them.
        groups: paths of weights that always meet the same inputs (q, k and v; gate and up), for those that do.
    """

    statistics: dict[str, Statistics]
    axes: Mapping[str, tuple[int, ...]]
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def tokens(self) -> dict[str, jax.Array]:
        """How many inputs each weight met; an array for stacks and experts."""
        return {path: stats.count for path, stats in self.statistics.items()}

    def merge(self, other: "Calibration") -> "Calibration":
        """Joins the statistics of other tokens, from another batch, process or device.

        Args:
            other: of the same model and configuration.

        Returns:
            What one calibration over both would have given.

        Raises:
            ValueError: the two are of different weights.
        """
        if self.statistics.keys() != other.statistics.keys() or dict(self.axes) != dict(other.axes):
            odd = sorted(self.statistics.keys() ^ other.statistics.keys())
            raise ValueError(f"Calibration.merge: of different models or configurations; not in both: {odd[:5]}")
        return Calibration(_merge(self.statistics, other.statistics), self.axes, self.groups)

    def save(self, path: str | pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes the statistics to a folder, as `jaxquant.save` does.

        Args:
            path: the folder.
            overwrite: replaces what is there.
        """
        held = {
            name: {field: leaf for field, leaf in vars(stats).items() if leaf is not None}
            for name, stats in self.statistics.items()
        }
        axes = {name: np.asarray(axis, np.int32) for name, axis in self.axes.items()}
        groups = {group[0]: {name: np.int32(place) for place, name in enumerate(group)} for group in self.groups}
        save(path, {"statistics": held, "axes": axes, "groups": groups}, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Calibration":
        """Reads what `save` wrote.

        Args:
            path: the folder.

        Returns:
            The calibration.

        Raises:
            ValueError: the folder holds something else.
        """
        held = load(path)
        if not isinstance(held, dict) or held.keys() != {"statistics", "axes", "groups"}:
            raise ValueError(
                f"Calibration.load: {path} holds no calibration; give a folder that Calibration.save wrote"
            )
        axes = {name: tuple(map(int, axis)) for name, axis in held["axes"].items()}
        groups = tuple(tuple(sorted(group, key=lambda name: int(group[name]))) for group in held["groups"].values())
        return cls({name: Statistics(**fields) for name, fields in held["statistics"].items()}, axes, groups)


def _flatten(calibration: Calibration) -> tuple[tuple, tuple]:
    return (calibration.statistics,), (tuple(sorted(calibration.axes.items())), calibration.groups)


def _unflatten(static: tuple, children: tuple) -> Calibration:
    return Calibration(children[0], dict(static[0]), static[1])


jax.tree_util.register_pytree_node(Calibration, _flatten, _unflatten)


@jax.jit
def _merge(held: dict[str, Statistics], new: dict[str, Statistics]) -> dict[str, Statistics]:
    return {path: merge_stacks(held[path], new[path]) for path in held}


def calibrate(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    config: QuantConfig,
    *,
    expert_tokens: Literal["routed", "all"] = "routed",
    borrow: float = 0.0,
) -> Calibration:
    """Runs the float model over calibration batches and gathers what the configuration's algorithm needs.

    One program a batch shape gathers the statistics of all weights, through scans, checkpoints, branches, attention and
    experts; nothing about the model's structure has to be said.

    Args:
        apply_fn: the float model, called `apply_fn(params, batch)`, or `apply_fn(params, *batch)` for a tuple.
        params: its parameters.
        batches: calibration inputs, for example int tokens [sequences, T] each.
        config: the order that `quantize` will be given.
        expert_tokens: what the statistics of an expert see: the tokens routed to it, or `"all"`, as though each went
            through every expert (of ragged products; a dense dispatch shows all tokens anyway).
        borrow: the weight, from 0 to 1, with which an expert counts the tokens of its layer's other experts: an expert
            that was rarely hit is shrunk towards the layer's pooled statistics, one often hit hardly.

    Returns:
        The statistics: `quantize(params, config, stats=...)` takes them.

    Raises:
        ValueError: no batch, or a weight that the algorithm is to round never meets an input.
        NotImplementedError: a weight is used in a way whose statistics cannot be gathered; the message names it.

    References:
        Frantar et al. 2022, arXiv:2210.17323 (Hessians of layer inputs).

    >>> import jax.numpy as jnp
    >>> from jaxquant.algorithms.gptq import gptq
    >>> config = QuantConfig.preset("w4a16", algorithm=gptq())
    >>> stats = calibrate(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((128, 8))}, [jnp.ones((4, 128))], config)
    >>> stats.tokens["kernel"].item()
    4.0
    """
    check_expert_tokens("calibrate", expert_tokens, borrow)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibrate: batches is empty; give at least one calibration batch")
    axes = infer_axes(apply_fn, params, *arguments_of(first))
    watches = plan_watches(assign(params, config, axes), params, config, expert_tokens, borrow)
    compared = [path for path, watch in watches.items() if watch.needs & FLOAT_NEEDS]
    if compared and config.algorithm is not None:
        raise ValueError(
            f"calibrate: {config.algorithm.name!r} for {compared[0]} compares the quantized model with the float one,"
            " and here is the float one only; give quantize(...) apply_fn and batches"
        )
    return gather_statistics(apply_fn, params, itertools.chain([first], batches), watches)


def arguments_of(batch: Any) -> tuple:
    """What the model is called with beside its parameters."""
    return batch if isinstance(batch, tuple) else (batch,)


def gather_statistics(
    apply_fn: Callable[..., Any], params: Any, batches: Iterable[Any], watches: Mapping[str, Watch]
) -> Calibration:
    """Runs the float model over batches and adds up the statistics of each; see `calibrate`.

    Weights that always meet the same inputs share one set of statistics.
    """
    batches = iter(batches)
    first = next(batches)
    groups = group_weights(apply_fn, *split_arguments((params, *arguments_of(first)), {}), watches)
    observe = make_observer(apply_fn, {group[0]: watches[group[0]] for group in groups}, {})
    total = None
    for batch in itertools.chain([first], batches):
        form, arrays = split_arguments((params, *arguments_of(batch)), {})
        if total is None:
            total = empty_like(jax.eval_shape(functools.partial(observe, form), {}, arrays))
        total = observe(form, total, arrays)
    statistics = {path: total[group[0]] for group in groups for path in group} if total is not None else {}
    together = tuple(group for group in groups if len(group) > 1)
    return Calibration(statistics, {path: watch.axis for path, watch in watches.items()}, together)


def group_weights(
    apply_fn: Callable[..., Any], form: Form, arrays: list, watches: Mapping[str, Watch]
) -> list[tuple[str, ...]]:
    """The watched weights, together those that always meet the same inputs, found without computing anything.

    Raises:
        ValueError: a weight meets no input.
    """
    met: dict[str, list] = {}
    observe = make_observer(apply_fn, watches, met)
    check_reached(watches, jax.eval_shape(functools.partial(observe, form), {}, arrays))
    groups: dict[str, list[str]] = {}
    for path in watches:
        groups.setdefault(str(met.get(path, path)), []).append(path)
    return [tuple(group) for group in groups.values()]


def plan_watches(
    assignments: Mapping[str, Assignment],
    params: Any,
    config: QuantConfig,
    expert_tokens: str = "routed",
    borrow: float = 0.0,
) -> dict[str, Watch]:
    """What to gather for each weight that a configuration quantizes with the help of data."""
    watches = {}
    for path, leaf in named_leaves(params):
        chosen = assignments[path]
        if chosen.spec is not None and (needs := needed_statistics(config.algorithm, chosen.spec)):
            watches[path] = Watch(tuple(leaf.shape), chosen.axis, needs, expert_tokens, borrow)
    return watches


def check_reached(watches: Mapping[str, Watch], found: Mapping[str, Any]) -> None:
    """Raises where a weight met no input."""
    missing = [path for path in watches if path not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0]}{more}: no product of the model ever used this weight, so there are no statistics to quantize"
            f" it by; leave it with Rule({missing[0]!r}, None)"
        )


def make_observer(
    fn: Callable[..., Any], watches: Mapping[str, Watch], met: dict[str, list]
) -> Callable[[Form, dict[str, Statistics], list], dict[str, Statistics]]:
    """A jitted function that adds the statistics of one call, given as split arguments, to those of calls before.

    The sums stay in place. `met` is filled with what each weight is multiplied with.
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def observe(form: Form, held: dict[str, Statistics], arrays: list) -> dict[str, Statistics]:
        jaxpr = jax.make_jaxpr(lambda *arrays: form.call(fn, arrays))(*arrays)
        values = [
            track(array, path if path in watches else None) for array, path in zip(arrays, form.parameters, strict=True)
        ]
        observer = Observer(watches)
        _, emitted = observer.run(jaxpr, values)
        met.update(observer.met)
        seen = {path: _finished(path, observed, watches[path]) for path, observed in emitted.items()}
        return {path: merge_stacks(held[path], new) if path in held else new for path, new in seen.items()}

    return observe


def _finished(path: str, observed: Observation, watch: Watch) -> Statistics:
    """The statistics of a whole parameter, its stack and expert axes in front."""
    leading = tuple(range(-len(watch.shape), len(observed.lead) - len(watch.shape)))
    if observed.lead != leading:
        raise NotImplementedError(
            f"{path}: its matrices are stacked along axes {observed.lead}, and only leading ones are accepted; leave it"
            f" with Rule({path!r}, None)"
        )
    return observed.stats
