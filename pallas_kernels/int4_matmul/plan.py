"""The geometry of the products of a launch: what dense and grouped kernels agree on."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.int4_matmul.config import products_k
from pallas_kernels.int4_matmul.formats import FORMATS


class ProductPlan:
    """What `products` reads of a launch, and what follows from it.

    Attributes:
      config: the cut.
      dtype: of x; x_bytes of them an element.
      scale_dtype: of scales and zero points.
      out_dtype: of the result.
      qtype: the format of the codes; `format` says what that is.
      has_zero_point: whether there are zero points.
      grouped: whether several groups of inputs have scales of their own.
      acc_dtype: of the tensor core's sums.
      code_factor: what unpacking multiplies codes by.
      ring_scales: scales come with a stage; else the result is multiplied by a channel's.
      k_steps: stages of all inputs.
      group_size: inputs that share a scale.
      scale_rows: groups of a stage.
      group_k: inputs of a stage that share a scale.
      wgmma_k: inputs of one call of wgmma.
    """

    def __init__(self, x, scale, has_zero_point: bool, out_dtype, config, qtype: str = "int4"):
        """Work the geometry out for x `[M, K]` and scales `[..., groups, N]`."""
        k, num_groups = x.shape[1], scale.shape[-2]
        self.config, self.dtype, self.scale_dtype, self.out_dtype = config, x.dtype, scale.dtype, jnp.dtype(out_dtype)
        self.qtype, self.format = qtype, FORMATS[qtype]
        self.has_zero_point, self.x_bytes, self.grouped = has_zero_point, x.dtype.itemsize, num_groups > 1
        self.acc_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        self.code_factor = 16.0 if x.dtype == jnp.int8 else 1.0  # of `unpack_int4_bytes`
        self.ring_scales = self.grouped or has_zero_point
        self.k_steps = pl.cdiv(k, config.block_k)
        self.group_size = k // num_groups if self.grouped else self.k_steps * config.block_k
        self.scale_rows = max(1, config.block_k // self.group_size)
        self.group_k = min(self.group_size, config.block_k)
        self.wgmma_k = products_k(config.block_k, self.group_size, self.x_bytes)
