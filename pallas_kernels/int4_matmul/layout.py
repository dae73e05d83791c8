"""The fragment-major layout of int4 weights: each thread finds its wgmma operand in one 16-byte load.

A weight `[K, N]` is cut into tiles of 64 inputs by 64 outputs. A tile is the A operand of four `wgmma.m64nXk16`, held
by the 128 threads of a warpgroup, four words each: word `s` of a thread holds its eight codes of step `s`. Nibbles
`j` and `j + 4` are the low and high halves of its operand register `j`, so that one shift and one `lop3` leave two
codes in the mantissas of a register. Codes are stored offset by 8 (0..15). Array shape: `[..., N / 64, K / 64, 2,
256]` int32, the thread the slow axis of the 512 words; the split in two is for the copy engine, whose boxes are at
most 256 wide.

For 8-bit activations a register of the operand holds four inputs that lie side by side, and a tile feeds two
`wgmma.m64nXk32`. The words are the same but for the inputs in them: low nibbles are the four of operand row `r`, high
nibbles those of row `r + 8`, so that one mask leaves four codes in the high halves of a register's bytes.
"""

import functools

import jax
import jax.numpy as jnp

TILE = 64
CODE_OFFSET = 8
# By bytes of an activation, one axis each: step, then register column half, thread column, element in some order.
_TILED_K = {2: (4, 2, 4, 2), 1: (4, 4, 2, 2)}
_TILED_N = (4, 2, 8)  # warp, register row half, thread row
# From (k tile, *_TILED_K, n tile, *_TILED_N) to (n tile, k tile | warp, row, column, step | element, half, half): the
# array, the thread and word, the nibble.
_TO_FRAGMENT = {2: (5, 0, 6, 8, 3, 1, 4, 2, 7), 1: (5, 0, 6, 8, 2, 1, 3, 4, 7)}


@functools.partial(jax.jit, static_argnames="x_bytes")
def pack(codes: jax.Array, *, x_bytes: int = 2) -> jax.Array:
    """Pack int4 codes into the fragment-major layout.

    Args:
      codes: `[..., K, N]` integers in -8..7. K and N are padded with zero codes to multiples of 64.
      x_bytes: bytes of the activations that the weight will meet: 2, or 1 for int8 and float8_e4m3fn ones.

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
    tiled = offset.reshape(*lead, k_tiles, *_TILED_K[x_bytes], n_tiles, *_TILED_N)
    fragments = _transpose_trailing(tiled, _TO_FRAGMENT[x_bytes]).astype(jnp.uint32)
    nibbles = fragments.reshape(*lead, n_tiles, k_tiles, 2, 256, 8)
    shifts = (4 * jnp.arange(8, dtype=jnp.uint32)).reshape((1,) * (nibbles.ndim - 1) + (8,))
    words = (nibbles << shifts).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


@functools.partial(jax.jit, static_argnames="x_bytes")
def unpack(packed: jax.Array, *, x_bytes: int = 2) -> jax.Array:
    """Undo `pack` with the same `x_bytes`.

    Args:
      packed: `[..., N / 64, K / 64, 2, 256]` int32.
      x_bytes: as it was packed.

    Returns:
      int8 codes `[..., K, N]`, both padded to multiples of 64.

    >>> import jax.numpy as jnp
    >>> codes = jnp.arange(64 * 64, dtype=jnp.int8).reshape(64, 64) % 16 - 8
    >>> bool((unpack(pack(codes)) == codes).all())
    True
    """
    *lead, n_tiles, k_tiles, _, _ = packed.shape
    shifts = (4 * jnp.arange(8, dtype=jnp.int32)).reshape((1,) * packed.ndim + (8,))
    nibbles = (packed[..., None] >> shifts) & 15
    order, sizes = _TO_FRAGMENT[x_bytes], (k_tiles, *_TILED_K[x_bytes], n_tiles, *_TILED_N)
    back = tuple(order.index(axis) for axis in range(9))
    tiled = _transpose_trailing(nibbles.reshape(*lead, *(sizes[axis] for axis in order)), back)
    return (tiled.reshape(*lead, k_tiles * TILE, n_tiles * TILE) - CODE_OFFSET).astype(jnp.int8)


def _transpose_trailing(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    lead = array.ndim - len(order)
    return array.transpose(*range(lead), *(lead + axis for axis in order))
