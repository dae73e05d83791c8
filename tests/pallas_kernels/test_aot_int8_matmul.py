"""The kernel compiles for an H200 on this machine: no spill, no serialised wgmma, shared memory in bounds."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.int8_matmul import Config, Int8Weight, default_config, int8_matmul, int8_matmul_many
from pallas_kernels.int8_matmul.cases import BLOCK_SHAPES, SHAPES

pytestmark = pytest.mark.aot

S = jax.ShapeDtypeStruct


def problems(m, k, n, dtype, form="token", *, bias=False, config=None, out_dtype=jnp.bfloat16):
    """What is wrong with the kernel of one product."""
    x_shape, w_shape = {"tensor": ((1, 1), (1, 1)), "block": ((m, k // 128), (k // 128, n // 128))}.get(
        form, ((m, 1), (1, n))
    )
    asymmetric = form == "asymmetric"
    zero = (S((m, 1), jnp.int32), S((n,), jnp.int32)) if asymmetric else (None, None)
    operands = [S((m, k), dtype), S((n, k), dtype), S(w_shape, jnp.float32), S(x_shape, jnp.float32), *zero]

    def fn(x, weight, w_scale, x_scale, zero, weight_sum, bias):
        return int8_matmul(
            x, weight, w_scale, x_scale, x_zero_point=zero, weight_sum=weight_sum, bias=bias,
            out_dtype=out_dtype, implementation="mosaic_gpu", config=config,
        )  # fmt: skip

    _, reports = compile_for_h200(fn, *operands, S((n,), jnp.bfloat16) if bias else None)
    assert len(reports) == 1
    return reports[0].problems


def defaults():
    """One problem for every default that the table's shapes meet."""
    found = {}
    for dtype in ("int8", "float8_e4m3fn"):
        for k, n in SHAPES.values():
            for m in (1, 16, 64, 128, 256, 1024, 4096):
                found.setdefault((dtype, default_config(m, k, n, dtype)), (m, k, n, dtype))
        for k, n in BLOCK_SHAPES.values():
            for m in (16, 64, 4096):
                config = default_config(m, k, n, dtype, blocked=True)
                found.setdefault((dtype, config, "block"), (m, k, n, dtype, "block"))
    return list(found.values())


@pytest.mark.parametrize("case", defaults(), ids=lambda case: "-".join(map(str, case)))
def test_defaults_are_fit(case):
    assert not problems(*case)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    ("m", "form", "out_dtype"),
    [
        (9, "token", jnp.float32),
        (300, "token", jnp.float32),
        (300, "tensor", jnp.float16),
        (1, "asymmetric", jnp.bfloat16),
    ],
)
def test_options_are_fit(m, form, out_dtype, dtype):
    form = "token" if dtype != jnp.int8 and form == "asymmetric" else form
    assert not problems(m, 2048, 1152, dtype, form, bias=True, out_dtype=out_dtype)


@pytest.mark.parametrize("split_k", [2, 4])
def test_split_k_is_fit(split_k):
    config = Config(block_m=16, block_n=128, block_k=256, num_stages=3, weights_first=True, split_k=split_k)
    assert not problems(16, 4096, 4096, jnp.int8, config=config)


@pytest.mark.parametrize(("m", "dtype", "launches"), [(1, "int8", 1), (64, "float8_e4m3fn", 1), (256, "int8", 1),
                                                      (4096, "int8", 1), (4096, "float8_e4m3fn", 3)])  # fmt: skip
def test_several_weights_are_fit(m, dtype, launches):
    weights = [Int8Weight(S((n, 4096), dtype), S((1, n), jnp.float32)) for n in (4096, 1024, 1024)]

    def fn(x, weights, x_scale):
        return int8_matmul_many(x, weights, x_scale, implementation="mosaic_gpu")

    hlo, reports = compile_for_h200(fn, S((m, 4096), dtype), weights, S((m, 1), jnp.float32))
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == launches
    assert not [report.problems for report in reports if report.problems]
