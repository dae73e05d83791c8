"""Weights packed for a kernel: exactly invertible, run wherever a plain one runs, and never unpacked in silence."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PerGroup, TensorSpec


@pytest.fixture
def tolerance():
    # XLA reads a packed weight rounded to x's dtype, a plain one in codes; both round their result, and a sum of
    # products is rounded once more. Each rounding is at most half an eps of bfloat16 of its own value: four halves
    # in the norm.
    return 2 * 2.0**-8


@pytest.fixture
def kernel():
    return "int4_matmul", "int4_fragments"


def weight(rng, shape, preset="w4a16", group=None, axis=-2, scale=1.0, **changes):
    w = jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)
    config = jq.QuantConfig.preset(preset, group_size=group)
    return dataclasses.replace(quantize_array(w, config.default, axis=axis), **changes)


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_packing_is_inverted_bit_for_bit(rng, assert_same, preset, group):
    q = weight(rng, (2, 256, 100), preset, group)
    packed = jq.pack_for({"a": q, "b": 1}, "h200")
    assert packed["a"].shape == q.shape
    assert packed["a"].qvalue.shape == (2, 2, 4, 2, 256)
    assert_same(jq.pack_for(packed, "plain"), {"a": q, "b": 1})
    np.testing.assert_array_equal(*(np.asarray(jq.dequantize(tree), np.float32) for tree in (packed["a"], q)))


def test_group_padding_survives_the_round_trip(activation, assert_same, agrees_by_kernel):
    q = jq.quantize({"w": activation(200, 64)}, jq.QuantConfig.preset("w4a16", pad=True))["w"]
    assert_same(jq.pack_for(jq.pack_for(q, "h200"), "plain"), q)
    agrees_by_kernel(lambda w, x: x @ w, q, activation(3, 200))


@pytest.mark.parametrize(
    ("preset", "group"),
    [("w4a16", 32), ("w4a16", 128), ("w4a16-asym", 64), ("w4a16-asym", 128), ("w4a16-channel", None)],
)
def test_products_of_every_format(rng, activation, agrees_by_kernel, preset, group):
    q = weight(rng, (256, 100), preset, group)
    agrees_by_kernel(lambda w, x: x @ w, q, activation(2, 3, 256))


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape", "axis"),
    [
        ("btd,dnh->btnh", (2, 3, 128), (128, 2, 64), (-3,)),
        ("btnh,nhd->btd", (2, 3, 2, 128), (2, 128, 64), (-3, -2)),
        ("btd,ndh->btnh", (2, 3, 128), (3, 128, 64), (-2,)),
        ("bsd,ckdh->cbskh", (1, 3, 128), (2, 2, 128, 64), (-2,)),
        ("btd,vd->btv", (2, 3, 128), (96, 128), (-1,)),
    ],
)
def test_einsums_of_models(rng, activation, agrees_by_kernel, subscripts, x_shape, w_shape, axis):
    q = weight(rng, w_shape, axis=axis)
    agrees_by_kernel(lambda w, x: jnp.einsum(subscripts, x, w), q, activation(*x_shape))


def test_factors_and_input_order_of_the_activation(rng, activation, agrees_by_kernel):
    factors = jnp.asarray(rng.uniform(0.5, 2, (128, 1)), jnp.float32)
    order = jnp.asarray(rng.permutation(128)[:, None], jnp.int32)
    q = weight(rng, (128, 64), group=32, pre_scale=factors, perm=order)
    agrees_by_kernel(lambda w, x: x @ w, q, activation(5, 128))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ w.astype(jnp.float32).astype(jnp.bfloat16),
        lambda w, x: (w.T @ x.T).T,
        lambda w, x: x @ w.reshape(128, 2, 32).reshape(128, 64),
        lambda w, x: x @ (w.reshape(1, 128, 64) * jnp.bfloat16(0.5))[0],
        lambda w, x: jax.lax.stop_gradient(x @ w),
        lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x),
    ],
    ids=["cast", "transpose", "reshape", "scalar", "stop_gradient", "remat"],
)
def test_views_that_keep_the_layout(rng, activation, agrees_by_kernel, fn):
    agrees_by_kernel(fn, weight(rng, (128, 64)), activation(3, 128))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ w[:, :32],
        lambda w, x: x[:, :64] @ w[:64],
        lambda w, x: x @ jnp.concatenate([w, w], axis=1),
        lambda w, x: x @ w.reshape(128, 2, 32).transpose(0, 2, 1).reshape(128, 64),
        lambda w, x: x[:, :64] @ w.T,
        lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32),
        lambda w, x: w[jnp.asarray([3, 5])],
    ],
    ids=["outputs", "inputs", "concatenate", "mixed", "other side", "float32", "gather"],
)
def test_what_does_not_keep_the_layout_says_so(rng, activation, assert_close, implementations, fn):
    q = weight(rng, (128, 64), group=64)
    x, packed = activation(3, 128), jq.pack_for(q, "h200")
    assert_close(jax.jit(jq.quantized(fn))(packed, x), jax.jit(jq.quantized(fn))(q, x))
    for name, reason in implementations(fn, packed, x):
        assert name == "xla"
        assert reason.startswith("unpacked in the program: ")


def test_a_float32_result_is_not_rounded(rng, activation, implementations):
    q = jq.pack_for(weight(rng, (128, 64)), "h200")
    fn = lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32)  # noqa: E731
    ((name, reason),) = implementations(fn, q, activation(3, 128))
    assert (name, reason) == ("xla", "unpacked in the program: the kernel gives x's bfloat16, not float32")


def test_stacks_are_scanned_indexed_and_mapped(rng, activation, assert_close, implementations, agrees_by_kernel):
    q = weight(rng, (3, 128, 128), scale=0.1)
    x = activation(2, 128)

    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    packed = jq.pack_for(q, "h200")
    step = jq.quantized(lambda w, x: x @ w)
    looped = x
    for layer in range(3):
        looped = step(jax.tree.map(lambda leaf, layer=layer: leaf[layer], packed), looped)
    assert_close(jax.jit(jq.quantized(scanned))(packed, x), looped)
    assert implementations(scanned, packed, x) == [("int4_matmul", "")]
    agrees_by_kernel(lambda w, x: x @ w[1], q, x)
    agrees_by_kernel(lambda w, x: jax.lax.dynamic_index_in_dim(w, 2, keepdims=False).T @ x.T, q, x)
    agrees_by_kernel(lambda w, x: jax.vmap(lambda w: x @ w)(w), q, x)
    mapped = jax.vmap(step, in_axes=(0, None))(packed, x)
    assert_close(mapped, jax.vmap(step, in_axes=(0, None))(q, x))


def test_low_rank_terms_are_added_to_the_kernel_product(rng, activation, agrees_by_kernel):
    q, x = weight(rng, (128, 64)), activation(3, 128)
    a, b = activation(128, 4), activation(4, 64)
    agrees_by_kernel(lambda w, x: x @ (w + a @ b), q, x)


def test_gradient_reaches_the_activation(rng, activation, assert_close):
    q, x, slope = weight(rng, (128, 64)), activation(3, 128), activation(3, 64)
    loss = lambda x, w: jnp.sum(jq.quantized(lambda w, x: x @ w)(w, x) * slope)  # noqa: E731
    assert_close(jax.grad(loss)(x, jq.pack_for(q, "h200")), jax.grad(loss)(x, q))


def test_what_no_kernel_takes_stays_plain_and_explain_says_why(rng, activation):
    params = {
        "int4": weight(rng, (128, 64)),
        "table": weight(rng, (128, 64), "mxfp4"),
        "activation in groups": weight(rng, (128, 64), activation=TensorSpec("int8", PerGroup(64))),
        "odd groups": weight(rng, (96, 64), group=48),
        "float": activation(128, 64),
    }
    packed = jq.pack_for(params, "h200")
    layouts = {path: getattr(leaf, "layout", None) for path, leaf in packed.items()}
    assert layouts == dict.fromkeys(params, "plain") | {"int4": "int4_fragments", "float": None}

    def fn(p, x):
        return sum(x[:, : w.shape[0]] @ w for w in p.values())

    reasons = {row[0]: row[6] for row in jq.explain(fn, packed, activation(2, 128)).rows}
    assert reasons["int4"] == ""
    assert reasons["table"].startswith("no kernel takes mxfp4 weights; taken are int8, float8_e4m3fn, nf4, int2")
    assert reasons["activation in groups"] == "the scales of its activation differ along its inputs"
    assert reasons["odd groups"].startswith("groups of 48 inputs")


@pytest.mark.parametrize("preset", ["w4a16", "w4a8", "w8a8", "w8a8-tensor"])
@pytest.mark.parametrize("target", ["h200", "plain"])
def test_no_rows_at_all_have_no_results(activation, target, preset):
    q = jq.pack_for(jq.quantize(activation(128, 64), jq.QuantConfig.preset(preset)), target)
    assert jq.quantized(lambda w, x: x @ w)(q, activation(2, 0, 128)).shape == (2, 0, 64)


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match="pack_for: target 'a100'; accepted: 'h200', 'plain'"):
        jq.pack_for({}, "a100")


def test_bits_are_those_of_the_buffers(rng):
    q = jq.pack_for({"w": weight(rng, (256, 128)), "z": weight(rng, (256, 128), "w4a16-asym")}, "h200")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    assert jq.summary(q).nbytes == held
    assert q["w"].bits == 4 + 16 / 128
    assert q["z"].bits == 4 + 32 / 128
    assert jq.summary(q).bits_per_weight == pytest.approx(4 + 24 / 128)


def test_checkpoints_keep_the_layout(rng, assert_same, tmp_path):
    q = jq.pack_for({"w": weight(rng, (2, 128, 64), "w4a16-asym")}, "h200")
    jq.save(tmp_path / "packed", q)
    assert_same(jq.load(tmp_path / "packed"), q)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 64), use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)
        return nn.DenseGeneral(64, (-2, -1), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(heads)


def test_a_flax_model_reaches_the_kernel_and_its_decode_is_its_prefill(rng, activation, assert_close, implementations):
    model, x = Model(), activation(5, 128)
    params = model.init(jax.random.key(int(rng.integers(2**31))), x)
    config = jq.QuantConfig.preset("w4a16", group_size=64)
    qparams = jq.pack_for(jq.quantize(params, config, apply_fn=model.apply, batches=[(x,)]), "h200")
    assert implementations(model.apply, qparams, x) == [("int4_matmul", "")] * 2
    run = jax.jit(jq.quantized(model.apply))
    assert_close(run(qparams, x[2:3]), run(qparams, x)[2:3])
