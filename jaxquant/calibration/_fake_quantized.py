"""`fake_quantized(fn, config)`: training that feels the quantization to come, in any optimizer's loop."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays._numerics import all_finite
from jaxquant.arrays._qarray import QArray, quantize_array
from jaxquant.arrays._spec import QuantConfig
from jaxquant.parameters._rules import Assignment, assign
from jaxquant.parameters._tree import map_named
from jaxquant.tracing._quantized import quantized


def fake_quantized(fn: Callable[..., Any], config: QuantConfig) -> Callable[..., Any]:
    """Makes a function of float parameters compute what it will once they are quantized, and pass gradients through.

    The weights that `config` selects are rounded to nearest on every call and meet their inputs in the products of
    `quantized(fn)`, activations quantized where their spec says so. So the result is that of
    `quantized(fn)(quantize(params, config), ...)`, and training ends with `quantize` and loses nothing. Derivatives are
    taken at these values and pass straight through every rounding: to an activation as through the dequantized weight,
    to a weight as through its float product with the activation.

    Args:
        fn: the float model; its first argument holds the parameters.
        config: which parameters, and how; round-to-nearest, by the paths and conventions alone (`Rule(..., axis=)`
            where Flax's do not hold).

    Returns:
        A function of the same arguments; jit, differentiate and train it as the float one. NaN and Inf in a weight
        come out as NaN.

    Raises:
        TypeError: `config` is no `QuantConfig`.
        ValueError: `config` has an algorithm; when called: what `quantize` refuses. The message names the parameter.
        NotImplementedError: when called: a static activation scale, which only calibration finds.

    References:
        Bengio, Leonard & Courville 2013, arXiv:1308.3432 (the straight-through estimator).
        Jacob et al. 2018, arXiv:1712.05877 (quantization-aware training).

    >>> params, x = {"kernel": jnp.full((128, 2), 0.3)}, jnp.ones((1, 128))
    >>> train = fake_quantized(lambda p, x: x @ p["kernel"], QuantConfig.preset("w4a16"))
    >>> jax.grad(lambda p: train(p, x).sum())(params)["kernel"].mean().item()
    1.0
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(f"fake_quantized: config must be a QuantConfig, got {config!r}")
    if config.algorithm is not None:
        raise ValueError(
            f"fake_quantized: config.algorithm={config.algorithm.name!r}; training rounds to nearest on every call, so"
            " algorithm=None is accepted: train, then quantize with the same configuration"
        )

    run = quantized(fn)

    def on_sum(params: Any, shifts: dict[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        moved = map_named(lambda path, leaf: leaf + shifts[path] if path in shifts else leaf, params)
        return fn(moved, *args, **kwargs)

    follow = quantized(on_sum)  # products with `q + shift` are sums of products, in which the shift has its share

    @functools.wraps(fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {path: each for path, each in assign(params, config).items() if each.spec is not None}
        shifts: dict[str, jax.Array] = {}

        def split(path: str, leaf: Any) -> Any:
            if path not in chosen:
                return leaf
            w = jnp.asarray(leaf)
            shifts[path] = w - jax.lax.stop_gradient(w)  # zero, with the derivative of the weight
            return _round(path, jax.lax.stop_gradient(w), chosen[path])

        qparams = map_named(split, params)
        value = run(jax.lax.optimization_barrier(qparams), *args, **kwargs)  # so that no rounding fuses into a product
        return jax.tree.map(_with_derivative_of, value, follow(qparams, shifts, *args, **kwargs))

    return wrapped


@jax.custom_jvp
def _with_derivative_of(value: jax.Array, twin: jax.Array) -> jax.Array:
    """The value alone, with the derivative of its twin, which nothing computes unless one is asked for."""
    return value


@_with_derivative_of.defjvp
def _with_derivative_of_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def _round(path: str, w: jax.Array, chosen: Assignment) -> QArray:
    spec = chosen.spec
    if spec is None:
        raise ValueError(f"{path}: nothing to round by")
    if spec.activation is not None and spec.activation.static:
        raise NotImplementedError(
            f"{path}: a static activation scale comes from calibration, and training has none; static=False is accepted"
        )
    try:
        q = quantize_array(w, spec, chosen.axis)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; or leave it with Rule({path!r}, None)") from error
    return dataclasses.replace(q, scale=jnp.where(all_finite(w), q.scale, jnp.full_like(q.scale, jnp.nan)))
