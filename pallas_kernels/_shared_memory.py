"""Shared memory laid out for the tensor cores."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(shape: tuple[int, ...], dtype, columns: int | None = None):
    """Shared memory in the swizzled tiles that wgmma and the copy engine read without bank conflicts.

    Args:
      shape: of the buffer; its last two dimensions are tiled.
      dtype: of its elements.
      columns: how many of a row's elements take part in one product, or are addressed alone: a tile's row is no longer;
        by default all of them.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((shape[-1] if columns is None else columns) * size * 8)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    )
