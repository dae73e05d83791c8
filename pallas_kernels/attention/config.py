"""Tile shapes of the Hopper attention kernel, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.attention.quantize import E4M3, INT8
from pallas_kernels.attention.reference import MODES, Masking, Mode

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
        warpgroups: consumer warpgroups, each with 64 queries.
        ping_pong: whether a warpgroup waits its turn for the tensor cores, so that one multiplies while another
            computes its softmax; needs two warpgroups.
        exponentials_by_polynomial: of every 16 weights, how many are exponentials by a polynomial, to a third of a
            percent, instead of by the special function unit; for 8-bit values.
        l2_bytes: the keys and values of as many heads as fit are worked on together, to be found in the L2 cache.
    """

    block_kv: int = 128
    stages: int = 2
    warpgroups: int = 2
    ping_pong: bool = True
    exponentials_by_polynomial: int = 0
    l2_bytes: int = 32 << 20

    def __post_init__(self):
        if self.block_kv not in (64, 128, 192, 256):
            raise ValueError(f"block_kv must be 64, 128, 192 or 256, got {self.block_kv}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")
        if self.warpgroups not in (1, 2, 3, 4):
            raise ValueError(f"warpgroups must be from 1 to 4, got {self.warpgroups}")
        if self.ping_pong and self.warpgroups != 2:
            raise ValueError(f"ping_pong needs 2 warpgroups, got {self.warpgroups}")
        if not 0 <= self.exponentials_by_polynomial <= 8:
            raise ValueError(f"exponentials_by_polynomial must be from 0 to 8, got {self.exponentials_by_polynomial}")


def default_config(q: jax.Array, k: jax.Array, v: jax.Array, mode: str, *, masked: bool) -> Config:
    """The configuration used when the caller names none.

    Three warpgroups hide one another's softmax better than two that take turns (head_dim 64: 546 against 441 TFLOP/s,
    128: 886 against 815; one H100), but with 8-bit values, head_dim 128 and a mask they spill registers.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        mode: a key of MODES.
        masked: whether some tile of keys is seen in part: causal, a window, lengths, or a ragged S.

    Returns:
        A configuration.
    """
    if q.shape[-1] > 64 and masked and MODES[mode].values is not None:
        return Config()
    return Config(warpgroups=3, ping_pong=False)


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
    if MODES[mode].values is None and config.exponentials_by_polynomial:
        return f"{config} needs 8-bit weights, mode {mode!r} has none"
    bytes_needed = shared_memory(q.shape[-1], q.dtype.itemsize, MODES[mode], config)
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
