"""The decode kernel's body on a CPU, block by block: barriers that never complete show as a hang here.

The inline PTX that unpacks codes is replaced by what it must yield.
"""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import Cache, Config, columns, operand, supports
from pallas_kernels.decode_attention.layout import in_row_order, pack_keys, pack_values, unpack_keys, unpack_values
from pallas_kernels.decode_attention.reference import decode_attention_reference, dequantize_codes

kernel = importlib.import_module("pallas_kernels.decode_attention.mosaic_gpu")


def channels_in_order(x, bits):
    """Row 16 j + 8 h + 2 c + e of the result is number 4 j + 2 h + e of the runs of rows of x [H, C] that c takes."""
    run = operand.key_run(x.shape[0], bits)
    return x.reshape(-1, 4, run // 4, 2, 2, x.shape[1]).transpose(0, 2, 3, 1, 4, 5).reshape(x.shape)


def keys_operand(codes, scale, offset, *, bits, first, depth):
    keys = channels_in_order(in_row_order(_floats(codes, scale, offset, bits, unpack_keys)).T, bits).T
    return keys[:, first : first + depth]


def values_operand(codes, scale, offset, *, bits, first, depth):
    return in_row_order(_floats(codes, scale, offset, bits, unpack_values).T).T[:, first : first + depth]


def _floats(codes, scale, offset, bits, unpack):
    if scale is None:
        return codes[...].astype(jnp.float16)
    return dequantize_codes(unpack(codes[...], bits), scale[...], offset[...], bits).astype(jnp.float16)


@pytest.fixture
def interpreted(monkeypatch, complete_interpreter):
    monkeypatch.setattr(operand, "keys_operand", keys_operand)
    monkeypatch.setattr(operand, "values_operand", values_operand)
    monkeypatch.setattr(operand, "channel_order", lambda rows, bits: channels_in_order(rows[...].T, bits))
    monkeypatch.setattr(operand, "token_order", lambda x: in_row_order(x[...][:, None])[:, 0])

    monkeypatch.setattr(columns, "over_rows", lambda op, x, _: {"max": jnp.max, "add": jnp.sum}[op](x, axis=0))
    monkeypatch.setattr(columns, "any_row", lambda x: x[0])

    def run(q, lengths, cache, config):
        assert supports(q, cache, config) is None
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
            return kernel.decode_attention_mosaic_gpu(q, lengths, cache, scale=0.125, config=config)

    return run


def random_cache(rng, format: str, batch: int, tokens: int, page_size: int | None, kv_heads=2, head_dim=64) -> Cache:
    """A cache of bytes of any value, in pages in any order where there are some."""
    rows, size = (batch, tokens) if page_size is None else (batch * tokens // page_size, page_size)
    k_shape, v_shape = (rows, kv_heads, size, head_dim), (rows, kv_heads, head_dim, size)
    table = None
    if page_size is not None:
        table = jnp.asarray(rng.permutation(rows).reshape(batch, -1), jnp.int32)
    normal = lambda shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    if format == "bf16":
        return Cache(normal(k_shape, jnp.bfloat16), normal(v_shape, jnp.bfloat16), page_table=table)
    recent = (
        normal((batch, kv_heads, 64, head_dim), jnp.bfloat16),
        normal((batch, kv_heads, head_dim, 64), jnp.bfloat16),
    )
    if format.startswith("int8"):
        codes = [jnp.asarray(rng.integers(-128, 128, shape), jnp.int8) for shape in (k_shape, v_shape)]
        scales = [jnp.asarray(rng.uniform(0.005, 0.02, k_shape[:3]), jnp.float32) for _ in range(2)]
        return Cache(*codes, *scales, None, None, *(recent if "ring" in format else [None, None]), table)
    bits = int(format[-1])
    packed = [
        pack(jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8), bits)
        for pack, shape in ((pack_keys, k_shape), (pack_values, v_shape))
    ]
    grids = [(rows, kv_heads, size // 32, head_dim), (rows, kv_heads, head_dim // 32, size)]
    scales = [jnp.asarray(rng.uniform(1, 2, shape), jnp.float16) for shape in grids]
    offsets = [normal(shape, jnp.float16) - jnp.float16(2) for shape in grids]
    return Cache(*packed, *scales, *offsets, *recent, table)


# A ring that covers all, half a tile left in it, a tile that is partly in both; more blocks than tiles.
@pytest.mark.parametrize(
    ("format", "lengths", "page_size", "config"),
    [
        ("bf16", (256, 0, 70), None, Config(64, 2, 2)),
        ("int8 with a ring", (200, 1, 97), None, Config(64, 2, 2, teams=2)),
        ("int8", (256, 130, 5), 128, Config(128, 2, 2)),
        ("int4", (161, 200, 97), 128, Config(64, 2, 2, teams=2)),
        ("int2", (193, 40, 0), None, Config(64, 2, 1)),
    ],
)
def test_interpreted_kernel_is_the_reference(rng, interpreted, format, lengths, page_size, config):
    cache = random_cache(rng, format, 3, 256, page_size)
    q = jnp.asarray(rng.normal(size=(3, 6, 64)), jnp.bfloat16)
    lengths = jnp.array(lengths, jnp.int32)
    out = interpreted(q, lengths, cache, config).astype(jnp.float32)
    expected = decode_attention_reference(q.astype(jnp.float32), lengths, cache, scale=0.125)
    # Weights, keys, values and the result are rounded to 16 bits, at worst bfloat16's 2**-9 each.
    error, norm = (np.linalg.norm(np.asarray(x), axis=(1, 2)) for x in (out - expected, expected))
    assert (error <= 2.0**-7 * norm).all()
