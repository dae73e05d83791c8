import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.decode_attention import decode_attention, default_config

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("dtype", "batch", "heads", "kv_heads", "tokens", "head_dim", "page_size"),
    [
        (jnp.int8, 16, 32, 8, 4096, 128, None),
        (jnp.bfloat16, 64, 32, 8, 8192, 128, None),
        (jnp.float8_e4m3fn, 3, 14, 2, 256, 64, 64),
        (jnp.bfloat16, 2, 8, 8, 512, 128, 128),
    ],
)
def test_kernels_fit_an_h200(dtype, batch, heads, kv_heads, tokens, head_dim, page_size):
    rows, columns = (batch, tokens) if page_size is None else (batch * tokens // page_size, page_size)
    shape = jax.ShapeDtypeStruct
    operands = {
        "q": shape((batch, heads, head_dim), jnp.bfloat16),
        "k": shape((rows, kv_heads, columns, head_dim), dtype),
        "v": shape((rows, kv_heads, head_dim, columns), dtype),
        "lengths": shape((batch,), jnp.int32),
    }
    if jnp.dtype(dtype).itemsize == 1:
        operands |= {name: shape((rows, kv_heads, columns), jnp.float32) for name in ("k_scale", "v_scale")}
    if page_size is not None:
        operands["page_table"] = shape((batch, tokens // page_size), jnp.int32)
    config = default_config(operands["q"], operands["k"], tokens)

    def call(*args):
        return decode_attention(**dict(zip(operands, args, strict=True)), implementation="mosaic_gpu", config=config)

    _, reports = compile_for_h200(call, *operands.values())
    assert len(reports) == 1  # one launch
    assert not reports[0].problems
