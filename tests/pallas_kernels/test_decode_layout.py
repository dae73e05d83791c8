import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention.layout import (
    in_row_order,
    pack_keys,
    pack_values,
    ring_slot,
    unpack_keys,
    unpack_values,
)

LANES = [(warp, row, quad) for warp in range(2) for row in range(8) for quad in range(4)]


def codes(rng, rows, columns, bits):
    return rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)


@pytest.mark.parametrize("bits", [4, 2])
def test_packing_is_undone(rng, bits):
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        x = np.stack([codes(rng, 96, 96, bits) for _ in range(2)])
        packed = pack(jnp.asarray(x), bits)
        assert packed.shape == (2, 96 * bits // 8, 96)
        np.testing.assert_array_equal(unpack(packed, bits), x)


@pytest.mark.parametrize("bits", [4, 2])
def test_values_lie_as_a_warp_multiplies_them(rng, bits):
    """Rows r and r + 8 of each of two warps share a byte, or all four of them do."""
    x = codes(rng, 32, 8, bits)
    packed = np.asarray(pack_values(jnp.asarray(x), bits))
    for warp, row, _ in LANES:
        byte = packed[row + 8 * warp] if bits == 4 else packed[row] >> (4 * warp)
        for half in range(2):
            np.testing.assert_array_equal((byte >> (bits * half)) & (2**bits - 1), x[16 * warp + 8 * half + row])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 2])
def test_keys_lie_as_a_lane_reads_them(rng, head_dim, bits):
    """A lane's 16 bytes: for 4 steps of 16 columns, the bytes of the columns 0, 2, 1 and 3 of its own."""
    x = codes(rng, 32, head_dim, bits)
    flat = np.asarray(pack_keys(jnp.asarray(x), bits)).reshape(-1)
    tokens = np.asarray(in_row_order(jnp.arange(32)[:, None]))[:, 0]
    for warp, row, quad in LANES:
        place = row + 8 * warp if bits == 4 else row
        for span in range(head_dim // 64):
            start = 64 * 4 * bits * span + 64 * place + 16 * quad
            for step in range(4):
                for byte, element in enumerate((0, 2, 1, 3)):
                    channel = 64 * span + 32 * (step // 2) + 8 * quad + 4 * (step % 2) + element
                    stored = int(flat[start + 4 * step + byte]) >> (0 if bits == 4 else 4 * warp)
                    for half in range(2):
                        token = tokens[16 * warp + 8 * half + row]
                        assert (stored >> (bits * half)) & (2**bits - 1) == x[token, channel]


def test_the_ring_has_tokens_in_the_order_of_rows():
    slots = np.asarray(ring_slot(jnp.arange(96, 224), 96))
    order = np.asarray(in_row_order(jnp.arange(96)[:, None]))[:, 0]
    np.testing.assert_array_equal(order[slots], np.arange(96, 224) % 96)
