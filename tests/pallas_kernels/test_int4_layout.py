import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import pack, unpack


@pytest.mark.parametrize("x_bytes", [1, 2])
@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (100, 70), (2, 3, 64, 128)])
def test_unpack_inverts_pack_up_to_padding(rng, shape, x_bytes):
    codes = rng.integers(-8, 8, shape).astype(np.int8)
    out = np.asarray(unpack(pack(jnp.asarray(codes), x_bytes=x_bytes), x_bytes=x_bytes))
    *_, k, n = shape
    np.testing.assert_array_equal(out[..., :k, :n], codes)
    assert out.shape[-2:] == (-(-k // 64) * 64, -(-n // 64) * 64)
    assert not out[..., k:, :].any()
    assert not out[..., n:].any()


def test_a_thread_finds_the_operand_registers_of_wgmma(rng):
    """Each code against the PTX manual's figure of the A operand of wgmma.m64nNk16, worked out by hand."""
    codes = rng.integers(-8, 8, (128, 128)).astype(np.int8)
    words = np.asarray(pack(jnp.asarray(codes))).view(np.uint32)
    for k, n in rng.integers(0, 128, (200, 2)):
        warp, row = divmod(n % 64, 16)
        step, column = divmod(k % 64, 16)
        lane = 4 * (row % 8) + (column % 8) // 2
        register = row // 8 + 2 * (column // 8)
        nibble = register + 4 * (column % 2)
        word = 4 * (32 * warp + lane) + step
        packed = int(words[n // 64, k // 64].reshape(-1)[word])
        assert (packed >> (4 * nibble)) % 16 - 8 == codes[k, n]


def test_a_thread_finds_the_8_bit_operand_registers_of_wgmma(rng):
    """Each code against the PTX manual's figure of the A operand of wgmma.m64nNk32, worked out by hand."""
    codes = rng.integers(-8, 8, (128, 128)).astype(np.int8)
    words = np.asarray(pack(jnp.asarray(codes), x_bytes=1)).view(np.uint32)
    for k, n in rng.integers(0, 128, (200, 2)):
        warp, row = divmod(n % 64, 16)
        step, column = divmod(k % 64, 32)
        lane = 4 * (row % 8) + (column % 16) // 4
        register, byte = row // 8 + 2 * (column // 16), column % 4
        word = 4 * (32 * warp + lane) + 2 * step + register // 2  # two registers a word
        packed = int(words[n // 64, k // 64].reshape(-1)[word])
        assert (packed >> (8 * byte + 4 * (register % 2))) % 16 - 8 == codes[k, n]


def test_pack_takes_half_a_byte_a_code():
    packed = jax.eval_shape(pack, jax.ShapeDtypeStruct((4096, 4096), jnp.int8))
    assert packed.size * packed.dtype.itemsize == 4096 * 4096 // 2
