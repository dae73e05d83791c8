"""Low-bit kernels for JAX on Hopper GPUs: arrays in, arrays out."""

from pallas_kernels.int4_matmul import int4_matmul

__all__ = ["int4_matmul"]
