"""`quantize` and `dequantize`: parameter trees in, parameter trees out."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
from jax.core import Tracer

from jaxquant.algorithms._statistics import FLOAT_NEEDS
from jaxquant.arrays._numerics import all_finite
from jaxquant.arrays._outliers import dequantize_weight
from jaxquant.arrays._packing import plain
from jaxquant.arrays._qarray import QArray, quantize_array
from jaxquant.arrays._spec import QuantConfig, QuantSpec
from jaxquant.calibration._calibrate import Calibration, arguments_of, check_reached, gather_statistics, plan_watches
from jaxquant.calibration._calibrated import Job, not_finite
from jaxquant.calibration._expert_rows import check_expert_tokens
from jaxquant.calibration._observe import Watch
from jaxquant.calibration._report import WeightReport, show_progress
from jaxquant.calibration._resume import Finished, open_finished
from jaxquant.calibration._sequential import abstract_tree, walk_model
from jaxquant.parameters._lazy import load_leaf
from jaxquant.parameters._rules import Assignment, assign
from jaxquant.parameters._tree import is_quantized, map_named, named_leaves
from jaxquant.tracing._infer import infer_axes


def quantize(
    params: Any,
    config: QuantConfig,
    *,
    apply_fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    stats: Calibration | None = None,
    sequential: bool | None = None,
    offload: bool = False,
    unseen: Literal["error", "rtn"] = "error",
    expert_tokens: Literal["routed", "all"] = "routed",
    borrow: float = 0.0,
    report: Callable[[WeightReport], Any] | None = None,
    resume: str | pathlib.Path | None = None,
) -> Any:
    """Quantizes the weights of a parameter tree.

    Without an algorithm that needs data, weights are rounded to the nearest codes and `params` and `config` are enough.
    With one, the model and calibration batches (or the statistics that `calibrate` made of them) go beside. Given the
    model, contracting axes come from its own products, else from Flax's conventions.

    Everything is checked before the first weight is touched; weights are then quantized one by one, so that beside the
    result no more than one weight lives twice. Each shape and spec is compiled once.

    Args:
        params: pytree of arrays (NumPy, memory-mapped or device): a linen dict, an nnx State, any pytree.
        config: which parameters, how, and by which algorithm.
        apply_fn: the float model, called `apply_fn(params, batch)`, or `apply_fn(params, *batch)` for a tuple.
        batches: calibration inputs.
        stats: what `calibrate` returned for this configuration, instead of the two above.
        sequential: True quantizes each weight from inputs that the quantized layers before it made, in one pass over
            the model; False from the float model's inputs, in one program; None takes True where the algorithm
            compensates for its inputs' deviation, which False cannot.
        offload: a sequential pass keeps activations in the host's memory.
        unseen: what becomes of an expert that no calibration token reached: an error, or round-to-nearest with a note
            in the report.
        expert_tokens: what an expert is calibrated by, as `calibrate` takes it.
        borrow: the weight of the other experts' tokens, as `calibrate` takes it.
        report: called with a `WeightReport` for each calibrated weight as it is finished; a `Report` collects them.
        resume: a folder in which each calibrated weight is kept as it is finished; a second run of the same
            configuration, parameters and batches goes on from there, to the same bits.

    Returns:
        A tree of the same structure with a `QArray` for each quantized weight (an `OutlierArray` where channels stay in
        float); other leaves are the caller's own.

    Raises:
        ValueError: an empty tree, an unmatched rule, a group that does not divide, a zero-size weight, NaN or Inf, data
            that the algorithm needs and that was not given, a weight or expert that no input reached. The message names
            the parameter.
        TypeError: a leaf that is no array.
        NotImplementedError: a weight is used in a way whose statistics cannot be gathered.

    >>> import jax.numpy as jnp
    >>> qparams = quantize({"dense": {"kernel": jnp.ones((256, 64))}}, QuantConfig.preset("w4a16"))
    >>> qparams["dense"]["kernel"]
    QArray(int4[256, 64], axis=(-2,), scale=[2, 64], plain)
    """
    if unseen not in ("error", "rtn"):
        raise ValueError(f"quantize: unseen={unseen!r}; accepted: 'error', 'rtn'")
    check_expert_tokens("quantize", expert_tokens, borrow)
    if stats is not None and (borrow or expert_tokens != "routed"):
        raise ValueError("quantize: stats were gathered already; give expert_tokens and borrow to calibrate")
    first, batches = _peek(batches)
    axes = stats.axes if stats is not None else _axes(apply_fn, abstract_tree(params), first)
    assignments = assign(params, config, axes)
    for path, leaf in named_leaves(params):
        check_fits(path, leaf, assignments[path])
    watches = plan_watches(assignments, params, config, expert_tokens, borrow)
    if watches and stats is None and (apply_fn is None or first is None):
        given = "quantize(..., apply_fn=model.apply, batches=...), or stats=calibrate(...)"
        raise missing_data(next(iter(watches)), config, given)
    walked = _walks(sequential, watches, stats)
    emit = _listener(report, sum(chosen.spec is not None for chosen in assignments.values()))
    form = "walk" if walked else "float"
    form += f", expert_tokens={expert_tokens}, borrow={borrow}" if borrow or expert_tokens != "routed" else ""
    kept = None if resume is None else _open(resume, config, watches, form)
    job = Job(config.algorithm, assignments, unseen, emit, kept)
    if walked and apply_fn is not None:
        tuning = config.algorithm.tuning if config.algorithm is not None else None
        done = walk_model(apply_fn, params, batches, watches, job, offload=offload, tuning=tuning)
        seen = Calibration({}, {})
    else:
        done = {path: weight for path in watches if (weight := job.restore(path)) is not None}
        left = {path: watch for path, watch in watches.items() if path not in done}
        seen = _statistics(apply_fn, params, batches, left, stats)
    leaves, groups = dict(named_leaves(params)), {path: group for group in seen.groups for path in group}

    def quantize_leaf(path: str, leaf: Any) -> Any:
        chosen = assignments[path]
        if chosen.spec is None:
            return leaf
        if path in done:
            return done.pop(path)
        if config.algorithm is None and path not in watches:
            return _round_to_nearest(path, load_leaf(leaf), chosen.spec, chosen.axis)
        paths = [name for name in groups.get(path, (path,)) if name not in done]
        if len(paths) > 1 and not job.joins(paths, [leaves[name].shape for name in paths]):
            paths = [path]
        weights = [load_leaf(leaves[name]) for name in paths]
        done.update(zip(paths, job.quantize(paths, paths, weights, seen.statistics.get(path)), strict=True))
        return done.pop(path)

    return map_named(quantize_leaf, params)


def _open(resume: str | pathlib.Path, config: QuantConfig, watches: Mapping[str, Watch], form: str) -> Finished:
    return open_finished(resume, config, {path: watch.shape for path, watch in watches.items()}, form)


def _statistics(
    apply_fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any],
    watches: Mapping[str, Watch],
    stats: Calibration | None,
) -> Calibration:
    """The statistics of the watched weights: those given, or gathered now."""
    if stats is not None:
        check_reached(watches, stats.statistics)
        return stats
    if watches and apply_fn is not None:
        return gather_statistics(apply_fn, params, batches, watches)
    return Calibration({}, {})


def _walks(sequential: bool | None, watches: Mapping[str, Watch], stats: Calibration | None) -> bool:
    """Whether to walk; an algorithm that compares two models must."""
    compared = [path for path, watch in watches.items() if watch.needs & FLOAT_NEEDS]
    if compared and (sequential is False or stats is not None):
        given = "stats" if stats is not None else "sequential=False"
        raise ValueError(
            f"quantize: the algorithm for {compared[0]} compares the quantized model's activations with the float one's"
            f", and {given} has only those: give apply_fn and batches, and leave sequential out"
        )
    if sequential and stats is not None:
        raise ValueError("quantize: sequential=True gathers its own statistics; give apply_fn and batches, not stats")
    return bool(watches) and (bool(compared) if sequential is None else sequential)


def _peek(batches: Iterable[Any] | None) -> tuple[Any, Iterable[Any]]:
    """The first batch, or None, and all of them."""
    rest = iter(batches if batches is not None else ())
    first = next(rest, None)
    return first, itertools.chain([] if first is None else [first], rest)


def _axes(apply_fn: Callable[..., Any] | None, params: Any, first: Any) -> Mapping[str, tuple[int, ...]] | None:
    if apply_fn is None:
        return None
    if first is None:
        raise ValueError("quantize: apply_fn is traced on a batch, so give batches= too, with at least one")
    return infer_axes(apply_fn, params, *arguments_of(first))


def missing_data(path: str, config: QuantConfig, remedy: str) -> ValueError:
    """What to raise for a weight that is quantized with the help of data where there are none."""
    what = f"algorithm {config.algorithm.name!r}" if config.algorithm is not None else "a static activation scale"
    return ValueError(f"{path}: {what} needs calibration; give {remedy}")


def _listener(report: Callable[[WeightReport], Any] | None, total: int) -> Callable[[WeightReport], None]:
    """Hands rows to the caller and a line to the terminal."""
    count = itertools.count(1)

    def emit(row: WeightReport) -> None:
        show_progress(row, next(count), total)
        if report is not None:
            report(row)

    return emit


def check_fits(path: str, leaf: Any, chosen: Assignment) -> None:
    """Raises now, with the path, what quantizing this leaf would fail by later; it needs its shape and dtype only."""
    if chosen.spec is None:
        return
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{path}: quantize reads its weights, so it cannot be traced by jit, vmap or grad; call it outside"
        )
    if 0 in leaf.shape:
        raise ValueError(
            f"{path}: shape {tuple(leaf.shape)} has an axis of zero size; leave it with Rule({path!r}, None)"
        )
    if len(leaf.shape) < -chosen.axis[0]:
        raise ValueError(
            f"{path}: axis {chosen.axis} does not exist in shape {tuple(leaf.shape)}; give Rule(..., axis=)"
        )
    try:
        _quantize_checked.eval_shape(_abstract(leaf), chosen.spec, chosen.axis)  # traced once for all alike
    except ValueError as error:
        raise ValueError(f"{path}: {error}; or leave it with Rule({path!r}, None)") from error


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype a leaf has on the device: float64 is float32 there, unless 64-bit mode is on."""
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


@functools.partial(jax.jit, static_argnames=("spec", "axis"))
def _quantize_checked(w: jax.Array, spec: QuantSpec, axis: tuple[int, ...]) -> tuple[QArray, jax.Array]:
    return quantize_array(w, spec, axis), all_finite(w)


def _round_to_nearest(path: str, leaf: Any, spec: QuantSpec, axis: tuple[int, ...]) -> QArray:
    quantized, finite = _quantize_checked(leaf, spec, axis)
    if not finite:  # waiting here also bounds the memory in flight to one weight
        raise not_finite(path, leaf)
    return quantized


def dequantize(qparams: Any) -> Any:
    """Gives the float tree that a quantized tree stands for.

    Args:
        qparams: a tree with quantized weights.

    Returns:
        The same tree with a float array, of the original dtype, for each quantized weight.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((128, 8))}
    >>> dequantize(quantize(params, QuantConfig.preset("w8a16")))["kernel"].dtype
    dtype('float32')
    """
    dequantize_jit = jax.jit(lambda q: dequantize_weight(plain(q)))
    return jax.tree.map(
        lambda leaf: dequantize_jit(leaf) if is_quantized(leaf) else leaf, qparams, is_leaf=is_quantized
    )
