"""8-bit weights times 8-bit activations: int8 and float8_e4m3fn."""

from collections.abc import Sequence

import jax

from pallas_kernels.int8_matmul.config import Config, candidates, default_config, supports
from pallas_kernels.int8_matmul.core import Implementation, Int8Weight, packed_matmul
from pallas_kernels.int8_matmul.layout import output_sums, pack, unpack

__all__ = [
    "Config",
    "Int8Weight",
    "candidates",
    "default_config",
    "int8_matmul",
    "int8_matmul_many",
    "output_sums",
    "pack",
    "supports",
    "unpack",
]


def int8_matmul(
    x: jax.Array,
    weight: jax.Array,
    w_scale: jax.Array,
    x_scale: jax.Array | None = None,
    *,
    x_zero_point: jax.Array | None = None,
    weight_sum: jax.Array | None = None,
    bias: jax.Array | None = None,
    num_outputs: int | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply 8-bit activations by an 8-bit weight: `((x - x_zero_point) * x_scale) @ (codes * w_scale) + bias`.

    int8 products are summed exactly; fp8 products in float32, promoted out of the tensor core at least every 256
    inputs. A float x is quantized here, a scale a token (a scale per 128 inputs if the weight's scales are blocked),
    and its gradient passes straight through the rounding. Under `vmap` tokens fold into one product, and weights are
    taken one after another.

    Args:
        x: codes [..., K] of the weight's dtype, or bfloat16, float16 or float32.
        weight: int8 or float8_e4m3fn [padded N, padded K], from `pack`.
        w_scale: [1, N] a channel, [1, 1] for the tensor, or [padded K / 128, padded N / 128] for 128 x 128 blocks.
        x_scale: of codes, with x's rank: [..., 1] a token, all ones for the tensor, [..., padded K / 128] with a
            blocked w_scale.
        x_zero_point: integers [..., 1], for asymmetric int8 codes.
        weight_sum: int32 [padded N] from `output_sums`, which a zero point is multiplied by; summed here if absent.
        bias: [N].
        num_outputs: N where w_scale does not tell; the padded N by default.
        out_dtype: of the result; a float x's own by default, else bfloat16.
        implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the faster one on a CUDA
            device, as measured, and "xla" elsewhere; decided when the program is lowered for its platform.
        config: the kernel's configuration; by default what was tuned for such a problem, else the cost model's choice.

    Returns:
        [..., N] in out_dtype.

    Raises:
        TypeError: for operands of other dtypes.
        ValueError: for operands whose shapes do not fit.
        NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> weight = pack(jnp.full((256, 64), 2, jnp.int8))
    >>> out = int8_matmul(jnp.ones((3, 256), jnp.bfloat16), weight, jnp.full((1, 64), 0.5))
    >>> out.shape, float(out[0, 0])
    ((3, 64), 256.0)
    """
    given = Int8Weight(weight, w_scale, weight_sum, bias, num_outputs)
    options = {"x_zero_point": x_zero_point, "out_dtype": out_dtype, "implementation": implementation}
    return packed_matmul(x, [given], x_scale, config=config, **options)[0]


def int8_matmul_many(
    x: jax.Array,
    weights: Sequence[Int8Weight],
    x_scale: jax.Array | None = None,
    *,
    x_zero_point: jax.Array | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> list[jax.Array]:
    """Multiply the same activations by several 8-bit weights in one launch: q, k and v, or gate and up.

    Each product is what `int8_matmul` gives; a float x is quantized once. The outputs of all weights are cut into the
    tiles of one launch, so that small weights share its cost. Nothing is copied: the weights stay where they are.

    Args:
        x: [..., K] as for `int8_matmul`.
        weights: alike in K, dtype and in having a bias or not; their scales a channel's or the tensor's.
        x_scale: as for `int8_matmul`, like x_zero_point, out_dtype and implementation.
        x_zero_point: integers [..., 1], for asymmetric int8 codes.
        out_dtype: of the results.
        implementation: the kernel or XLA.
        config: the kernel's configuration; by default that of one weight with all their outputs.

    Returns:
        [..., N] for each weight, in out_dtype.

    Raises:
        TypeError: for operands of other dtypes.
        ValueError: for operands whose shapes do not fit, or weights that are not alike.
        NotImplementedError: for several weights with blocked scales, or if `implementation="mosaic_gpu"` and the kernel
            cannot take the problem.

    >>> import jax.numpy as jnp
    >>> weight = Int8Weight(pack(jnp.full((256, 64), 2, jnp.int8)), jnp.full((1, 64), 0.5))
    >>> [out.shape for out in int8_matmul_many(jnp.ones((3, 256), jnp.bfloat16), [weight, weight])]
    [(3, 64), (3, 64)]
    """
    options = {"x_zero_point": x_zero_point, "out_dtype": out_dtype, "implementation": implementation}
    return packed_matmul(x, weights, x_scale, config=config, **options)
