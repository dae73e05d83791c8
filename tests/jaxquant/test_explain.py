"""`explain` shows everything that is passed over, and what `quantized` refuses it refuses by name."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxquant._quantize import quantize
from jaxquant.arrays._spec import QuantConfig, Rule
from jaxquant.tracing._quantized import explain, quantized

CONFIG = QuantConfig(QuantConfig.preset("w4a16", group_size=16).default, skip=())


def params(*names, shape=(32, 16)):
    return quantize({name: jnp.ones(shape) for name in names}, CONFIG)


def test_every_parameter_has_its_line():
    tree = {
        "block": {"kernel": jnp.ones((32, 16)), "bias": jnp.ones(16), "steps": jnp.ones((2, 2), jnp.int32)},
        "router": {"kernel": jnp.ones((32, 2))},
        "adapter": {"kernel": jnp.ones((32, 16))},
    }
    config = QuantConfig.preset("w4a16", group_size=16, rules=[Rule("adapter/.*", None)])
    qparams = quantize(tree, config)
    explanation = explain(lambda p, x: x @ p["block"]["kernel"], qparams, jnp.ones((3, 32)), config=config)
    assert [(row[0], row[1], row[3], row[4], row[5], row[7]) for row in explanation.rows] == [
        ("block/kernel", "int4", (32, 16), "dot_general", "xla", 1)
    ]
    assert explanation.rows[0][2] == 5.0  # four bits and a bfloat16 scale for every sixteen codes
    why = {path: reason for path, _, reason in explanation.left}
    assert set(why) == {"adapter/kernel", "block/bias", "block/steps", "router/kernel"}
    assert "rule 'adapter/.*' leaves it" in why["adapter/kernel"]
    assert "int32" in why["block/steps"]
    assert "router" in why["router/kernel"]
    for path in (*why, "block/kernel"):
        assert path in str(explanation)


def test_a_dense_use_is_shown_and_refused():
    def model(p, x):
        return x @ jnp.tanh(p["w"]) + x @ p["v"]

    qparams, x = params("w", "v"), jnp.ones((3, 32))
    explanation = explain(model, qparams, x)
    assert explanation.dense == ("w",)
    assert explanation.products == 1
    assert "tanh" in str(explanation)
    assert "DENSE: no rule for this primitive" in str(explanation)
    assert quantized(model)(qparams, x).shape == (3, 16)
    with pytest.raises(ValueError, match=r"w: tanh would dequantize .*Rule\('w', None\)"):
        quantized(model, on_dense="error")(qparams, x)


def test_uses_are_counted_by_place_in_the_program():
    def model(p, x):
        body = jax.jit(lambda w, x: jnp.tanh(x @ w))
        x = body(p["w"], body(p["w"], x))
        return jax.lax.scan(lambda x, _: (x @ p["w"], None), x, None, 5)[0]

    explanation = explain(model, params("w", shape=(16, 16)), jnp.ones((3, 16)))
    assert explanation.products == 3


def test_parameters_closed_over_are_an_error():
    qparams, floats = params("w", "v"), {"w": jnp.ones((32, 16)), "v": jnp.ones((32, 16))}
    for run in (quantized, lambda f: lambda *a: explain(f, *a)):
        with pytest.raises(ValueError, match=r"never used .*: v, w\. .*closed over instead of passed"):
            run(lambda p, x: x @ floats["w"])(qparams, jnp.ones((3, 32)))
        with pytest.raises(ValueError, match=r"never used .*: v\. "):
            run(lambda p, x: x @ p["w"])(qparams, jnp.ones((3, 32)))


@pytest.mark.parametrize(
    "cut",
    [lambda w: w[3:9], lambda w: w[::2], lambda w: jax.lax.dynamic_slice_in_dim(w, jnp.int32(1), 4)],
)
def test_a_slice_inside_a_byte_names_the_parameter_and_the_remedy(cut):
    with pytest.raises(ValueError, match=r"w: (dynamic_)?slice .*share bytes.*Rule\(pattern, None\)"):
        quantized(lambda p: cut(p["w"]).sum())(params("w"))


def test_whole_bytes_may_be_sliced():
    def model(p, x):
        return x @ p["w"][16:]

    assert explain(model, params("w"), jnp.ones((3, 16))).dense == ()


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"on_dense='warn'; accepted: 'record', 'error'"):
        quantized(lambda x: x, on_dense="warn")


def test_flax_still_checks_its_shapes():
    model, x = nn.Dense(16), jnp.ones((3, 32))
    qparams = quantize(model.init(jax.random.key(0), x), CONFIG)
    with pytest.raises(Exception, match="kernel"):
        quantized(model.apply)(qparams, jnp.ones((3, 24)))


def test_explain_takes_shapes_for_arrays():
    explanation = explain(lambda p, x: x @ p["w"], params("w"), jax.ShapeDtypeStruct((3, 32), jnp.float32))
    assert explanation.products == 1


def test_a_weight_that_no_kernel_takes_says_why():
    """Groups that the kernels do not cut stages by; a weight that could be packed and is not says nothing."""
    tree = {
        name: quantize(jnp.ones((384, 64)), QuantConfig.preset("w4a16", group_size=size))
        for name, size in (("odd", 96), ("usual", 128))
    }
    explained = explain(lambda p, x: x @ p["odd"] + x @ p["usual"], tree, jnp.ones((2, 384)))
    why = "groups of 96 inputs; the kernel takes 32, 64, 128, a multiple of 256, or one group"
    assert [row[5:7] for row in explained.rows] == [("xla", why), ("xla", "")]
