import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.activation_quant.cases import SHAPES

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", ["llama3-8b/ffn/prefill", "llama3-8b/hidden/decode"])
def test_kernels_fit_an_h200(shape, norm, group, dtype):
    m, k = SHAPES[shape]
    gain = jax.ShapeDtypeStruct((k,), jnp.float32) if norm else None

    def quantize(x, gain):
        options = {"pre_scale": gain, "epsilon": 1e-6 if norm else None}
        return activation_quant(x, dtype, group_size=group, implementation="mosaic_gpu", **options)

    _, reports = compile_for_h200(quantize, jax.ShapeDtypeStruct((m, k), jnp.bfloat16), gain)
    assert len(reports) == 1
    assert not reports[0].problems
