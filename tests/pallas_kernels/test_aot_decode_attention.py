import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._aot import compile_for_h200
from pallas_kernels.decode_attention import Cache, Config, decode_attention, default_config
from pallas_kernels.decode_attention.config import shared_memory

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("format", "batch", "heads", "kv_heads", "tokens", "head_dim", "page_size", "config"),
    [
        ("int8", 16, 32, 8, 4096, 128, None, None),
        ("bfloat16", 64, 32, 8, 8192, 128, None, None),
        ("float8_e4m3fn", 3, 14, 2, 256, 64, 64, None),
        ("bfloat16", 2, 8, 8, 512, 128, 128, None),
        ("int4", 64, 32, 8, 8192, 128, None, None),
        ("int4", 3, 14, 2, 256, 64, 64, None),
        ("int2", 16, 32, 8, 4096, 128, None, None),
        ("int4", 16, 32, 8, 4096, 128, None, Config(64, 2, 2, teams=2)),
    ],
)
def test_kernels_fit_an_h200(format, batch, heads, kv_heads, tokens, head_dim, page_size, config):
    rows, columns = (batch, tokens) if page_size is None else (batch * tokens // page_size, page_size)
    head, shape = (rows, kv_heads), jax.ShapeDtypeStruct
    q, lengths = shape((batch, heads, head_dim), jnp.bfloat16), shape((batch,), jnp.int32)
    table = None if page_size is None else shape((batch, tokens // page_size), jnp.int32)
    if format in ("int4", "int2"):
        packed = 8 // int(format[-1])
        k, v = (columns // packed, head_dim), (head_dim // packed, columns)
        grids = [shape((*head, *grid), jnp.float16) for grid in ((columns // 32, head_dim), (head_dim // 32, columns))]
        recent = [shape((batch, kv_heads, *x), jnp.bfloat16) for x in ((128, head_dim), (head_dim, 128))]
        cache = Cache(shape((*head, *k), jnp.uint8), shape((*head, *v), jnp.uint8), *grids, *grids, *recent, table)
    else:
        codes = [shape((*head, *x), format) for x in ((columns, head_dim), (head_dim, columns))]
        scales = [None if format == "bfloat16" else shape((*head, columns), jnp.float32)] * 2
        cache = Cache(*codes, *scales, page_table=table)
    config = default_config(q, cache) if config is None else config

    def call(q, lengths, cache):
        return decode_attention(q, **cache._asdict(), lengths=lengths, implementation="mosaic_gpu", config=config)

    _, reports = compile_for_h200(call, q, lengths, cache)
    assert len(reports) == 1  # one launch
    assert not reports[0].problems
    barriers = config.teams * 8 * (config.stages + 4)
    assert reports[0].shared_memory_bytes == shared_memory(q, cache, config) - barriers
