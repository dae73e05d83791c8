"""`fold_pre_scale`: input scales moved into the norm or linear layer before, where the traced program allows it."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._views import common_factors
from jaxquant.calibration._fold_uses import Index, Use, find_uses
from jaxquant.parameters._tree import is_quantized, map_named, named_leaves
from jaxquant.tracing._arguments import split_arguments
from jaxquant.tracing._control import aval
from jaxquant.tracing._flat import flatten_program

Part = tuple[str, Index]  # a parameter, or one layer of a stack
Found = list[tuple[Part, np.ndarray]]  # parts, and what to multiply each by, in the parameter's rank

UNCHANGED = ("convert_element_type", "copy", "stop_gradient", "optimization_barrier", "neg", "sharding_constraint")


def fold_pre_scale(apply_fn: Callable[..., Any], qparams: Any, *args: Any) -> Any:
    """Moves the `pre_scale` of weights into what makes their inputs: a norm's scale, or the linear layer before.

    An input scale stays where it is unless every reader of the input has the same one, and the input is a product or
    sum of parameters' outputs that nothing else reads: then multiplying those parameters by it gives the same inputs,
    but for the rounding of the parameters' own dtype. What cannot be shown so is left. A stack of layers that a scan
    goes over loses its input scales if every layer can.

    Args:
        apply_fn: the float model, called `apply_fn(params, *args)`.
        qparams: its quantized parameters, in plain layout.
        args: the rest of one call, arrays or `jax.ShapeDtypeStruct`; only shapes matter.

    Returns:
        The tree with fewer input scales.

    References:
        Xiao et al. 2022, arXiv:2211.10438, and Lin et al. 2023, arXiv:2306.00978 (both fold into the norm before).

    >>> from jaxquant._quantize import quantize
    >>> from jaxquant.arrays._spec import QuantConfig
    >>> from jaxquant.algorithms.awq import awq
    >>> model = lambda p, x: (x * jnp.expand_dims(p["scale"], 0)) @ p["kernel"]
    >>> params = {"scale": jnp.ones(128), "kernel": jnp.sin(jnp.arange(1024.0)).reshape(128, 8)}
    >>> x = jnp.cos(jnp.arange(512.0)).reshape(4, 128)
    >>> config = QuantConfig.preset("w4a16", algorithm=awq())
    >>> q = quantize(params, config, apply_fn=model, batches=[x])
    >>> q["kernel"].pre_scale is None, fold_pre_scale(model, q, x)["kernel"].pre_scale is None
    (False, True)
    """
    leaves = dict(named_leaves(qparams))
    scaled = {path for path, leaf in leaves.items() if _pre_scale(leaf) is not None}
    if not scaled:
        return qparams
    abstract = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype) if is_quantized(w) else w, qparams, is_leaf=is_quantized
    )
    form, arrays = split_arguments((abstract, *args), {})
    flat = flatten_program(apply_fn, form, arrays, scaled)
    found, folded = Folder(flat.jaxpr, form.parameters, leaves).run(find_uses(flat, form.parameters, scaled))
    return map_named(lambda path, leaf: _apply(leaf, found.get(path), path in folded), qparams)


def _pre_scale(leaf: Any) -> jax.Array | None:
    """What can be folded away; rows in float beside a base multiply the input as it comes."""
    return leaf.pre_scale if isinstance(leaf, QArray) and leaf.layout == "plain" else None


class Folder:
    """Follows an input back to the parameters that may take its scale."""

    def __init__(self, body: core.Jaxpr, paths: Sequence[str | None], leaves: Mapping[str, Any]) -> None:
        """Takes the flat program, the path of each of its inputs that is a parameter, and the parameters."""
        self.leaves = leaves
        self.parameters = {var: path for var, path in zip(body.invars, paths, strict=True) if path is not None}
        self.makers = {var: eqn for eqn in body.eqns for var in eqn.outvars}
        self.equations = {id(eqn): eqn for eqn in body.eqns}
        self.readers: dict[core.Var, list[int]] = {}
        for eqn in body.eqns:
            for atom in eqn.invars:
                if not isinstance(atom, core.Literal):
                    self.readers.setdefault(atom, []).append(id(eqn))
        for atom in body.outvars:
            if not isinstance(atom, core.Literal):
                self.readers.setdefault(atom, []).append(0)

    def run(self, uses: Sequence[Use]) -> tuple[dict[str, np.ndarray], set[str]]:
        """(what to multiply each parameter by, the weights that lose their scale)."""
        parts = Counter((use.path, use.index) for use in uses)
        by_input: dict[core.Var, list[Use]] = {}
        for use in uses:
            if use.dims is not None and use.var is not None and parts[use.path, use.index] == 1:
                by_input.setdefault(use.var, []).append(use)
        moves: list[tuple[Found, list[Part]]] = []
        for var, some in by_input.items():
            scales = [_layer(_pre_scale(self.leaves[use.path]), use.index) for use in some]
            factors = [_factor(scale, use.dims, aval(var).ndim) for scale, use in zip(scales, some, strict=True)]
            alike = all(np.array_equal(factor, factors[0]) for factor in factors)
            if alike and sorted(self.readers[var]) == sorted(id(use.eqn) for use in some):
                taken, held = self.absorb(var, factors[0]), {part for found, _ in moves for part, _ in found}
                if taken is not None and not any(part in held for part, _ in taken):
                    moves.append((taken, [(use.path, use.index) for use in some]))
        return self.gather(moves)

    def gather(self, moves: list[tuple[Found, list[Part]]]) -> tuple[dict[str, np.ndarray], set[str]]:
        """The same from moves of single layers, without those of stacks that keep some of their scales."""

        def whole(path: str) -> bool:
            folded = [index for _, parts in moves for name, index in parts if name == path]
            return len(folded) == math.prod(self.leaves[path].shape[own] for own, _ in folded[0])

        while any(odd := [not all(whole(path) for path, _ in parts) for _, parts in moves]):
            moves = [move for move, left in zip(moves, odd, strict=True) if not left]
        found: dict[str, np.ndarray] = {}
        for (path, index), factor in (each for taken, _ in moves for each in taken):
            found[path] = _placed(found.get(path), factor, index, self.leaves[path].shape)
        return found, {path for _, parts in moves for path, _ in parts}

    def absorb(self, var: core.Var | core.Literal, factor: np.ndarray) -> Found | None:
        """The parameters to multiply so that a variable is multiplied by a factor of its rank; None if none will do."""
        if isinstance(var, core.Literal):
            return None
        if var in self.parameters:
            path = self.parameters[var]
            return [((path, ()), factor)] if _takes(self.leaves[path], factor) else None
        eqn = self.makers.get(var)
        if eqn is None:
            return None
        name, operands = eqn.primitive.name, eqn.invars
        if name in UNCHANGED:
            return self.absorb_alone(operands[0], factor)
        if name in ("reshape", "squeeze", "expand_dims"):
            return self.absorb_alone(operands[0], _unreshape(factor, aval(operands[0]).shape, aval(var).shape))
        if name == "slice":
            return self.absorb_layer(eqn, factor)
        if name == "transpose":
            return self.absorb_alone(operands[0], factor.transpose(np.argsort(eqn.params["permutation"])))
        if name == "broadcast_in_dim":
            return self.absorb_spread(operands[0], factor, eqn.params["broadcast_dimensions"])
        if name in ("mul", "div"):
            candidates = operands if name == "mul" else operands[:1]
            return next((got for each in candidates if (got := self.absorb_alone(each, factor)) is not None), None)
        if name in ("add", "sub"):
            sides = [self.absorb_alone(each, factor) for each in operands]
            return None if None in sides else [pair for side in sides if side for pair in side]
        return self.absorb_product(eqn, factor) if name == "dot_general" else None

    def absorb_alone(self, var: core.Var | core.Literal, factor: np.ndarray) -> Found | None:
        """The same for a variable that only the equation behind it may read."""
        if isinstance(var, core.Literal) or len(self.readers[var]) > 1:
            return None
        return self.absorb(var, factor)

    def absorb_layer(self, eqn: core.JaxprEqn, factor: np.ndarray) -> Found | None:
        """The same for one layer of a stack, if the program takes nothing of it but single layers, each once."""
        stack = eqn.invars[0]
        if isinstance(stack, core.Literal) or stack not in self.parameters:
            return None
        path, picks = self.parameters[stack], [_pick(self.equations.get(n)) for n in self.readers[stack]]
        own = _pick(eqn)
        if own is None or None in picks or len(set(picks)) < len(picks) or not _takes(self.leaves[path], factor):
            return None
        return [((path, (own,)), factor)]

    def absorb_spread(self, var: core.Var | core.Literal, factor: np.ndarray, dims: Sequence[int]) -> Found | None:
        """The same for what is broadcast: the factor must not vary along new dimensions."""
        others = [d for d in range(factor.ndim) if d not in dims]
        if any(factor.shape[d] > 1 for d in others):
            return None
        inner = factor.squeeze(tuple(others))
        fits = all(n in (1, size) for n, size in zip(inner.shape, aval(var).shape, strict=True))
        return self.absorb_alone(var, inner) if fits else None

    def absorb_product(self, eqn: core.JaxprEqn, factor: np.ndarray) -> Found | None:
        """The same for a product: the operand that has all the factor's dimensions takes it."""
        contract, batch = eqn.params["dimension_numbers"]
        count = len(batch[0])
        start = count
        for place, var in enumerate(eqn.invars):
            shape = aval(var).shape
            free = [d for d in range(len(shape)) if d not in contract[place] and d not in batch[place]]
            own = [*range(count), *range(start, start + len(free))]
            start += len(free)
            if all(factor.shape[d] == 1 for d in range(factor.ndim) if d not in own):
                sizes = [1] * len(shape)
                inner = factor.squeeze(tuple(d for d in range(factor.ndim) if d not in own))
                order = [*batch[place], *free]
                for d, size in zip(order, inner.shape, strict=True):
                    sizes[d] = size
                return self.absorb_alone(var, inner.transpose(np.argsort(order)).reshape(sizes))
        return None


def _pick(eqn: core.JaxprEqn | None) -> tuple[int, int] | None:
    """(dimension, negative, and index) of an equation that takes one layer of a stack; None for any other."""
    if eqn is None or eqn.primitive.name != "slice":
        return None
    before, after = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
    cut = [d for d, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    if len(cut) != 1 or after[cut[0]] != 1:
        return None
    return cut[0] - len(before), eqn.params["start_indices"][cut[0]]


def _placed(held: np.ndarray | None, factor: np.ndarray, index: Index, shape: Sequence[int]) -> np.ndarray:
    """The factors of a parameter with those of one layer of it, or of the whole, put in."""
    picked, dims = dict(index), range(-factor.ndim, 0)
    sizes = tuple(shape[d] if d in picked else n for d, n in zip(dims, factor.shape, strict=True))
    held = np.ones(sizes, np.float32) if held is None else held
    whole = np.broadcast_to(held, np.broadcast_shapes(held.shape, sizes)).copy()
    whole[tuple(slice(picked[d], picked[d] + 1) if d in picked else slice(None) for d in dims)] = factor
    return whole


def _layer(scale: jax.Array | None, index: Index) -> jax.Array | None:
    """The input scale of one layer, its rank kept."""
    if scale is None:
        return None
    for own, at in index:
        scale = jax.lax.slice_in_dim(scale, at, at + 1, axis=scale.ndim + own)
    return scale


def _factor(scale: jax.Array | None, dims: Mapping[int, int] | None, rank: int) -> np.ndarray:
    """A weight's input scale as a factor of an input of some rank."""
    if scale is None or dims is None:
        raise ValueError("a use without an input scale cannot be folded")
    order = [scale.ndim + dims[d] for d in sorted(dims)]
    rest = [d for d in range(scale.ndim) if d not in order]
    sizes = [scale.shape[scale.ndim + dims[d]] if d in dims else 1 for d in range(rank)]
    return np.asarray(scale, np.float32).transpose([*rest, *order]).reshape(sizes)


def _unreshape(factor: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """A factor of a reshaped array, as one of the array."""
    sizes, full = [1] * len(before), list(factor.shape)
    for old, new in common_factors(before, after):
        if any(factor.shape[d] > 1 for d in new):
            for d in new:
                full[d] = after[d]
            for d in old:
                sizes[d] = before[d]
    return np.broadcast_to(factor, full).reshape(sizes)


def _takes(leaf: Any, factor: np.ndarray) -> bool:
    """Whether a parameter can be multiplied by a factor: a quantized one by its scales only."""
    if not is_quantized(leaf):
        return jnp.issubdtype(leaf.dtype, jnp.floating)
    base = leaf.base if isinstance(leaf, OutlierArray) else leaf
    return base.layout == "plain" and all(
        n in (1, cells) for n, cells in zip(factor.shape, base.scale.shape, strict=True)
    )


def _apply(leaf: Any, factor: np.ndarray | None, folded: bool) -> Any:
    """A parameter without its own input scale, multiplied by another's."""
    if not is_quantized(leaf):
        return leaf if factor is None else (leaf.astype(jnp.float32) * factor).astype(leaf.dtype)
    base = leaf.base if isinstance(leaf, OutlierArray) else leaf
    base = dataclasses.replace(base, pre_scale=None) if folded else base
    if factor is not None:
        base = dataclasses.replace(base, scale=(base.scale.astype(jnp.float32) * factor).astype(base.scale.dtype))
    if not isinstance(leaf, OutlierArray):
        return base
    rows = leaf.rows if factor is None else (leaf.rows.astype(jnp.float32) * factor).astype(leaf.rows.dtype)
    return OutlierArray(base, rows, leaf.index)
