"""Evaluates a jaxpr whose parameters are quantized, and writes down what became of each."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
from jax.extend import core

from jaxquant.arrays import _packed, _views
from jaxquant.arrays._outliers import view_weight
from jaxquant.arrays._packing import plain
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._views import Unrepresentable
from jaxquant.products._launches import multiply_siblings
from jaxquant.tracing._interpreter import Frame, Interpreter, Value, result_of
from jaxquant.tracing._norms import rms_norm_of
from jaxquant.tracing._siblings import in_steps
from jaxquant.tracing._weight_rules import RULES, kernel_product
from jaxquant.tracing._weights import Shifted, Weight, cut_shards, dense

OnDense = Literal["record", "error"]


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that met a quantized weight.

    Attributes:
        path: the parameter.
        op: the primitive.
        implementation: `"xla"`, a kernel's name, or `"DENSE"` where the weight was dequantized.
        reason: why it was dequantized, or not given to a kernel, else empty.
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

    rules = RULES

    def __init__(self, on_dense: OnDense = "record") -> None:
        """Takes what to do where a weight would be dequantized."""
        self.on_dense = on_dense
        self.uses: dict[tuple, Use] = {}

    def is_special(self, value: Value) -> bool:
        """Weights, alone or in a sum."""
        return isinstance(value, Weight | Shifted)

    def steps(self, eqns: Sequence[core.JaxprEqn]) -> Iterable[Sequence[core.JaxprEqn]]:
        """Brings products of one activation together."""
        return in_steps(eqns)

    def apply_step(self, frame: Frame, eqns: Sequence[core.JaxprEqn]) -> list[Sequence[Value]]:
        """Multiplies siblings in one launch where their weights are packed for it; the rules find the products."""
        siblings: dict[int, tuple[Value, list]] = {}
        for eqn in eqns:
            found = kernel_product(self, frame, eqn)
            if found is not None:
                atom, product = found
                x = frame.read(atom)
                siblings.setdefault(id(x), (x, []))[1].append(product)
                norm = rms_norm_of(frame, atom)
                if norm is not None:
                    frame.region.shared["norm", id(x)] = x, norm
        for x, products in siblings.values():
            if len(products) > 1:
                multiply_siblings(x, products, frame.region.shared)
        return super().apply_step(frame, eqns)

    def apply(self, frame: Frame, eqn: core.JaxprEqn, values: list[Value]) -> Sequence[Value]:
        """Converts an activation to a dtype once: what comes of it is then one activation for all weights."""
        if eqn.primitive.name != "convert_element_type" or self.is_special(values[0]):
            return super().apply(frame, eqn, values)
        key = "converted", id(values[0]), result_of(eqn)
        if key not in frame.region.shared:
            frame.region.shared[key] = values[0], super().apply(frame, eqn, values)
        return frame.region.shared[key][1]

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

        def with_leading(q: QArray) -> QArray:
            return _views.with_leading(q if _packed.stack_dims(q) else plain(q))

        try:
            if isinstance(value, Shifted):
                weight = Weight(view_weight(value.weight.array, with_leading), value.path)
                return Shifted(weight, value.total_delta(weight.array.dtype))
            return Weight(view_weight(value.array, with_leading), value.path)
        except Unrepresentable:
            return None

    def shards(self, value: Value, spec: Any, mesh: Any) -> tuple[Value, Any, Callable] | None:
        """Cuts codes and grids alike."""
        return cut_shards(value, spec, mesh) if isinstance(value, Weight) else None
