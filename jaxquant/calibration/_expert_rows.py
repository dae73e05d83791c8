"""Which tokens the statistics of an expert see: those routed to it, a share of its neighbours', or all.

With few calibration tokens an expert may be hit rarely, and its Hessian then has a low rank. Two remedies:

- *borrow* b: an expert counts the tokens of the layer's other experts too, each with weight b. Its Hessian becomes
  H_e + b (H - H_e), H being the sum over the layer, so that per token it is shrunk towards the layer's pooled one by
  b (n - n_e) / (n_e + b (n - n_e)): with b = 0.02, by 0.9 for an expert that saw 0.2 % of n tokens, and by 0.07 for one
  of eight that saw its part and more (22 %).
- *all*: every token goes through every expert, as llm-compressor does; inputs of a down projection are what the
  expert's own gate and up make of all tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxquant.tracing._interpreter import Frame, bind

CHOICES = ("routed", "all")


def check_expert_tokens(where: str, expert_tokens: str, borrow: float) -> None:
    """Raises for options that say nothing or two things at once."""
    if expert_tokens not in CHOICES:
        raise ValueError(f"{where}: expert_tokens={expert_tokens!r}; accepted: {', '.join(map(repr, CHOICES))}")
    if not 0 <= borrow <= 1:
        raise ValueError(f"{where}: borrow={borrow!r}; a weight from 0 to 1 is accepted")
    if borrow and expert_tokens == "all":
        raise ValueError(f"{where}: borrow={borrow!r} with expert_tokens='all', which shows every token already")


def ragged_weights(rows: int, sizes: jax.Array, borrow: float) -> jax.Array:
    """How much each row of a ragged product counts for each expert.

    Args:
        rows: M.
        sizes: [E] rows of each expert; rows past their sum are nobody's.
        borrow: weight of another expert's rows.

    Returns:
        float32 [E, M].

    >>> ragged_weights(4, jnp.asarray([1, 2]), 0.5).tolist()
    [[1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 1.0, 0.0]]
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(rows, dtype=ends.dtype)
    mine = jax.vmap(lambda start, end: (row >= start) & (row < end))(ends - sizes, ends).astype(jnp.float32)
    if not borrow:
        return mine
    live = (row < ends[-1]).astype(jnp.float32)
    return mine + borrow * (jnp.broadcast_to(live, mine.shape) - mine)


def pooled_rows(rows: jax.Array, live: jax.Array, borrow: float) -> tuple[jax.Array, jax.Array]:
    """Shows each matrix of a batch the others' rows too.

    Args:
        rows: [E, T, K].
        live: [E, T] weights of the rows.
        borrow: weight of another matrix's rows.

    Returns:
        ([E, E T, K], [E, E T] weights).
    """
    count, each, width = rows.shape
    share = jnp.eye(count) * (1 - borrow) + borrow
    weights = (jax.lax.expand_dims(share, [2]) * jax.lax.expand_dims(live, [0])).reshape(count, count * each)
    return jnp.broadcast_to(rows.reshape(1, count * each, width), (count, count * each, width)), weights


def all_rows(
    frame: Frame, atom: Any, sizes_atom: Any, until: core.JaxprEqn, read: Callable[[Any], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """What the rows of a ragged product would be with other group sizes.

    Args:
        frame: the program around the product, evaluated up to it.
        atom: the rows.
        sizes_atom: the group sizes.
        until: the product.
        read: gives a variable's array.

    Returns:
        A function of group sizes [E] to rows [M, K], which evaluates again what lies between the sizes and the rows:
        for a down projection, gate, up and what joins them; for gate and up, nothing. What an enclosing program made of
        the sizes stays as it was.
    """
    eqns = equations_between(frame.body.eqns, atom, sizes_atom, until)

    def rows(sizes: jax.Array) -> jax.Array:
        made = {sizes_atom: sizes}

        def value(a: core.Var | core.Literal) -> jax.Array:
            return read(a) if isinstance(a, core.Literal) or a not in made else made[a]

        for eqn in eqns:
            made.update(zip(eqn.outvars, bind(frame, eqn, [value(a) for a in eqn.invars]), strict=True))
        return value(atom)

    return rows


def through_every_expert(rows: Callable[[jax.Array], jax.Array], sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All rows as each expert would get them, one expert after the other.

    Args:
        rows: see `all_rows`.
        sizes: [E] the real group sizes.

    Returns:
        ([E, M, K], float32 [E, M] weights: one for each row that is anybody's).
    """
    made = jax.lax.map(rows, alone_in_groups(sizes))
    return made, rows_of_all(made, sizes)


def alone_in_groups(sizes: jax.Array) -> jax.Array:
    """For each expert the group sizes [E] with which all rows are its own: [E, E]."""
    return jnp.eye(sizes.shape[0], dtype=sizes.dtype) * jnp.sum(sizes)


def rows_of_all(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """float32 [E, M] weights of rows [E, M, K] that every expert sees: one for each row that is anybody's."""
    live = (jnp.arange(rows.shape[1], dtype=sizes.dtype) < jnp.sum(sizes)).astype(jnp.float32)
    return jnp.broadcast_to(live, rows.shape[:2])


def equations_between(
    eqns: Sequence[core.JaxprEqn], atom: Any, source: Any, until: core.JaxprEqn
) -> list[core.JaxprEqn]:
    """The equations through which one variable depends on another."""
    reached, forward = {source}, []
    for eqn in eqns:
        if eqn is until:
            break
        if any(not isinstance(a, core.Literal) and a in reached for a in eqn.invars):
            reached.update(eqn.outvars)
            forward.append(eqn)
    wanted, kept = {atom}, []
    for eqn in reversed(forward):
        if wanted & set(eqn.outvars):
            wanted.update(a for a in eqn.invars if not isinstance(a, core.Literal))
            kept.append(eqn)
    return kept[::-1]
