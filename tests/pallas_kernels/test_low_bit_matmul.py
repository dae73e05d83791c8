import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.int4_matmul.formats import NF4_LEVELS
from pallas_kernels.low_bit_matmul import FORMATS, Config, low_bit_matmul, pack, supports, unpack

RANGES = {"int2": (-2, 2), "int4": (-8, 8), "int8": (-128, 128), "nf4": (0, 16)}


def problem(rng, qtype, m, k, n, groups):
    """Random operands, and the exact product in float64."""
    if qtype == "float8_e4m3fn":
        codes = np.asarray(jnp.asarray(rng.normal(size=(k, n)) * 50, jnp.float8_e4m3fn))
    else:
        codes = rng.integers(*RANGES[qtype], (k, n)).astype(np.int32)
    values = np.array(NF4_LEVELS)[codes] if qtype == "nf4" else codes.astype(np.float64)
    x, scale = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16), jnp.asarray(rng.normal(size=(groups, n)))
    weight = values * np.repeat(np.asarray(scale, np.float64), k // groups, axis=0)
    return codes, x, scale, np.asarray(x, np.float64) @ weight


@pytest.mark.parametrize("qtype", list(FORMATS))
@pytest.mark.parametrize(("m", "k", "n", "groups"), [(3, 256, 70, 2), (1, 200, 64, 1)])
def test_matches_float64(rng, qtype, m, k, n, groups):
    codes, x, scale, exact = problem(rng, qtype, m, k, n, groups)
    out = jax.jit(low_bit_matmul, static_argnames="qtype")(x, pack(jnp.asarray(codes), qtype=qtype), scale, qtype=qtype)
    # The weight (or the levels of NF4) and the result are rounded once to 8 significant bits: half an eps each.
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) <= 2.0**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("qtype", list(FORMATS))
def test_unpack_inverts_pack_up_to_padding(rng, qtype):
    codes, *_ = problem(rng, qtype, 1, 150, 70, 1)
    out = np.asarray(unpack(pack(jnp.asarray(codes), qtype=qtype), qtype=qtype))
    np.testing.assert_array_equal(out[:150, :70].astype(np.float64), codes.astype(np.float64))
    assert out.shape == (-(-150 // FORMATS[qtype].tile_k) * FORMATS[qtype].tile_k, 128)


@pytest.mark.parametrize("qtype", list(FORMATS))
def test_pack_takes_the_bits_of_the_codes(qtype):
    packed = jax.eval_shape(lambda codes: pack(codes, qtype=qtype), jax.ShapeDtypeStruct((4096, 4096), jnp.int32))
    assert packed.size * 32 == 4096 * 4096 * FORMATS[qtype].bits


def test_misfits_are_named(rng):
    codes, x, scale, _ = problem(rng, "int8", 2, 128, 64, 2)
    qweight = pack(jnp.asarray(codes), qtype="int8")
    with pytest.raises(ValueError, match="qtype='int3'"):
        low_bit_matmul(x, qweight, scale, qtype="int3")
    with pytest.raises(ValueError, match="qweight has shape"):
        low_bit_matmul(x, qweight, scale, qtype="int2")
    with pytest.raises(ValueError, match="takes bfloat16 or float16"):
        low_bit_matmul(x.astype(jnp.int8), qweight, scale, qtype="int8")
    with pytest.raises(NotImplementedError, match="zero points of int8"):
        low_bit_matmul(x, qweight, scale, 0 * scale, qtype="int8", implementation="mosaic_gpu")
    config = Config(block_m=8, block_k=64, num_stages=2, num_warpgroups=1, split_k=1, scale_after=True)
    assert "tiles of 128" in (supports(256, 64, 2, jnp.bfloat16, config=config, qtype="int2") or "")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("qtype", "dtype", "m", "group"),
    [
        ("int8", jnp.bfloat16, 16, 4096),
        ("int8", jnp.float16, 300, 128),
        ("float8_e4m3fn", jnp.bfloat16, 1, 4096),
        ("float8_e4m3fn", jnp.bfloat16, 1024, 4096),
        ("int2", jnp.bfloat16, 16, 128),
        ("nf4", jnp.bfloat16, 16, 64),
        ("nf4", jnp.bfloat16, 1024, 64),
    ],
)
def test_default_configurations_are_fit(qtype, dtype, m, group):
    k = n = 4096
    shape = jax.ShapeDtypeStruct
    qweight = shape((n // 64, k // FORMATS[qtype].tile_k, 2, 256), jnp.int32)
    _, reports = compile_for_h200(
        lambda x, q, s: low_bit_matmul(x, q, s, qtype=qtype, implementation="mosaic_gpu"),
        shape((m, k), dtype),
        qweight,
        shape((k // group, n), dtype),
    )
    assert len(reports) == 1
    assert not reports[0].problems, reports[0].ptxas
