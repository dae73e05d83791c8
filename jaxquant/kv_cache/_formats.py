"""The formats of a cache: what it stores of a token, empty stores, and quantization a token at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant._kernels import kv_layout
from jaxquant.kv_cache._groups import SCALE_DTYPE

EIGHT_BIT = {"int8": 127.0, "float8_e4m3fn": 448.0}
GROUPED = {"int4": 4, "int2": 2}
FORMATS = ("float", *EIGHT_BIT, *GROUPED)
SMALLEST_ABSMAX = 1e-20  # keeps the scale of an all-zero token positive


def recent_window(format: str, window: int | None) -> int:
    """Recent tokens kept in float."""
    window = (0 if format == "float" else 128) if window is None else window
    least = kv_layout.GROUP if format in GROUPED else 0
    if window % kv_layout.GROUP or window < least or (window and format == "float"):
        raise ValueError(
            f"window must be a multiple of {kv_layout.GROUP}, positive for a format of 4 or 2 bits and 0 for 'float',"
            f" got {window} for {format!r}"
        )
    return window


def check_sizes(format: str, capacity: int, head_dim: int):
    """Refuses sizes that the format's groups do not divide."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    if capacity < 1:
        raise ValueError(f"capacity must be positive, got {capacity}")
    group = kv_layout.GROUP
    if format in GROUPED and (capacity % group or head_dim % group):
        raise ValueError(
            f"format {format!r} has groups of {group}: capacity or page_size, and head_dim, must be multiples of it,"
            f" got {capacity} and {head_dim}"
        )


def empty(batch: int, kv_heads: int, format: str, dtype, head_dim: int, window: int) -> dict[str, Any]:
    """What every cache has besides its stores."""
    counts = {"lengths": jnp.zeros((batch,), jnp.int32), "overflowed": jnp.zeros((batch,), bool)}
    shapes = {"recent_key": (window, head_dim), "recent_value": (head_dim, window)}
    recent = {name: jnp.zeros((batch, kv_heads, *shape), dtype) if window else None for name, shape in shapes.items()}
    return {**counts, **recent, "format": format, "dtype": jnp.dtype(dtype), "head_dim": head_dim}


def stores(format: str, dtype, rows: int, tokens: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Zeroed keys, values, their scales and minima."""
    shapes = {"key": (tokens, head_dim), "value": (head_dim, tokens)}
    dtypes = dict.fromkeys(shapes, format if format in EIGHT_BIT else dtype)
    if format in EIGHT_BIT:
        shapes |= {"key_scale": (tokens,), "value_scale": (tokens,)}
    if format in GROUPED:
        codes, group = 8 // GROUPED[format], kv_layout.GROUP
        shapes = {"key": (tokens // codes, head_dim), "value": (head_dim // codes, tokens)}
        dtypes = dict.fromkeys(shapes, jnp.uint8)
        grids = {"key": (tokens // group, head_dim), "value": (head_dim // group, tokens)}
        shapes |= {f"{name}_{grid}": shape for grid in ("scale", "offset") for name, shape in grids.items()}
    grid_dtype = SCALE_DTYPE if format in GROUPED else jnp.float32
    absent = dict.fromkeys(("key_scale", "value_scale", "key_offset", "value_offset"))
    zeros = {name: jnp.zeros((rows, kv_heads, *shape), dtypes.get(name, grid_dtype)) for name, shape in shapes.items()}
    return absent | zeros


def static_scales(format: str, kv_heads: int, key_absmax, value_absmax) -> dict[str, Any]:
    """The largest magnitudes of calibration, checked; Nones where scales are dynamic."""
    given = {"key_absmax": key_absmax, "value_absmax": value_absmax}
    if key_absmax is None and value_absmax is None:
        return given
    for name, x in given.items():
        if format not in EIGHT_BIT or x is None or x.shape != (kv_heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
            got = None if x is None else f"{x.dtype} of shape {x.shape}"
            raise ValueError(
                f"{name}: static scales are floats of shape ({kv_heads},) for keys and values of an 8-bit format"
                f" {tuple(EIGHT_BIT)}, got {got} for format {format!r}"
            )
    return {name: jnp.maximum(x.astype(jnp.float32), SMALLEST_ABSMAX) for name, x in given.items()}


def quantize_tokens(x: jax.Array, static, format: str, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Codes [B, T, K, H] and scales [B, T, K] of tokens; a token that is not finite gets a scale of NaN."""
    x = x.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    absmax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST_ABSMAX)
    if static is not None:
        absmax = jnp.broadcast_to(static, absmax.shape)
        x = jnp.clip(x, -absmax[..., None], absmax[..., None])  # NaN stays
    absmax = jnp.where(finite, absmax, jnp.nan)
    if format not in EIGHT_BIT:
        return x.astype(dtype), absmax
    codes = x * (EIGHT_BIT[format] / absmax)[..., None]
    codes = jnp.where(jnp.isnan(codes), 0.0, codes)
    return (jnp.round(codes) if format == "int8" else codes).astype(dtype), absmax * (1 / EIGHT_BIT[format])
