"""One weight from its statistics to its quantized form and its report."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant._numerics import all_finite
from jaxquant._outliers import OutlierArray, dequantize_weight
from jaxquant._qarray import QArray
from jaxquant._report import WeightReport, make_row, signal_to_noise
from jaxquant._resume import Finished
from jaxquant._rules import Assignment
from jaxquant._statistics import Statistics
from jaxquant.algorithms._apply import quantize_weight
from jaxquant.algorithms._transform import WeightTransform


@dataclasses.dataclass(frozen=True)
class Job:
    """What quantizing every weight of one run has in common.

    Attributes:
        algorithm: what rounds; None is round-to-nearest.
        assignments: spec and contracting axes by path.
        unseen: `"error"` or `"rtn"`: what becomes of matrices that no token reached.
        emit: told the report of each weight.
        finished: weights of an interrupted run, or None.
    """

    algorithm: WeightTransform | None
    assignments: Mapping[str, Assignment]
    unseen: str
    emit: Callable[[WeightReport], None]
    finished: Finished | None

    def restore(self, name: str) -> QArray | OutlierArray | None:
        """A weight that an interrupted run finished, or None."""
        if self.finished is None or name not in self.finished:
            return None
        weight, row = self.finished.get(name)
        self.emit(row)
        return weight

    def quantize(self, path: str, name: str, leaf: Any, stats: Statistics | None) -> QArray | OutlierArray:
        """Quantizes a weight, or a part of one.

        Args:
            path: the parameter.
            name: in reports: the path, and which layer of a stack.
            leaf: the float array.
            stats: statistics of its inputs, or None where nothing is needed.

        Returns:
            The quantized weight.

        Raises:
            ValueError: the weight holds NaN or Inf, or a matrix of it saw no token and `unseen` is `"error"`.
        """
        weight, row = quantize_calibrated(name, leaf, self.assignments[path], self.algorithm, stats, self.unseen)
        if self.finished is not None:
            self.finished.put(name, weight, row)
        self.emit(row)
        return weight


def quantize_calibrated(
    path: str,
    leaf: Any,
    chosen: Assignment,
    algorithm: WeightTransform | None,
    stats: Statistics | None,
    unseen: str,
) -> tuple[QArray | OutlierArray, WeightReport]:
    """Quantizes one weight by an algorithm; see `Job.quantize`."""
    start = time.perf_counter()
    spec = chosen.spec
    if spec is None:
        raise ValueError(f"{path}: left in float")
    w = jnp.asarray(leaf)
    if not _all_finite(w):
        raise not_finite(path, w)
    batch_dims = 0 if stats is None else stats.count.ndim
    options = {"axis": chosen.axis, "batch_dims": batch_dims}
    quantized, numbers = quantize_weight(w, spec, algorithm, stats, **options)
    note = ""
    if stats is not None and not np.all(seen := np.asarray(stats.count) > 0):
        note = _note_unseen(path, seen, unseen)
        if spec.activation is not None and spec.activation.static:
            raise ValueError(f"{path}: {note}, so there is no static activation scale for it; give more batches")
        nearest, _ = quantize_weight(w, spec, None, None, **options)
        quantized = _replace_unseen(quantized, nearest, jnp.asarray(seen))
    ratio = float(signal_to_noise(w, _dequantize(quantized)))  # waits, so that no more than one weight is in flight
    name = algorithm.name if algorithm is not None else "rtn"
    return quantized, make_row(path, name or "rtn", ratio, numbers, time.perf_counter() - start, note)


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
