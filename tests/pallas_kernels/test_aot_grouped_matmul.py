"""The kernel compiles for an H200 on this machine: no spill, no serialised wgmma, shared memory in bounds."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.grouped_matmul import Config, default_config, grouped_matmul
from pallas_kernels.grouped_matmul.cases import LAYERS

pytestmark = pytest.mark.aot


def compiled(tokens, layer, *, group=128, x=jnp.bfloat16, weight=jnp.int32, zero=False, config=None, **options):
    """Reports on the kernels of one product."""
    experts, k, n, top = LAYERS[layer]
    rows, x = tokens * top, jnp.dtype(x)
    shape = jax.ShapeDtypeStruct
    groups = 1 if group is None else k // group
    packed = (experts, n // 64, k // 64, 2, 256) if weight == jnp.int32 else (experts, n, k)
    scale = shape((experts, groups, n), jnp.bfloat16)
    vectors = {
        "x_scale": shape((rows, 1), jnp.float32) if x.itemsize == 1 else None,
        "row_scale": shape((rows,), jnp.float32) if options.pop("row_scale", False) else None,
    }
    config = config or default_config(rows, experts, k, n, groups, x, weight, zero)
    operands = (shape((rows, k), x), shape(packed, weight), scale, scale if zero else None)

    def fn(x, qweight, scale, zero_point, sizes, vectors):
        return grouped_matmul(
            x, qweight, scale, zero_point, group_sizes=sizes,
            implementation="mosaic_gpu", config=config, **vectors, **options,
        )  # fmt: skip

    return compile_for_h200(fn, *operands, shape((experts,), jnp.int32), vectors)


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 1, "layer": "mixtral-8x7b"},
        {"tokens": 64, "layer": "mixtral-8x7b", "activation": "silu_mul", "row_scale": True},
        {"tokens": 256, "layer": "mixtral-8x7b", "zero": True},
        {"tokens": 4096, "layer": "mixtral-8x7b"},
        {"tokens": 4096, "layer": "mixtral-8x7b", "activation": "silu_mul"},
        {"tokens": 16384, "layer": "mixtral-8x7b", "activation": "silu_mul"},
        {"tokens": 4096, "layer": "mixtral-8x7b", "group": 4096, "x": jnp.float16, "row_scale": True},
        {"tokens": 256, "layer": "qwen3-30b-a3b", "group": 32, "zero": True},
        {"tokens": 4096, "layer": "deepseek-v3"},
        {"tokens": 64, "layer": "deepseek-v3", "x": jnp.int8},
        {"tokens": 4096, "layer": "mixtral-8x7b", "x": jnp.int8, "activation": "silu_mul"},
        {"tokens": 4096, "layer": "mixtral-8x7b", "x": jnp.float8_e4m3fn, "group": 4096},
        {"tokens": 64, "layer": "mixtral-8x7b", "x": jnp.int8, "weight": jnp.int8, "group": None},
        {"tokens": 4096, "layer": "mixtral-8x7b", "x": jnp.int8, "weight": jnp.int8, "group": None, "row_scale": True},
        {"tokens": 16, "layer": "deepseek-v3", "x": jnp.float8_e4m3fn, "weight": jnp.float8_e4m3fn},
        {"tokens": 4096, "layer": "mixtral-8x7b", "x": jnp.int8, "weight": jnp.int8},
        {
            "tokens": 4096,
            "layer": "mixtral-8x7b",
            "x": jnp.float8_e4m3fn,
            "weight": jnp.float8_e4m3fn,
            "group": None,
            "activation": "silu_mul",
        },
        {
            "tokens": 16,
            "layer": "mixtral-8x7b",
            "config": Config(block_m=64, block_k=128, num_stages=4, num_warpgroups=4),
        },
        {"tokens": 1, "layer": "qwen3-30b-a3b", "activation": "silu_mul", "row_scale": True},
    ],
    ids=lambda case: f"{case['layer']}-{case['tokens']}",
)
def test_every_form_is_fit(case):
    hlo, reports = compiled(**case)
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == len(reports) == 1
    assert not reports[0].problems, reports[0].ptxas
