import jax.numpy as jnp

import jaxquant as jq
from experiments import bench_llm_int8 as bench


def test_the_packed_product_is_checked_against_the_plain_one():
    x, trees = bench.problem(3, 5, 400, 256)
    assert int((trees["llm_int8"]["kernel"].index < 400).sum()) == 2
    for tree in trees.values():
        program, args = bench.compiled(jq.pack_for(tree, "h200"), x, 2)
        outs = program(*args)
        assert len(outs) == 2
        plain = jq.quantized(bench.multiply, on_dense="error")(tree, x)
        assert bench.difference(outs[1], plain) <= bench.TOLERANCE < bench.difference(outs[1] * 1.02, plain)


def test_outliers_are_what_the_split_is_for():
    """Their channels stretch every token's scale where they are not taken out."""
    x, trees = bench.problem(4, 7, 400, 256)
    errors = {}
    for name, tree in trees.items():
        dense = jq.dequantize(tree)["kernel"].astype(jnp.float32)
        errors[name] = bench.difference(jq.quantized(bench.multiply)(tree, x), x.astype(jnp.float32) @ dense)
    assert 2 * errors["llm_int8"] < errors["w8a8"]
