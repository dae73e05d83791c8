"""How codes of 4 and 2 bits lie in memory: in the order in which wgmma's threads want them.

Keys have a scale and an offset for each channel and 32 tokens, values for each token and 32 channels. The 32 elements
of a group are the rows of two warps, of which lane 4r + c holds rows r and r + 8: a byte joins the rows that one
thread holds (4 bits) or that two warps hold at the same place (2 bits). The channels of values are those rows in order.
The tokens of keys are in the order in which a thread that reads 8 tokens of values side by side multiplies them, so
that no weight changes its place between the two products. The bytes of a group of keys are then sorted by the thread
that reads them, 16 bytes of 64 channels at a time, so that a warp reads shared memory without bank conflicts.
"""

import jax
import jax.numpy as jnp

GROUP = 32
_LANE_ROWS = 8


def in_row_order(x: jax.Array) -> jax.Array:
    """Brings tokens [..., S, C] in the order of rows: row 16w + 8h + 2c + e of 32 holds token 8c + 4w + 2h + e."""
    split = x.reshape(*x.shape[:-2], x.shape[-2] // GROUP, 4, 2, 2, 2, x.shape[-1])
    return jnp.moveaxis(split, -5, -3).reshape(x.shape)


def pack_keys(codes: jax.Array, bits: int) -> jax.Array:
    """Packs uint8 codes [..., S, H] of keys, S a multiple of 32, to bytes [..., S * bits / 8, H]."""
    packed = _pack(_groups(in_row_order(codes)), bits)
    span, rows = _span(codes.shape[-1]), GROUP * bits // 8
    shape = packed.shape[-2] // rows, rows // _LANE_ROWS, _LANE_ROWS, codes.shape[-1] // span, span // 32, 4, 2, 2, 2
    by_row = packed.reshape(*packed.shape[:-2], *shape)  # ..., group, w, r, span, half, c, step, h, e
    by_lane = jnp.moveaxis(by_row, (-6, -4, -2), (-8, -5, -1))  # ..., group, span, w, r, c, half, step, e, h
    return by_lane.reshape(packed.shape)


def unpack_keys(packed: jax.Array, bits: int) -> jax.Array:
    """Undoes `pack_keys`."""
    span, rows = _span(packed.shape[-1]), GROUP * bits // 8
    shape = packed.shape[-2] // rows, packed.shape[-1] // span, rows // _LANE_ROWS, _LANE_ROWS, 4, span // 32, 2, 2, 2
    by_lane = packed.reshape(*packed.shape[:-2], *shape)
    by_row = jnp.moveaxis(by_lane, (-8, -5, -1), (-6, -4, -2))
    rows = _unpack(by_row.reshape(packed.shape), bits)
    split = rows.reshape(*rows.shape[:-2], 2, 2, 4, 2, rows.shape[-1])
    return jnp.moveaxis(split, -3, -5).reshape(*packed.shape[:-2], -1, packed.shape[-1])


def pack_values(codes: jax.Array, bits: int) -> jax.Array:
    """Packs uint8 codes [..., H, S] of values, H a multiple of 32, to bytes [..., H * bits / 8, S]."""
    return _pack(_groups(codes), bits)


def unpack_values(packed: jax.Array, bits: int) -> jax.Array:
    """Undoes `pack_values`."""
    return _join(_unpack(packed, bits))


def ring_slot(token: jax.Array, window: int) -> jax.Array:
    """The slot in which a ring of `window` recent keys, a multiple of 32, keeps a token: its row in its group."""
    bits = lambda first, count: (token >> first) & (2**count - 1)  # noqa: E731
    row = bits(0, 1) | bits(3, 2) << 1 | bits(1, 1) << 3 | bits(2, 1) << 4
    return token % window // GROUP * GROUP + row


def _span(head_dim: int) -> int:
    """Channels of which a thread reads a quarter at a time."""
    return 64 if head_dim % 64 == 0 else 32


def _groups(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] // GROUP, GROUP, x.shape[-1])


def _join(groups: jax.Array) -> jax.Array:
    return groups.reshape(*groups.shape[:-3], -1, groups.shape[-1])


def _pack(groups: jax.Array, bits: int) -> jax.Array:
    """Bytes of groups [..., G, 32, C]: field i of a byte is the row 8 i further."""
    fields = 8 // bits
    shape = (*groups.shape[:-2], GROUP // (_LANE_ROWS * fields), fields, _LANE_ROWS, groups.shape[-1])
    rows = groups.reshape(shape)
    packed = rows[..., 0, :, :]
    for field in range(1, fields):
        packed = packed | (rows[..., field, :, :] << jnp.uint8(bits * field))
    return packed.reshape(*groups.shape[:-3], -1, groups.shape[-1])


def _unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Groups [..., G, 32, C] of bytes [..., rows, C]."""
    fields = 8 // bits
    rows = packed.reshape(*packed.shape[:-2], -1, GROUP // (_LANE_ROWS * fields), 1, _LANE_ROWS, packed.shape[-1])
    mask = jnp.uint8(2**bits - 1)
    split = [(rows >> jnp.uint8(bits * field)) & mask for field in range(fields)]
    joined = jnp.concatenate(split, axis=-3)
    return joined.reshape(*joined.shape[:-4], GROUP, packed.shape[-1])
