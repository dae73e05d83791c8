"""int4 weights times 16-bit activations, or times the int8 or float8_e4m3fn codes of activations."""

from collections.abc import Sequence

import jax

from pallas_kernels.int4_matmul.choice import default_config
from pallas_kernels.int4_matmul.config import Config, supports
from pallas_kernels.int4_matmul.core import Implementation, Int4Weight, packed_matmul
from pallas_kernels.int4_matmul.layout import pack, unpack
from pallas_kernels.int4_matmul.reference import dequantize

__all__ = [
    "Config",
    "Int4Weight",
    "default_config",
    "dequantize",
    "int4_matmul",
    "int4_matmul_many",
    "pack",
    "supports",
    "unpack",
]


def int4_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    x_scale: jax.Array | None = None,
    pre_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply activations by an int4 weight: `(x * pre_scale) @ ((code - zero_point) * scale) + bias`.

    Sums are float32; those of 8-bit codes x are exact (int8) or promoted out of the tensor core every 256 inputs at
    most (fp8) over each group of inputs. Differentiable in everything but codes; under `vmap` tokens fold into one
    product, and weights are taken one after another.

    Args:
      x: `[..., K]` bfloat16 or float16, or int8 or float8_e4m3fn codes with an `x_scale` (see `activation_quant`).
      qweight: `[ceil(N / 64), ceil(K / 64), 2, 256]` int32, from `pack` for activations of x's bytes.
      scale: `[K / group, N]`, any sign; one row for per-channel scales.
      zero_point: like `scale`, in the units of the codes (-8..7), whole numbers.
      x_scale: `[..., 1]` float32 of codes x, a token or with ones for x's leading dimensions; the result is multiplied
        by it.
      pre_scale: `[K]`; a floating x is multiplied by it first.
      bias: `[N]`.
      out_dtype: of a product of codes: bfloat16 (the default), float16 or float32.
      implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the kernel on a CUDA device
        if it takes the problem, else "xla"; decided when the program is lowered for its platform.
      config: the kernel's configuration; by default what was tuned for a problem like it, else a cost model's choice.

    Returns:
      `[..., N]` in x's dtype, of codes in out_dtype.

    Raises:
      TypeError: for codes without `x_scale`, or another dtype with it.
      ValueError: for operands whose shapes do not fit.
      NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> qweight = pack(jnp.ones((128, 64), jnp.int8))
    >>> out = int4_matmul(jnp.ones((2, 128), jnp.bfloat16), qweight, jnp.full((1, 64), 0.5, jnp.bfloat16))
    >>> out.shape, float(out[0, 0])
    ((2, 64), 64.0)
    """
    weight = Int4Weight(qweight, scale, zero_point, bias)
    options = {"x_scale": x_scale, "pre_scale": pre_scale, "out_dtype": out_dtype}
    return int4_matmul_many(x, [weight], implementation=implementation, config=config, **options)[0]


def int4_matmul_many(
    x: jax.Array,
    weights: Sequence[Int4Weight],
    *,
    x_scale: jax.Array | None = None,
    pre_scale: jax.Array | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> list[jax.Array]:
    """Multiply the same activations by several int4 weights in one launch: q, k and v, or gate and up.

    Each product is what `int4_matmul` gives; the outputs of all weights are cut into the tiles of one launch, so that
    small weights share its cost. Nothing is copied: the weights stay where they are.

    Args:
      x: `[..., K]` as for `int4_matmul`.
      weights: alike in K, in the groups and dtype of their scales, and in having zero points or not.
      x_scale: as for `int4_matmul`, like pre_scale, out_dtype and implementation.
      pre_scale: `[K]`.
      out_dtype: of a product of codes.
      implementation: the kernel or XLA.
      config: the kernel's configuration; by default that of one weight with all their outputs.

    Returns:
      `[..., N]` for each weight, in x's dtype, of codes in out_dtype.

    Raises:
      TypeError: for codes without `x_scale`, or another dtype with it.
      ValueError: for operands whose shapes do not fit, or weights that are not alike.
      NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> weight = Int4Weight(pack(jnp.ones((128, 64), jnp.int8)), jnp.full((1, 64), 0.5, jnp.bfloat16))
    >>> [out.shape for out in int4_matmul_many(jnp.ones((2, 128), jnp.bfloat16), [weight, weight])]
    [(2, 64), (2, 64)]
    """
    options = {"x_scale": x_scale, "pre_scale": pre_scale, "out_dtype": out_dtype}
    return packed_matmul(x, weights, qtype="int4", implementation=implementation, config=config, **options)
