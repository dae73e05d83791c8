"""The fragment-major layout of int4 weights: each thread finds its wgmma operand in one 16-byte load.

A weight `[K, N]` is cut into tiles of 64 inputs by 64 outputs. A tile is the A operand of four `wgmma.m64nXk16`, held
by the 128 threads of a warpgroup, four words each: word `s` of a thread holds its eight codes of step `s`. Nibbles
`j` and `j + 4` are the low and high halves of its operand register `j`, so that one shift and one `lop3` leave two
codes in the mantissas of a register. Codes are stored offset by 8 (0..15). Array shape: `[..., N / 64, K / 64, 2,
256]` int32, the thread the slow axis of the 512 words; the split in two is for the copy engine, whose boxes are at
most 256 wide.
"""

import jax
import jax.numpy as jnp

TILE = 64
CODE_OFFSET = 8
# One axis each: step, register column half, thread column, element; then warp, register row half, thread row.
_TILED_K = (4, 2, 4, 2)
_TILED_N = (4, 2, 8)
# From (k tile, step, half, column, element, n tile, warp, half, row) to
# (n tile, k tile | warp, row, column, step | element, half, half): the array, the thread and word, the nibble.
_TO_FRAGMENT = (5, 0, 6, 8, 3, 1, 4, 2, 7)
_FROM_FRAGMENT = tuple(_TO_FRAGMENT.index(axis) for axis in range(9))


@jax.jit
def pack(codes: jax.Array) -> jax.Array:
    """Pack int4 codes into the fragment-major layout.

    Args:
      codes: `[..., K, N]` integers in -8..7. K and N are padded with zero codes to multiples of 64.

    Returns:
      `[..., N / 64, K / 64, 2, 256]` int32.

    >>> import jax.numpy as jnp
    >>> pack(jnp.zeros((128, 64), jnp.int8)).shape
    (1, 2, 2, 256)
    """
    *lead, k, n = codes.shape
    pad = [(0, 0)] * len(lead) + [(0, -k % TILE), (0, -n % TILE)]
    offset = jnp.pad(codes.astype(jnp.int32), pad) + CODE_OFFSET
    k_tiles, n_tiles = -(-k // TILE), -(-n // TILE)
    tiled = offset.reshape(*lead, k_tiles, *_TILED_K, n_tiles, *_TILED_N)
    nibbles = _transpose_trailing(tiled, _TO_FRAGMENT).reshape(*lead, n_tiles, k_tiles, 2, 256, 8).astype(jnp.uint32)
    words = (nibbles << (4 * jnp.arange(8, dtype=jnp.uint32)).reshape((1,) * (nibbles.ndim - 1) + (8,))).sum(
        -1, dtype=jnp.uint32
    )
    return jax.lax.bitcast_convert_type(words, jnp.int32)


@jax.jit
def unpack(packed: jax.Array) -> jax.Array:
    """Undo `pack`: `[..., N / 64, K / 64, 2, 256]` int32 to int8 codes `[..., K, N]`, both padded to multiples of 64.

    >>> import jax.numpy as jnp
    >>> codes = jnp.arange(64 * 64, dtype=jnp.int8).reshape(64, 64) % 16 - 8
    >>> bool((unpack(pack(codes)) == codes).all())
    True
    """
    *lead, n_tiles, k_tiles, _, _ = packed.shape
    shifts = (4 * jnp.arange(8, dtype=jnp.int32)).reshape((1,) * packed.ndim + (8,))
    nibbles = (packed[..., None] >> shifts) & 15
    fragment_k, fragment_n = (4, 2, 4, 2), (4, 2, 8)
    sizes = (k_tiles, *fragment_k, n_tiles, *fragment_n)
    tiled = _transpose_trailing(nibbles.reshape(*lead, *(sizes[axis] for axis in _TO_FRAGMENT)), _FROM_FRAGMENT)
    return (tiled.reshape(*lead, k_tiles * TILE, n_tiles * TILE) - CODE_OFFSET).astype(jnp.int8)


def _transpose_trailing(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    lead = array.ndim - len(order)
    return array.transpose(*range(lead), *(lead + axis for axis in order))
