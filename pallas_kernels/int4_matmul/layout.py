"""The fragment-major layout of int4 weights: each thread finds its wgmma operand in one 16-byte load.

A weight `[K, N]` is cut into tiles of 64 inputs by 64 outputs. A tile is the A operand of four `wgmma.m64nXk16`, held
by the 128 threads of a warpgroup, four words each: word `s` of a thread holds its eight codes of step `s`. Nibbles
`j` and `j + 4` are the low and high halves of its operand register `j`, so that one shift and one `lop3` leave two
codes in the mantissas of a register. Codes are stored offset by 8 (0..15). Array shape: `[..., N / 64, K / 64, 2,
256]` int32, the thread the slow axis of the 512 words; the split in two is for the copy engine, whose boxes are at
most 256 wide. Codes of 2 and 8 bits lie in tiles of 128 and 32 inputs by the same rule: a word holds the codes of 8 or
2 operand registers, those of their low halves below those of their high halves (NF4: side by side).

For 8-bit activations a register of the operand holds four inputs that lie side by side, and a tile feeds two
`wgmma.m64nXk32`. The words are the same but for the inputs in them: low nibbles are the four of operand row `r`, high
nibbles those of row `r + 8`, so that one mask leaves four codes in the high halves of a register's bytes.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.formats import FORMATS, codes_of, stored_bits

TILE = 64
# By bytes of an activation, axes of 16 inputs: register column half, thread column, element in some order; and where
# to find (column, half, element) of them.
_AXES_K = {2: (2, 4, 2), 1: (4, 2, 2)}
_FOUND = {2: (1, 0, 2), 1: (0, 2, 1)}
_AXES_N = (4, 2, 8)  # warp, register row half, thread row


def _fragment_order(x_bytes: int) -> tuple[int, ...]:
    """From (k tile, step, *_AXES_K, n tile, *_AXES_N) to the array, the thread, and its operand registers in sequence.

    (n tile, k tile | warp, row, column | step, column half, row half, element): a register holds two elements.
    """
    column, half, element = (2 + axis for axis in _FOUND[x_bytes])
    return (5, 0, 6, 8, column, 1, half, 7, element)


@functools.partial(jax.jit, static_argnames=("x_bytes", "qtype"))
def pack(codes: jax.Array, *, x_bytes: int = 2, qtype: str = "int4") -> jax.Array:
    """Pack int4 codes (or those of another format) into the fragment-major layout.

    Args:
      codes: `[..., K, N]`: integers in -8..7 (int8: -128..127, int2: -2..1, nf4: 0..15), or float8_e4m3fn. K and N are
        padded with zero codes to whole tiles: K to multiples of 64 (8-bit codes: 32, int2: 128), N of 64.
      x_bytes: bytes of the activations that the weight will meet: 2, or 1 for int8 and float8_e4m3fn ones (int4 only).
      qtype: "int4", "int2", "nf4", "int8" or "float8_e4m3fn".

    Returns:
      `[..., N / 64, K / 64, 2, 256]` int32.

    >>> import jax.numpy as jnp
    >>> pack(jnp.zeros((128, 64), jnp.int8)).shape
    (1, 2, 2, 256)
    """
    *lead, k, n = codes.shape
    bits, tile_k = FORMATS[qtype].bits, FORMATS[qtype].tile_k
    pad = [(0, 0)] * len(lead) + [(0, -k % tile_k), (0, -n % TILE)]
    stored = stored_bits(jnp.pad(codes, pad), qtype)
    k_tiles, n_tiles = -(-k // tile_k), -(-n // TILE)
    tiled = stored.reshape(*lead, k_tiles, tile_k // 16, *_AXES_K[x_bytes], n_tiles, *_AXES_N)
    registers = _transpose_trailing(tiled, _fragment_order(x_bytes))
    pairs = registers.reshape(*lead, n_tiles, k_tiles, 2, 256, 16 // bits, 2)
    pairs = pairs if FORMATS[qtype].side_by_side else pairs.swapaxes(-1, -2)
    slots = pairs.reshape(*lead, n_tiles, k_tiles, 2, 256, 32 // bits)
    shifts = (bits * jnp.arange(32 // bits, dtype=jnp.uint32)).reshape((1,) * (slots.ndim - 1) + (-1,))
    words = (slots << shifts).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


@functools.partial(jax.jit, static_argnames=("x_bytes", "qtype"))
def unpack(packed: jax.Array, *, x_bytes: int = 2, qtype: str = "int4") -> jax.Array:
    """Undo `pack` with the same options.

    Args:
      packed: `[..., N / 64, K / 64, 2, 256]` int32.
      x_bytes: as it was packed.
      qtype: as it was packed.

    Returns:
      Codes `[..., K, N]`, both padded to whole tiles: int8, float8_e4m3fn, or uint8 for nf4.

    >>> import jax.numpy as jnp
    >>> codes = jnp.arange(64 * 64, dtype=jnp.int8).reshape(64, 64) % 16 - 8
    >>> bool((unpack(pack(codes)) == codes).all())
    True
    """
    *lead, n_tiles, k_tiles, _, _ = packed.shape
    bits, tile_k = FORMATS[qtype].bits, FORMATS[qtype].tile_k
    words = jax.lax.bitcast_convert_type(packed, jnp.uint32)[..., None]
    shifts = (bits * jnp.arange(32 // bits, dtype=jnp.uint32)).reshape((1,) * packed.ndim + (-1,))
    slots = (words >> shifts) & jnp.uint32(2**bits - 1)
    if FORMATS[qtype].side_by_side:
        pairs = slots.reshape(*packed.shape, 16 // bits, 2)
    else:
        pairs = slots.reshape(*packed.shape, 2, 16 // bits).swapaxes(-1, -2)
    order, sizes = _fragment_order(x_bytes), (k_tiles, tile_k // 16, *_AXES_K[x_bytes], n_tiles, *_AXES_N)
    registers = pairs.reshape(*lead, *(sizes[axis] for axis in order))
    tiled = _transpose_trailing(registers, tuple(order.index(axis) for axis in range(9)))
    return codes_of(tiled.reshape(*lead, k_tiles * tile_k, n_tiles * TILE), qtype)


def _transpose_trailing(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    lead = array.ndim - len(order)
    return array.transpose(*range(lead), *(lead + axis for axis in order))
