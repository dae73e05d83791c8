"""Sequential calibration: the flat program, its plan and its walk, put together."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxquant.algorithms._transform import BlockTuning
from jaxquant.calibration._calibrate import arguments_of, check_reached
from jaxquant.calibration._lanes import Inputs
from jaxquant.calibration._observe import Watch
from jaxquant.calibration._plan import plan_walk
from jaxquant.calibration._tuned_walk import TunedWalk
from jaxquant.calibration._walk import Quantizer, Walk, stack_units
from jaxquant.parameters._lazy import LazyArray
from jaxquant.parameters._tree import map_named, named_leaves
from jaxquant.tracing._arguments import split_arguments
from jaxquant.tracing._flat import flatten_program


def walk_model(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    watches: Mapping[str, Watch],
    quantizer: Quantizer,
    *,
    offload: bool = False,
    tuning: BlockTuning | None = None,
) -> dict[str, Any]:
    """Quantizes each watched weight when the walk reaches it.

    Args:
        apply_fn: the float model.
        params: its parameters; leaves may be lazy.
        batches: calibration inputs, all of one form.
        watches: what to gather, by path.
        quantizer: makes quantized weights.
        offload: whether activations wait in the host's memory.
        tuning: how the weights of a block are trained together, or None to train none.

    Returns:
        The quantized weights by path.

    Raises:
        ValueError: batches of different shapes; a weight that no product reached.
        NotImplementedError: a weight used in a way that cannot be walked.
    """
    abstract = abstract_tree(params)
    count = len(split_arguments((abstract,), {})[1])
    calls = [split_arguments((abstract, *arguments_of(batch)), {}) for batch in batches]
    form, arrays = calls[0]
    lanes = [call[1][count:] for call in calls]
    shapes = [(call[0], [(x.shape, x.dtype) for x in lane]) for call, lane in zip(calls, lanes, strict=True)]
    odd = next((n for n, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"quantize: batch {odd} has shapes {shapes[odd][1]}, the first has {shapes[0][1]}; a sequential walk takes"
            " batches of one shape: pad or drop the last"
        )
    flat = flatten_program(apply_fn, form, arrays, watches)
    plan = plan_walk(flat, form.parameters, watches)
    check_reached(watches, {unit.path: unit for meet in plan.meets for unit in meet.units})
    parameters = {path: leaf for path, leaf in named_leaves(params) if hasattr(leaf, "shape")}
    start = (flat, plan, watches, Inputs(parameters, lanes, offload), quantizer)
    done = (Walk(*start) if tuning is None else TunedWalk(*start, tuning=tuning)).run()
    check_reached(watches, {unit.path: unit for unit in done})  # a branch may hold a weight and never multiply it
    return {path: stack_units(done, path, watch.shape) for path, watch in watches.items()}


def abstract_tree(params: Any) -> Any:
    """The tree with a shape and dtype for each lazy leaf."""
    return map_named(
        lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, LazyArray) else leaf, params
    )
