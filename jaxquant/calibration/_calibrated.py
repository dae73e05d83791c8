"""One weight from its statistics to its quantized form and its report."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.algorithms._apply import quantize_weight
from jaxquant.algorithms._block_rounding import Run, train_block
from jaxquant.algorithms._statistics import Statistics
from jaxquant.algorithms._transform import WeightTransform
from jaxquant.arrays import _views
from jaxquant.arrays._numerics import all_finite
from jaxquant.arrays._outliers import OutlierArray, dequantize_weight
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._spec import PerChannel, PerGroup
from jaxquant.calibration._report import WeightReport, make_row, retrained_row, signal_to_noise
from jaxquant.calibration._resume import Finished
from jaxquant.parameters._rules import Assignment


@dataclasses.dataclass(frozen=True)
class Job:
    """What quantizing every weight of one run has in common.

    Attributes:
        algorithm: what rounds; None is round-to-nearest.
        assignments: spec and contracting axes by path.
        unseen: `"error"` or `"rtn"`: what becomes of matrices that no token reached.
        emit: told the report of each weight.
        finished: weights of an interrupted run, or None.
        waiting: weights with their reports, of a block that is still to be trained.
    """

    algorithm: WeightTransform | None
    assignments: Mapping[str, Assignment]
    unseen: str
    emit: Callable[[WeightReport], None]
    finished: Finished | None
    waiting: dict[str, tuple[QArray | OutlierArray, WeightReport]] = dataclasses.field(default_factory=dict)

    def restore(self, name: str) -> QArray | OutlierArray | None:
        """A weight that an interrupted run finished, or None."""
        if self.finished is None or name not in self.finished:
            return None
        weight, row = self.finished.get(name)
        self.emit(row)
        return weight

    def joins(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether weights that meet the same inputs may be quantized as one, side by side."""
        chosen = self.assignments[paths[0]]
        alike = all(_same_form(self.assignments[path], chosen) for path in paths)
        spec = chosen.spec
        return (
            alike
            and spec is not None
            and join_dim(shapes, chosen.axis) is not None
            and (isinstance(spec.weight.granularity, PerChannel | PerGroup))
        )

    def quantize(
        self, paths: Sequence[str], names: Sequence[str], leaves: Sequence[Any], stats: Statistics | None
    ) -> list[QArray | OutlierArray]:
        """Quantizes a weight, or several side by side that meet the same inputs.

        Args:
            paths: the parameters.
            names: in reports: the paths, and which layer of a stack.
            leaves: the float arrays.
            stats: statistics of their inputs, or None where nothing is needed.

        Returns:
            The quantized weights.

        Raises:
            ValueError: a weight holds NaN or Inf, or a matrix of it saw no token and `unseen` is `"error"`.
        """
        made = quantize_calibrated(names, leaves, self.assignments[paths[0]], self.algorithm, stats, self.unseen)
        self.waiting.update(zip(names, made, strict=True))
        if self.algorithm is None or self.algorithm.tuning is None:
            self._finish()
        return [weight for weight, _ in made]

    def is_kept(self, name: str) -> bool:
        """Whether an interrupted run finished a weight."""
        return self.finished is not None and name in self.finished

    def train(
        self, names: Sequence[str], floats: Sequence[jax.Array], run: Run, inputs: Sequence[Any], targets: Sequence[Any]
    ) -> dict[str, QArray | OutlierArray]:
        """Trains the rounded weights of a block together, and finishes those and all others that wait.

        Args:
            names: of the weights.
            floats: the float arrays.
            run: the block.
            inputs: for each batch what `run` takes beside the weights.
            targets: for each batch the outputs wanted.

        Returns:
            The trained weights.
        """
        if self.algorithm is None or self.algorithm.tuning is None:
            raise ValueError("Job.train: the algorithm trains nothing")
        if names:
            start = time.perf_counter()
            weights = [self.waiting[name][0] for name in names]
            trained = train_block(run, self.algorithm.tuning, weights, floats, inputs, targets)
            seconds = (time.perf_counter() - start) / len(names)
            errors = {"block_error_before": trained.before, "block_error": trained.after}
            for name, weight, w in zip(names, trained.weights, floats, strict=True):
                row = self.waiting[name][1]
                ratio = float(signal_to_noise(w, _dequantize(weight)))
                self.waiting[name] = weight, retrained_row(row, ratio, errors, seconds)
        made = {name: weight for name, (weight, _) in self.waiting.items()}
        self._finish()
        return made

    def _finish(self) -> None:
        """Keeps and reports what waits."""
        for name, (weight, row) in self.waiting.items():
            if self.finished is not None:
                self.finished.put(name, weight, row)
            self.emit(row)
        self.waiting.clear()


def _same_form(a: Assignment, b: Assignment) -> bool:
    return (a.spec, a.axis) == (b.spec, b.axis)


def join_dim(shapes: Sequence[tuple[int, ...]], axis: tuple[int, ...]) -> int | None:
    """The output dimension, negative, along which weights can lie side by side; None where there is none.

    >>> join_dim([(8, 4, 16), (8, 2, 16)], (-3,))
    -2
    """
    rank = len(shapes[0])
    if any(len(shape) != rank for shape in shapes):
        return None
    odd = [d for d in range(-rank, 0) if len({shape[d] for shape in shapes}) > 1]
    outputs = [d for d in range(axis[0], 0) if d not in axis] or [d for d in range(-rank, axis[0])][-1:]
    held = [d for d in outputs if set(odd) <= {d}]
    return held[-1] if held else None


def quantize_calibrated(
    names: Sequence[str],
    leaves: Sequence[Any],
    chosen: Assignment,
    algorithm: WeightTransform | None,
    stats: Statistics | None,
    unseen: str,
) -> list[tuple[QArray | OutlierArray, WeightReport]]:
    """Quantizes weights that meet the same inputs by an algorithm; see `Job.quantize`."""
    start = time.perf_counter()
    spec, path = chosen.spec, names[0]
    if spec is None:
        raise ValueError(f"{path}: left in float")
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    for name, w in zip(names, arrays, strict=True):
        if not _all_finite(w):
            raise not_finite(name, w)
    dim = join_dim([w.shape for w in arrays], chosen.axis) if len(arrays) > 1 else None
    joined = arrays[0] if dim is None else jnp.concatenate(arrays, dim)
    batch_dims = 0 if stats is None else stats.count.ndim
    options = {"axis": chosen.axis, "batch_dims": batch_dims}
    quantized, numbers = quantize_weight(joined, spec, algorithm, stats, **options)
    note = "" if dim is None else f"side by side with {len(arrays) - 1} more"
    if spec.activation is not None and np.any(np.asarray(numbers.get("outliers_left", 0)) > 0):
        spec, note = dataclasses.replace(spec, activation=None), "more outliers than places: its inputs stay in float"
        quantized, numbers = quantize_weight(joined, spec, algorithm, stats, **options)
    if stats is not None and not np.all(seen := np.asarray(stats.count) > 0):
        note = _note_unseen(path, seen, unseen)
        if spec.activation is not None and spec.activation.static:
            raise ValueError(f"{path}: {note}, so there is no static activation scale for it; give more batches")
        nearest, _ = quantize_weight(joined, spec, None, None, **options)
        quantized = _replace_unseen(quantized, nearest, jnp.asarray(seen))
    parts = [quantized] if dim is None else _split(quantized, dim, tuple(w.shape[dim] for w in arrays))
    ratios = [float(signal_to_noise(w, _dequantize(q))) for w, q in zip(arrays, parts, strict=True)]  # waits for them
    name, seconds = algorithm.name if algorithm is not None else "", (time.perf_counter() - start) / len(parts)
    rows = [make_row(n, name or "rtn", r, numbers, seconds, note) for n, r in zip(names, ratios, strict=True)]
    return list(zip(parts, rows, strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _split(w: QArray | OutlierArray, dim: int, sizes: tuple[int, ...]) -> list[QArray | OutlierArray]:
    """Takes weights that lie side by side apart."""
    parts, start = [], 0
    for size in sizes:
        if isinstance(w, OutlierArray):
            base = _views.slice_dim(w.base, w.ndim + dim, start, start + size)
            rows = jax.lax.slice_in_dim(w.rows, start, start + size, axis=w.ndim + dim)
            parts.append(OutlierArray(base, rows, w.index))
        else:
            parts.append(_views.slice_dim(w, w.ndim + dim, start, start + size))
        start += size
    return parts


_all_finite = jax.jit(all_finite)
_dequantize = jax.jit(dequantize_weight)


def _note_unseen(path: str, seen: np.ndarray, unseen: str) -> str:
    """What to say of matrices that no token reached.

    Raises:
        ValueError: the caller wants none of them.
    """
    if seen.ndim == 0:
        raise ValueError(f"{path}: calibration saw no input of this weight at all; give batches that reach it")
    missing = [tuple(map(int, index)) if seen.ndim > 1 else int(index[0]) for index in np.argwhere(~seen)]
    note = f"{len(missing)} of {seen.size} matrices saw no token"
    if unseen == "error":
        raise ValueError(
            f"{path}: {note}: {', '.join(map(str, missing[:8]))}; give more calibration batches, or unseen='rtn' to"
            " round them to nearest"
        )
    return f"{note} and are rounded to nearest"


def _replace_unseen(quantized: QArray | OutlierArray, nearest: Any, seen: jax.Array) -> QArray | OutlierArray:
    """Puts round-to-nearest, a QArray, in place of the matrices that no token reached."""

    def choose(leaf: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(seen.reshape(*seen.shape, *[1] * (leaf.ndim - seen.ndim)), leaf, other)

    def replace(q: QArray) -> QArray:
        fields = {name: getattr(q, name) for name in ("qvalue", "scale", "zero_point")}
        new = {name: choose(leaf, getattr(nearest, name)) for name, leaf in fields.items() if leaf is not None}
        if q.pre_scale is not None:
            new["pre_scale"] = choose(q.pre_scale, jnp.ones_like(q.pre_scale))
        return dataclasses.replace(q, **new)

    if isinstance(quantized, OutlierArray):
        nowhere = jnp.full_like(quantized.index, np.prod([quantized.shape[a] for a in quantized.base.axis]))
        rows = choose(quantized.rows, jnp.zeros_like(quantized.rows))
        return OutlierArray(replace(quantized.base), rows, choose(quantized.index, nowhere))
    return replace(quantized)


def not_finite(path: str, leaf: Any) -> ValueError:
    """The error for a weight that holds NaN or Inf: says how many and where the first is."""
    bad = ~jnp.isfinite(jnp.asarray(leaf))
    first = tuple(int(i) for i in jnp.unravel_index(jnp.argmax(bad), bad.shape))
    return ValueError(
        f"{path}: {int(bad.sum())} of {bad.size} values are NaN or Inf, the first at index {first}; finite weights"
        f" are accepted: repair the checkpoint, or leave it with Rule({path!r}, None)"
    )
