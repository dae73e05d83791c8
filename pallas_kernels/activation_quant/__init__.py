"""Dynamic quantization of activations to 8 bits, a scale a token or a group of inputs."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activation_quant.config import supports
from pallas_kernels.activation_quant.mosaic_gpu import quantize_groups, quantize_tokens
from pallas_kernels.activation_quant.reference import LIMITS, activation_quant_reference

__all__ = ["activation_quant", "supports"]

Implementation = Literal["mosaic_gpu", "xla"]


def activation_quant(
    x: jax.Array,
    dtype,
    *,
    group_size: int | None = None,
    pre_scale: jax.Array | None = None,
    norm_weight: jax.Array | None = None,
    epsilon: float | None = None,
    limit: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantize activations by their largest magnitude, after an optional RMSNorm and per-channel factor.

    All arithmetic is float32: `value = (x * norm_weight * pre_scale) / rms(x)`, `scale = max |value| / limit`, the code
    is `value / scale` rounded to the nearest, ties to even. No gradient passes.

    Args:
        x: bfloat16, float16 or float32 [..., K].
        dtype: of the codes, int8 or float8_e4m3fn.
        group_size: inputs that share a scale; all of a token's by default.
        pre_scale: [K] factors (AWQ, SmoothQuant), or None.
        norm_weight: [K], the weight of the RMSNorm; needs epsilon.
        epsilon: added to the mean square of the RMSNorm; None for no norm.
        limit: what the largest magnitude becomes in units of the scale; 127 or 448 by default. With 127.5 an int8 code
            uses all 256 levels.
        implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the kernel on a CUDA device
            if it takes the problem, else "xla"; decided when the program is lowered for its platform.

    Returns:
        Codes [..., K] and float32 scales [..., K / group_size]. A group that holds a NaN has a NaN scale; one of zeros
        the scale 1.

    Raises:
        TypeError: for a dtype that is not accepted.
        ValueError: for operands whose shapes do not fit, or a norm_weight without epsilon.
        NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> codes, scale = activation_quant(jnp.array([[1.0, -2.0]]), jnp.int8)
    >>> codes.tolist(), round(float(scale[0, 0]) * 127, 6)
    ([[64, -127]], 2.0)
    """
    group = x.shape[-1] if group_size is None else group_size
    _check(x, dtype, group, pre_scale, norm_weight, epsilon)
    gains = [gain.astype(jnp.float32) for gain in (norm_weight, pre_scale) if gain is not None]
    gain = functools.reduce(jnp.multiply, gains) if gains else None
    reason = supports(x.shape[-1], group, x.dtype)
    if implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"activation_quant: {reason}")
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    rows = x.reshape(-1, x.shape[-1])
    if reason is not None or rows.size == 0:
        implementation = "xla"
    limit = LIMITS[jnp.dtype(dtype).name] if limit is None else float(limit)
    quantize = _batchable(implementation, jnp.dtype(dtype), group, limit, epsilon)
    codes, scale = quantize(*map(lax.stop_gradient, (rows, gain)))
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], scale.shape[-1])


def _check(x, dtype, group, pre_scale, norm_weight, epsilon):
    """Refuse operands that do not fit, by name."""
    if jnp.dtype(dtype).name not in LIMITS:
        raise TypeError(f"dtype={jnp.dtype(dtype).name}; codes are int8 or float8_e4m3fn")
    if x.ndim < 1 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"x must be bfloat16, float16 or float32 [..., K], got {x.dtype} of shape {x.shape}")
    k = x.shape[-1]
    if group < 1 or k % group:
        raise ValueError(f"group_size={group} does not divide K = {k}")
    for name, array in (("pre_scale", pre_scale), ("norm_weight", norm_weight)):
        if array is not None and array.shape != (k,):
            raise ValueError(f"{name} has shape {array.shape}, expected {(k,)}")
    if norm_weight is not None and epsilon is None:
        raise ValueError("norm_weight is the weight of an RMSNorm, which needs its epsilon too")


@functools.cache
def _batchable(implementation, dtype, group, limit, epsilon):
    """The quantization with its vmap rule: batched rows fold into one call, batched factors are mapped over."""

    @jax.custom_batching.custom_vmap
    def quantize(x, gain):
        xla = functools.partial(activation_quant_reference, dtype=dtype, group_size=group, limit=limit, epsilon=epsilon)
        kernel = functools.partial(_mosaic_gpu, dtype=dtype, group=group, limit=limit, epsilon=epsilon)
        if implementation is None:
            return lax.platform_dependent(x, gain, cuda=kernel, default=xla)
        return (kernel if implementation == "mosaic_gpu" else xla)(x, gain)

    @quantize.def_vmap
    def batched(axis_size, in_batched, x, gain):
        x_batched, gain_batched = in_batched
        if gain_batched:
            one = lax.map(lambda i: quantize(x[i] if x_batched else x, gain[i]), jnp.arange(axis_size))
            return one, (True, True)
        codes, scale = quantize(x.reshape(-1, x.shape[-1]), gain)
        return (codes.reshape(x.shape), scale.reshape(*x.shape[:2], -1)), (True, True)

    return quantize


def _mosaic_gpu(x, gain, *, dtype, group, limit, epsilon):
    if group == x.shape[1]:
        return quantize_tokens(x, gain, dtype, limit, epsilon)
    inverse_rms = None
    if epsilon is not None:  # A norm over all groups needs a pass of its own.
        values = x.astype(jnp.float32)
        inverse_rms = lax.rsqrt(jnp.mean(values * values, axis=1) + epsilon)
    return quantize_groups(x, gain, inverse_rms, dtype, limit)
