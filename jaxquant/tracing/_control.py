"""How control flow carries special values: each higher-order primitive re-issued with the interpreter as its body."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend import core

if TYPE_CHECKING:
    from jaxquant.tracing._interpreter import Frame, Interpreter

_KEPT = "control flow cannot keep it quantized: it comes out in another form than it went in"


def close(jaxpr: Any) -> core.ClosedJaxpr:
    """A sub-jaxpr of an equation with its constants, whether or not it came with them."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, [])


def inline(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, values: list) -> list:
    """Evaluates the body of a call in its caller's region."""
    body = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
    return interpreter.evaluate(close(body), values, frame.region, (*frame.stack, id(eqn)))


def _checkpoint(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, values: list) -> list:
    params = eqn.params
    if params["differentiated"]:
        return inline(interpreter, frame, eqn, values)

    def body(*values: Any) -> tuple[list, dict]:
        return interpreter.run(close(params["jaxpr"]), values, (*frame.stack, id(eqn)))

    outs, emitted = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])(*values)
    _absorb(interpreter, frame, emitted)
    return outs


def _absorb(interpreter: "Interpreter", frame: "Frame", emitted: dict) -> None:
    for name, value in emitted.items():
        interpreter.emit(frame, name, value)


def _arrays(values: Sequence, atoms: Sequence, interpreter: "Interpreter") -> list:
    """Loop carries as arrays of the dtype their variables have: a literal is a Python or NumPy scalar."""
    return [
        value
        if interpreter.is_special(value)
        else jnp.asarray(value, atom.aval.dtype)
        if not isinstance(value, jax.Array)
        else value
        for value, atom in zip(values, atoms, strict=True)
    ]


def _same_form(a: Any, b: Any) -> bool:
    """Whether two values are pytrees of equal structure, shapes and dtypes."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _settle(
    interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, carry: list, step: Callable[[list], list]
) -> list:
    """Lowers what a loop carry holds until one step gives every special value back in the form it came."""
    while any(map(interpreter.is_special, carry)):
        after = jax.eval_shape(step, carry)
        changed = [interpreter.is_special(a) and not _same_form(a, b) for a, b in zip(carry, after, strict=True)]
        if not any(changed):
            break
        carry = [
            interpreter.lower(value, eqn, frame, _KEPT) if lowered else value
            for value, lowered in zip(carry, changed, strict=True)
        ]
    return carry


def _like(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, before: Sequence, after: Sequence) -> list:
    """The results of a loop body, lowered where the carry is an array."""
    return [
        interpreter.lower(new, eqn, frame, _KEPT)
        if interpreter.is_special(new) and not interpreter.is_special(old)
        else new
        for old, new in zip(before, after, strict=True)
    ]


def aval(atom: core.Var | core.Literal) -> Any:
    """The abstract value of a variable or literal: in these programs an array's shape and dtype."""
    return atom.aval


def split_scan(eqn: core.JaxprEqn, values: list) -> tuple[list, list, list]:
    """The operands of a scan: constants, carry, and what is sliced.

    The parameters that count them differ between versions of JAX; the ranks of operands and of the body's variables
    tell on all of them.
    """
    body = close(eqn.params["jaxpr"]).jaxpr
    xs_count = sum(aval(a).ndim != aval(b).ndim for a, b in zip(eqn.invars, body.invars, strict=True))
    carry_count = sum(aval(a).ndim == aval(b).ndim for a, b in zip(eqn.outvars, body.outvars, strict=True))
    first, last = len(values) - xs_count - carry_count, len(values) - xs_count
    return values[:first], values[first:last], values[last:]


def _scan(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, values: list) -> list:
    params, body = eqn.params, close(eqn.params["jaxpr"])
    consts, carry, xs = split_scan(eqn, values)
    carry_count = len(carry)
    special, stack = [interpreter.is_special(x) for x in xs], (*frame.stack, id(eqn))
    xs = [_sliceable(interpreter, frame, eqn, x) if flag else x for x, flag in zip(xs, special, strict=True)]

    def step(carry: list, slices: list) -> tuple[list, tuple[list, dict]]:
        inputs = [interpreter.sliced(x, stack) if interpreter.is_special(x) else x for x in slices]
        outs, emitted = interpreter.run(body, [*consts, *carry, *inputs], stack)
        return _like(interpreter, frame, eqn, carry, outs[:carry_count]), (outs[carry_count:], emitted)

    def first_step(carry: list) -> list:
        return step(carry, jax.tree.map(lambda leaf: leaf[0], xs))[0]

    carry = _arrays(carry, eqn.invars[len(consts) : len(consts) + carry_count], interpreter)
    carry = _settle(interpreter, frame, eqn, carry, first_step)
    last, (ys, emitted) = jax.lax.scan(
        step, carry, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    _absorb(interpreter, frame, interpreter.pool(emitted, stack))
    return [*last, *(interpreter.stacked(y) if interpreter.is_special(y) else y for y in ys)]


def _rank(atom: Any) -> int:
    return atom.aval.ndim


def _sliceable(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, value: Any) -> Any:
    ready = interpreter.sliceable(value)
    return interpreter.lower(value, eqn, frame, "a scan slices the packed axis") if ready is None else ready


def _while(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, values: list) -> list:
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    test_consts, consts = values[:first], values[first:second]
    stack = (*frame.stack, id(eqn))

    def step(carry: list) -> tuple[list, dict]:
        outs, emitted = interpreter.run(close(params["body_jaxpr"]), [*consts, *carry], stack)
        return _like(interpreter, frame, eqn, carry, outs), emitted

    def body(state: tuple[list, dict]) -> tuple[list, dict]:
        carry, emitted = step(state[0])
        return carry, {name: interpreter.join(held, emitted[name]) for name, held in state[1].items()}

    def test(state: tuple[list, dict]) -> jax.Array:
        outs, emitted = interpreter.run(close(params["cond_jaxpr"]), [*test_consts, *state[0]], stack)
        _refuse_emitted(emitted, "while loop's condition")
        return outs[0]

    carry = _arrays(values[second:], eqn.invars[second:], interpreter)
    carry = _settle(interpreter, frame, eqn, carry, lambda carry: step(carry)[0])
    forms = jax.eval_shape(lambda carry: step(carry)[1], carry)
    blank = {name: interpreter.blank(form) for name, form in forms.items()}
    last, emitted = jax.lax.while_loop(test, body, (carry, blank))
    _absorb(interpreter, frame, emitted)
    return last


def _refuse_emitted(emitted: dict, where: str) -> None:
    if emitted:
        raise NotImplementedError(
            f"statistics of {', '.join(emitted)} would have to leave a {where}, which returns none"
        )


def _cond(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, values: list) -> list:
    index, *operands = values
    bodies = [close(branch) for branch in eqn.params["branches"]]
    stacks = [(*frame.stack, id(eqn), place) for place in range(len(bodies))]
    forms = [
        jax.eval_shape(lambda *ops, b=body, s=stack: interpreter.run(b, ops, s), *operands)
        for body, stack in zip(bodies, stacks, strict=True)
    ]
    kept = [all(_same_form(form, outs[0]) for form in outs) for outs in zip(*(outs for outs, _ in forms), strict=True)]
    blank = {name: value for _, emitted in forms for name, value in emitted.items()}

    def branch(body: core.ClosedJaxpr, stack: tuple) -> Callable:
        def run(*operands: Any) -> tuple[list, dict]:
            outs, emitted = interpreter.run(body, operands, stack)
            outs = [
                out if same or not interpreter.is_special(out) else interpreter.lower(out, eqn, frame, _KEPT)
                for out, same in zip(outs, kept, strict=True)
            ]
            absent = {name: interpreter.blank(form) for name, form in blank.items() if name not in emitted}
            return _arrays(outs, eqn.outvars, interpreter), absent | emitted

        return run

    runs = [branch(body, stack) for body, stack in zip(bodies, stacks, strict=True)]
    outs, emitted = jax.lax.switch(index, runs, *operands)
    _absorb(interpreter, frame, emitted)
    return outs


def _shard_map(interpreter: "Interpreter", frame: "Frame", eqn: core.JaxprEqn, values: list) -> Sequence:
    params, inputs, specs, makers = eqn.params, [], [], []
    for value, spec in zip(values, params["in_specs"], strict=True):
        shards = interpreter.shards(value, spec, params["mesh"]) if interpreter.is_special(value) else None
        if shards is None:
            if interpreter.is_special(value):
                value = interpreter.lower(
                    value, eqn, frame, f"shards of {spec} would cut its packed axis, groups or outliers"
                )
            shards = value, spec, lambda local: local
        for held, part in zip((inputs, specs, makers), shards, strict=True):
            held.append(part)

    def body(*values: Any) -> tuple:
        local = [make(value) for make, value in zip(makers, values, strict=True)]
        outs, emitted = interpreter.run(close(params["jaxpr"]), local, (*frame.stack, id(eqn)))
        _refuse_emitted(emitted, "shard_map")
        return tuple(interpreter.lowered(frame, eqn, outs, _KEPT))

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*inputs)


CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
    | {"remat", "remat2", "checkpoint"}
)
CHECKPOINTS = ("remat", "remat2", "checkpoint")

CONTROL = {
    **dict.fromkeys(CALLS, inline),
    **dict.fromkeys(CHECKPOINTS, _checkpoint),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
