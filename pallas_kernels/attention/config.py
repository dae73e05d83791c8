"""Tile shapes of the Hopper attention kernel, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.attention.quantize import E4M3, F16, INT8
from pallas_kernels.attention.reference import HALF_HEAD_DIM, Masking, Mode, formats

SHARED_MEMORY_BYTES = 232_448
ROWS = 64  # queries of one warpgroup: the rows of a wgmma
HEAD_DIMS = (64, 128)
SUM_CHANNELS = {None: 0, E4M3: 8, INT8: 16}  # of ones beside values: what wgmma takes beyond 64 or 128 columns


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel tiles its work.

    Attributes:
        block_kv: keys and values of one tile, and the number of keys that share a scale.
        stages: key and value tiles in flight.
        warpgroups: consumer warpgroups, each with 64 queries; while one computes its softmax, others multiply.
        exponentials_by_polynomial: of every 16 weights, how many are exponentials by a polynomial, to a third of a
            percent, instead of by the special function unit; for 8-bit values.
    """

    block_kv: int = 128
    stages: int = 2
    warpgroups: int = 3
    exponentials_by_polynomial: int = 0

    def __post_init__(self):
        if self.block_kv not in (64, 128, 192, 256):
            raise ValueError(f"block_kv must be 64, 128, 192 or 256, got {self.block_kv}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")
        if self.warpgroups not in (1, 2, 3, 4):
            raise ValueError(f"warpgroups must be from 1 to 4, got {self.warpgroups}")
        if not 0 <= self.exponentials_by_polynomial <= 8:
            raise ValueError(f"exponentials_by_polynomial must be from 0 to 8, got {self.exponentials_by_polynomial}")


def default_config(head_dim: int, mode: str) -> Config:
    """The configuration used when the caller names none: what was fastest on an H200.

    Four warpgroups keep the units busiest, where scores in float16 leave room for their registers (head_dim 64, 8192
    keys: 707 TFLOP/s of the kernel against 657 of three), else three. Where exponentials hold up the rest, polynomials
    take some of them over (748 against 707; int8 scores at head_dim 128, causal: 899 against 844).
    """
    scores, values = formats(mode, head_dim)
    if scores == F16:
        return Config(warpgroups=4, exponentials_by_polynomial=4)
    if (scores, values) == (INT8, E4M3) and head_dim > HALF_HEAD_DIM:
        return Config(exponentials_by_polynomial=2)
    if values == INT8 and head_dim > HALF_HEAD_DIM:  # sums of integers leave no registers for a third
        return Config(warpgroups=2)
    return Config()


def supports(q: jax.Array, k: jax.Array, v: jax.Array, masking: Masking, mode: str, config: Config) -> str | None:
    """Returns why the Hopper kernel cannot compute this call, or None if it can."""
    if masking.bias is not None or masking.mask is not None:
        return "a bias or a boolean mask is computed by implementation='xla' only"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] > max(HEAD_DIMS):
        return f"head_dim must be at most {max(HEAD_DIMS)}, got {q.shape[-1]}"
    if 0 in q.shape or 0 in k.shape:
        return f"empty operands: q {q.shape}, k {k.shape}"
    given = formats(mode, q.shape[-1])
    if given.values is None and config.exponentials_by_polynomial:
        return f"{config} needs 8-bit weights, mode {mode!r} has none"
    bytes_needed = shared_memory(q.shape[-1], q.dtype.itemsize, given, config)
    if bytes_needed > SHARED_MEMORY_BYTES:
        return f"{config} needs {bytes_needed} bytes of shared memory, Hopper has {SHARED_MEMORY_BYTES}"
    return None


def padded_head_dim(head_dim: int) -> int:
    """The head dimension that the kernel computes with."""
    return next(size for size in HEAD_DIMS if size >= head_dim)


def shared_memory(head_dim: int, float_bytes: int, mode: Mode, config: Config) -> int:
    """Bytes of shared memory of one block, with 1 KB for barriers."""
    head_dim = padded_head_dim(head_dim)
    query_bytes = float_bytes + (0 if mode.scores is None else mode.scores.itemsize)  # as they come, and their codes
    tile_bytes = sum(float_bytes if dtype is None else dtype.itemsize for dtype in mode)
    staged = config.stages * config.block_kv
    ones = SUM_CHANNELS[mode.values] * staged
    return head_dim * (config.warpgroups * ROWS * query_bytes + staged * tile_bytes) + ones + 1024
