import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.attention import Config, attention
from pallas_kernels.attention.cases import CORRECTNESS, SPEED

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("name", "mode", "config"),
    [
        ("d128_s8192_full", "int8_fp8", None),
        ("d128_s2048_causal", "int8_fp8", None),
        ("d128_s8192_causal", "int8_f16", None),
        ("d64_s2048_causal", "int8_fp8", Config(128, 2, 3, False, 2)),
        ("lengths", "int8_int8", None),
        ("padded_head_dim", "f16_fp8", None),
    ],
)
def test_kernels_fit_an_h200(name, mode, config):
    case = (SPEED | CORRECTNESS)[name]
    lengths = {key: jnp.array(value) if key.endswith("lengths") else value for key, value in case.options.items()}

    def shape(tokens, heads):
        return jax.ShapeDtypeStruct((case.batch, tokens, heads, case.head_dim), jnp.bfloat16)

    _, reports = compile_for_h200(
        lambda q, k, v: attention(q, k, v, mode=mode, implementation="mosaic_gpu", config=config, **lengths),
        shape(case.tokens, case.heads),
        shape(case.kv_tokens, case.kv_heads),
        shape(case.kv_tokens, case.kv_heads),
    )
    assert reports
    assert not [problem for report in reports for problem in report.problems]
