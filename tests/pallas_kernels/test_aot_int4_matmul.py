"""The kernel compiles for an H200 on this machine: no spill, no serialised wgmma, shared memory in bounds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.int4_matmul import Config, Int4Weight, default_config, int4_matmul, int4_matmul_many
from pallas_kernels.int4_matmul.cases import SHAPES, TOKENS
from pallas_kernels.int4_matmul.choice import tuned_entries

pytestmark = pytest.mark.aot


def compiled(m, k, n, group, *, dtype=jnp.bfloat16, scale_dtype=None, zero=False, bias=False, config=None):
    """Reports on the kernels of one product."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    qweight = jax.ShapeDtypeStruct((-(-n // 64), -(-k // 64), 2, 256), jnp.int32)
    grid = jax.ShapeDtypeStruct((k // group, n), scale_dtype or dtype)
    operands = [shape(m, k), qweight, grid, grid if zero else None, shape(n) if bias else None]

    def fn(x, q, s, z, b):
        return int4_matmul(x, q, s, z, bias=b, implementation="mosaic_gpu", config=config)

    return compile_for_h200(fn, *operands)


# Every tuned configuration, and every default that the table's shapes meet.
@functools.cache
def used():
    found = {Config(**e["config"]): (e["m"], e["k"], e["n"]) for e in tuned_entries()}
    for k, n in (*SHAPES.values(), (4096, 1024), (4096, 14336), (4096, 128256)):
        for m in (*TOKENS, 300):
            found.setdefault(default_config(m, k, n, k // 128), (m, k, n))
    return found


@pytest.mark.parametrize("index", range(45))
def test_tuned_and_default_configurations_are_fit(index):
    cases = list(used().items())
    assert len(cases) <= 45
    if index >= len(cases):
        pytest.skip(f"there are {len(cases)} configurations")
    config, (m, k, n) = cases[index]
    hlo, reports = compiled(m, k, n, 128, config=config)
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == len(reports) == 1
    assert not reports[0].problems, reports[0].ptxas


# Blocks that share x.
SHARED = Config(
    block_m=64, block_k=128, num_stages=2, num_warpgroups=2, split_k=1, multicast=2, scale_after=False, snake_width=4
)


@pytest.mark.parametrize(
    "case",
    [
        {"m": 3, "k": 1056, "n": 320, "group": 32, "zero": True, "dtype": jnp.float16},
        {"m": 150, "k": 1056, "n": 320, "group": 32, "zero": True, "dtype": jnp.float16},
        {"m": 48, "k": 1600, "n": 1088, "group": 64, "zero": True, "bias": True},
        {"m": 257, "k": 1000, "n": 100, "group": 1000, "bias": True},
        {"m": 16, "k": 4096, "n": 4096, "group": 128, "zero": True, "scale_dtype": jnp.float32},
        {"m": 300, "k": 4096, "n": 1024, "group": 4096, "scale_dtype": jnp.float32},
        {"m": 64, "k": 1024, "n": 512, "group": 128, "config": dataclasses.replace(SHARED, scale_after=True)},
        {"m": 300, "k": 1024, "n": 512, "group": 128, "config": dataclasses.replace(SHARED, block_m=256)},
    ],
    ids=lambda case: f"m{case['m']}-g{case['group']}",
)
def test_every_option_is_fit(case):
    _, reports = compiled(**case)
    assert len(reports) == 1
    assert not reports[0].problems, reports[0].ptxas


# q, k, v of grouped queries, and sizes that no tile divides.
@pytest.mark.parametrize(
    ("m", "outputs"), [(1, (4096, 1024, 1024)), (16, (4096, 1024, 1024)), (300, (1088, 64)), (48, (100, 320))]
)
def test_several_weights_are_one_launch(m, outputs):
    k, shape = 1024, jax.ShapeDtypeStruct
    weights = [
        Int4Weight(shape((-(-n // 64), k // 64, 2, 256), jnp.int32), shape((8, n), jnp.bfloat16)) for n in outputs
    ]
    hlo, reports = compile_for_h200(
        lambda x, *weights: int4_matmul_many(x, weights, implementation="mosaic_gpu"),
        shape((m, k), jnp.bfloat16),
        *weights,
    )
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == len(reports) == 1
    assert not reports[0].problems, reports[0].ptxas


# Codes of activations: few tokens and many, groups and channels, results of 16 and 32 bits, shared and split clusters.
@pytest.mark.parametrize(
    ("dtype", "m", "k", "n", "group", "out_dtype", "changes"),
    [
        ("int8", 1, 4096, 4096, 128, jnp.bfloat16, {}),
        ("int8", 60, 4096, 320, 64, jnp.float32, {}),
        ("int8", 300, 8192, 8192, 128, jnp.bfloat16, {"multicast": 2, "num_stages": 2}),
        ("int8", 300, 1090, 100, 1090, jnp.float16, {}),
        ("float8_e4m3fn", 9, 1088, 64, 1088, jnp.bfloat16, {}),
        ("int8", 4096, 8192, 8192, 8192, jnp.bfloat16, {"block_m": 256, "num_stages": 2, "multicast": 2}),
        ("float8_e4m3fn", 16, 14336, 4096, 14336, jnp.bfloat16, {}),
        ("float8_e4m3fn", 130, 4096, 4096, 128, jnp.float32, {"split_k": 2, "num_stages": 2}),
        ("float8_e4m3fn", 4096, 8192, 8192, 8192, jnp.bfloat16, {"multicast": 2}),
    ],
)
def test_products_of_codes_are_fit(dtype, m, k, n, group, out_dtype, changes):
    shape = jax.ShapeDtypeStruct
    qweight, scale = shape((-(-n // 64), -(-k // 64), 2, 256), jnp.int32), shape((k // group, n), jnp.bfloat16)
    config = dataclasses.replace(default_config(m, k, -(-n // 64) * 64, k // group, dtype), **changes)

    def fn(x, q, s, x_scale):
        options = {"out_dtype": out_dtype, "implementation": "mosaic_gpu", "config": config}
        return int4_matmul(x, q, s, x_scale=x_scale, **options)

    _, reports = compile_for_h200(fn, shape((m, k), dtype), qweight, scale, shape((m, 1), jnp.float32))
    assert len(reports) == 1
    assert not reports[0].problems, reports[0].ptxas
