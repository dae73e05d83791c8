"""Codes and scales trained end to end: the held-out batches are never worse, the gradients are those on paper."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.arrays._qarray import codes_of, pack_padded
from jaxquant.arrays._spec import PRESETS
from jaxquant.calibration._distill import Move, _soften

INT4 = jq.QuantSpec(jq.TensorSpec("int4", jq.PerGroup(16), scale_dtype="bfloat16"))


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)


def squared(reference, output):
    return jnp.mean(jnp.square(reference - output))


def linear(params, x):
    return x @ params["kernel"] + params["bias"][None]


def spoiled(qparams, factor):
    """The scales all off by a factor, which training has to take back."""

    def spoil(leaf):
        if isinstance(leaf, jq.OutlierArray):
            return dataclasses.replace(leaf, base=spoil(leaf.base))
        if not isinstance(leaf, jq.QArray):
            return leaf
        return dataclasses.replace(leaf, scale=(leaf.scale.astype(jnp.float32) * factor).astype(leaf.scale.dtype))

    return jax.tree.map(spoil, qparams, is_leaf=lambda leaf: isinstance(leaf, jq.QArray | jq.OutlierArray))


@pytest.fixture
def start(rng):
    params = {"kernel": normal(rng, 32, 8), "bias": jnp.ones(8)}
    qparams = jq.quantize(params, jq.QuantConfig(INT4))
    return params, qparams, [jnp.asarray(rng.standard_normal((12, 32)), jnp.float32) for _ in range(3)]


def test_no_steps_change_nothing(start):
    params, qparams, batches = start
    assert jq.distill(linear, params, qparams, batches, steps=0) is qparams


@pytest.mark.parametrize("qtype", ["int4", "uint4", "nf4"])
def test_the_gradient_is_the_one_on_paper(rng, qtype):
    w, x = normal(rng, 32, 6), jnp.asarray(rng.standard_normal((20, 32)), jnp.float32)
    spec = jq.QuantSpec(jq.TensorSpec(qtype, jq.PerGroup(16)))  # float32 scales: nothing is rounded in between
    q = jq.quantize({"kernel": w}, jq.QuantConfig(spec))["kernel"]
    gains = jnp.asarray(rng.uniform(0.9, 1.1, q.scale.shape), jnp.float32)
    found = jax.grad(lambda gains: squared(x @ w, x @ _soften(q, Move(gains, None))))(gains)

    dense, wide, g = (np.asarray(a, np.float64) for a in (jq.dequantize({"w": q})["w"], w, gains))
    seen = np.asarray(x, np.float64)
    left = seen @ (dense * np.repeat(g, 16, axis=0) - wide)  # the output's error
    wanted = (2 / left.size) * ((seen.T @ left) * dense).reshape(2, 16, 6).sum(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())  # sums of 20 x 16 float32


@pytest.mark.parametrize("qtype", ["int4", "uint4"])
def test_the_gradient_of_codes_is_the_scale_times_that_of_the_weight(rng, qtype):
    w, x = normal(rng, 32, 6), jnp.asarray(rng.standard_normal((20, 32)), jnp.float32)
    q = jq.quantize({"kernel": w}, jq.QuantConfig(jq.QuantSpec(jq.TensorSpec(qtype, jq.PerGroup(16)))))["kernel"]
    low, high = q.format.qmin, q.format.qmax
    offset = jnp.asarray(rng.integers(-9, 10, w.shape), jnp.float32)  # some leave the range
    found = jax.grad(lambda v: squared(x @ w, x @ _soften(q, Move(jnp.ones(q.scale.shape), v))))(offset)

    scale, code = np.repeat(np.asarray(q.scale, np.float64), 16, axis=0), np.asarray(codes_of(q), np.float64)
    zero = 0.0 if q.zero_point is None else np.repeat(np.asarray(q.zero_point, np.float64), 16, axis=0)
    moved, seen = code + np.asarray(offset), np.asarray(x, np.float64)
    left = seen @ ((np.clip(moved, low, high) - zero) * scale - np.asarray(w, np.float64))
    wanted = (2 / left.size) * (seen.T @ left) * scale
    inside = (moved > low) & (moved < high)  # jnp.clip halves the gradient at its ends
    np.testing.assert_allclose(found[inside], wanted[inside], rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert (np.asarray(found)[(moved < low) | (moved > high)] == 0).all()


@pytest.mark.parametrize("qtype", ["int4", "uint3"])
def test_spoiled_codes_come_back(rng, qtype):
    params = {"kernel": normal(rng, 32, 8), "bias": jnp.ones(8)}
    qparams = jq.quantize(params, jq.QuantConfig(jq.QuantSpec(jq.TensorSpec(qtype, jq.PerGroup(16)))))
    q = qparams["kernel"]
    codes = codes_of(q)
    turned = jnp.clip(codes.astype(jnp.int32) + rng.integers(-2, 3, codes.shape), q.format.qmin, q.format.qmax)
    packed = pack_padded(turned.astype(codes.dtype), q.format, q.axis[-1])
    worse = {**qparams, "kernel": dataclasses.replace(q, qvalue=packed)}
    batches = [jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(3)]
    seen = []
    trained = jq.distill(
        linear, params, worse, batches, steps=80, learning_rate=1e-4, code_rate=0.1, distance=squared,
        report=lambda _, value: seen.append(value),
    )  # fmt: skip
    assert min(seen) < seen[0] / 2
    last = jq.quantized(linear)(trained, batches[-1])
    np.testing.assert_allclose(squared(linear(params, batches[-1]), last), min(seen), rtol=1e-3)
    assert trained["kernel"].qvalue.dtype == q.qvalue.dtype
    assert int(codes_of(trained["kernel"]).max()) <= q.format.qmax


def test_spoiled_scales_come_back_and_codes_stay(start):
    params, qparams, batches = start
    worse, seen = spoiled(qparams, 1.3), []
    tuned = jq.distill(
        linear, params, worse, batches, steps=60, learning_rate=0.02, code_rate=0.0, distance=squared,
        report=lambda step, value: seen.append((step, value)),
    )  # fmt: skip
    errors = {name: squared(linear(params, batches[-1]), jq.quantized(linear)(q, batches[-1]))
              for name, q in {"start": worse, "tuned": tuned}.items()}  # fmt: skip
    assert errors["tuned"] < errors["start"] / 2
    assert [step for step, _ in seen] == [0, *range(2, 62, 2)]
    np.testing.assert_allclose(min(value for _, value in seen), errors["tuned"], rtol=1e-3)
    kernel = tuned["kernel"]
    assert jnp.array_equal(kernel.qvalue, qparams["kernel"].qvalue)
    assert kernel.scale.dtype == jnp.bfloat16
    assert not jnp.array_equal(kernel.scale, worse["kernel"].scale)
    assert tuned["bias"] is params["bias"]


def test_never_worse_than_the_start_on_held_out_batches(start):
    params, qparams, batches = start
    tuned = jq.distill(linear, params, qparams, batches, steps=7, learning_rate=0.4, distance=squared)
    assert jnp.array_equal(tuned["kernel"].scale, qparams["kernel"].scale)
    assert jnp.array_equal(tuned["kernel"].qvalue, qparams["kernel"].qvalue)


class Stack(nn.Module):
    """A scan over rematerialised layers, and a head."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        stack = self.param("stack", nn.initializers.lecun_normal(), (2, 32, 32)).astype(self.dtype)
        step = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
        x, _ = jax.lax.scan(step, x.astype(self.dtype), stack)
        return nn.Dense(8, name="out")(x.astype(jnp.float32))


@pytest.mark.parametrize("form", ["uint4 stack", "w8a8", "outliers"])
def test_trees_of_every_kind(rng, form):
    model = Stack(jnp.dtype("float32" if form == "outliers" else "bfloat16"))
    x = jnp.asarray(rng.standard_normal((9, 32)), jnp.float32)
    params = model.init(jax.random.key(int(rng.integers(1 << 30))), x)
    config = {
        "uint4 stack": jq.QuantConfig(jq.QuantSpec(jq.TensorSpec("uint4", jq.PerGroup(16), scale_dtype="bfloat16"))),
        "w8a8": jq.QuantConfig(PRESETS["w8a8"]),
        "outliers": jq.QuantConfig(INT4, algorithm=jq.salient(fraction=0.1)),
    }[form]
    batches = [x, x[:, ::-1], x + 1.0]
    worse = spoiled(jq.quantize(params, config, apply_fn=model.apply, batches=batches), 1.3)
    seen = []
    options = {"steps": 40, "learning_rate": 0.03, "distance": squared, "report": lambda _, value: seen.append(value)}
    tuned = jq.distill(model.apply, params, worse, batches, **options)
    assert min(seen) < seen[0] / 2
    assert jax.tree.structure(tuned) == jax.tree.structure(worse)


def test_an_nnx_state(rng):
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(int(rng.integers(1 << 30))))
    graph, state = nnx.split(layer)
    qstate = spoiled(jq.quantize(state, jq.QuantConfig(INT4)), 1.3)
    batches = [jnp.asarray(rng.standard_normal((9, 32)), jnp.float32) for _ in range(2)]

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    seen = []
    options = {"steps": 40, "learning_rate": 0.03, "distance": squared}
    jq.distill(apply, state, qstate, batches, report=lambda _, value: seen.append(value), **options)
    assert seen[-1] < seen[0] / 2


def test_refusals_name_what_is_wrong(start):
    params, qparams, batches = start
    mxfp4 = jq.quantize(params, jq.QuantConfig(PRESETS["mxfp4"]))
    packed = {**qparams, "kernel": dataclasses.replace(qparams["kernel"], layout="int4")}
    nan = [jnp.full((2, 32), jnp.nan)] * 2
    for given, options, message in (
        ((params, mxfp4, batches), {}, "kernel: the scales of mxfp4"),
        ((params, packed, batches), {}, "kernel: layout 'int4' is packed"),
        ((params, params, batches), {}, "holds no quantized weight"),
        ((params, qparams, batches[:1]), {}, "give at least 2"),
        ((params, qparams, batches), {"learning_rate": 0.0}, "learning_rate=0.0"),
        ((params, qparams, batches), {"code_rate": -1.0}, "code_rate=-1.0"),
        ((params, qparams, nan), {}, "is nan at the start"),
    ):
        with pytest.raises(ValueError, match=message):
            jq.distill(linear, *given, **options)
