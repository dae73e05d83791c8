"""Which format each attention of a model bears: measured on its own queries, keys and values."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration._calibrate import arguments_of
from jaxquant.products._attention import attention

MODES = ("auto", "int8_f16")  # the fastest first
_OPTIONS = {
    "bias": "bias",
    "mask": "mask",
    "causal": "is_causal",
    "is_causal": "is_causal",
    "window": "local_window_size",
    "query_lengths": "query_seq_lengths",
    "kv_lengths": "key_value_seq_lengths",
    "scale": "scale",
}
_OF_FLAX = ("dtype", "precision", "broadcast_dropout", "dropout_rng", "dropout_rate", "deterministic", "module")


@dataclasses.dataclass(frozen=True)
class AttentionModes:
    """A mode for each attention of a model, in the order in which the model calls them.

    Attributes:
        modes: of `jq.attention`, one a call.
        cosines: of each call, the cosine similarity of its output in every mode that was measured to the float output.
    """

    modes: tuple[str, ...]
    cosines: tuple[dict[str, float], ...]

    def attention(self) -> Callable[..., jax.Array]:
        """Returns `jq.attention` for one run of the model: its calls get their modes in turn.

        Raises:
            ValueError: from the returned function, when the model calls it more often than it did when measured.
        """
        remaining = iter(self.modes)

        @functools.wraps(attention)  # linen passes what the signature names
        def attend(*operands: Any, **options: Any) -> jax.Array:
            mode = next(remaining, None)
            if mode is None:
                raise ValueError(f"the model calls attention more than the {len(self.modes)} times it was measured for")
            return attention(*operands, **{**options, "mode": mode})

        return attend


def choose_attention_modes(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    modes: Sequence[str] = MODES,
    minimum: float = 0.9985,
) -> AttentionModes:
    """Chooses for each attention of a model the fastest mode whose output stays close to the float one.

    Most layers bear e4m3 in the second product, a few do not (SageAttention, section 4.5). The model runs in float, and
    every attention is computed in each mode besides on the same queries, keys and values.

    Args:
        apply_fn: `apply_fn(params, *batch, attention)` runs the model with `attention` as its attention function:
            called as `jq.attention` is, once a layer, outside of scans. A Flax model takes it as `attention_fn`.
        params: the model's parameters, float or quantized.
        batches: calibration inputs; an array, or a tuple of arguments, each.
        modes: candidates, the fastest first.
        minimum: least cosine similarity, over all tokens of all batches.

    Returns:
        The modes. Where none reaches the minimum, the closest one.

    Raises:
        ValueError: if there are no batches or no modes, the model calls no attention, or the batches do not agree in
            how often.

    References:
        Zhang et al., SageAttention (2024), arXiv:2410.02367.

    Example:
        >>> def model(params, x, attention):
        ...     heads = x.reshape(*x.shape[:2], 2, 32)
        ...     return attention(heads * params, heads, heads, causal=True)
        >>> x = jax.random.normal(jax.random.key(0), (1, 16, 64))
        >>> chosen = choose_attention_modes(model, jnp.float32(2.0), [x])
        >>> chosen.modes
        ('auto',)
        >>> model(jnp.float32(2.0), x, chosen.attention()).shape
        (1, 16, 2, 32)
    """
    if not modes:
        raise ValueError("modes: give at least one mode of jq.attention")

    @jax.jit
    def measure(params: Any, batch: tuple) -> list[jax.Array]:
        found: list[jax.Array] = []
        apply_fn(params, *batch, _measuring(found, modes))
        return found

    total: list[jax.Array] = []
    for batch in batches:
        found = measure(params, arguments_of(batch))
        if total and len(found) != len(total):
            raise ValueError(f"batches: attention is called {len(total)} times for one batch, {len(found)} for another")
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    if not total:
        raise ValueError("batches: none was given, or apply_fn calls its attention argument for none of them")
    cosines = [_cosines(sums, modes) for sums in total]
    return AttentionModes(tuple(_choose(cosine, minimum) for cosine in cosines), tuple(cosines))


def _measuring(found: list[jax.Array], modes: Sequence[str]) -> Callable[..., jax.Array]:
    """Float attention that appends, for each call, the products [modes, 3] of which cosines are made."""

    @functools.wraps(attention)
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        unknown = options.keys() - _OPTIONS.keys() - {*_OF_FLAX}
        if unknown:
            raise ValueError(f"attention: {sorted(unknown)} cannot be given where modes are chosen")
        outputs = [attention(q, k, v, mode=mode, **options) for mode in modes]
        given = {name: x for name, x in options.items() if name in _OPTIONS and x is not None}
        if "mask" in given:
            given["mask"] = given["mask"].astype(bool)
        exact = jax.nn.dot_product_attention(
            *(x.astype(jnp.float32) for x in (q, k, v)), **{_OPTIONS[name]: x for name, x in given.items()}
        )
        found.append(jnp.stack([_products(exact, out.astype(jnp.float32)) for out in outputs]))
        return exact.astype(outputs[0].dtype)

    return attend


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.stack([jnp.vdot(a, b), jnp.vdot(a, a), jnp.vdot(b, b)])


def _cosines(sums: jax.Array, modes: Sequence[str]) -> dict[str, float]:
    cosine = sums[:, 0] / jnp.sqrt(sums[:, 1] * sums[:, 2])
    return dict(zip(modes, map(float, cosine), strict=True))


def _choose(cosines: dict[str, float], minimum: float) -> str:
    enough = [mode for mode, cosine in cosines.items() if cosine >= minimum]
    return enough[0] if enough else max(cosines, key=lambda mode: np.nan_to_num(cosines[mode], nan=-1.0))
