import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.attention import attention
from pallas_kernels.attention.cases import CORRECTNESS, SPEED

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("d128_s8192_full", "int8_fp8"),
        ("d128_s2048_causal", "int8_fp8"),
        ("d128_s8192_causal", "int8_f16"),
        ("d64_s2048_causal", "int8_fp8"),
        ("lengths", "int8_int8"),
        ("padded_head_dim", "fp8"),
    ],
)
def test_kernels_fit_an_h200(name, mode):
    case = (SPEED | CORRECTNESS)[name]
    lengths = {key: jnp.array(value) if key.endswith("lengths") else value for key, value in case.options.items()}

    def shape(tokens, heads):
        return jax.ShapeDtypeStruct((case.batch, tokens, heads, case.head_dim), jnp.bfloat16)

    _, reports = compile_for_h200(
        lambda q, k, v: attention(q, k, v, mode=mode, implementation="mosaic_gpu", **lengths),
        shape(case.tokens, case.heads),
        shape(case.kv_tokens, case.kv_heads),
        shape(case.kv_tokens, case.kv_heads),
    )
    assert reports
    assert not [problem for report in reports for problem in report.problems]
