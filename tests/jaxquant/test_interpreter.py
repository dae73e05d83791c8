"""The interpreter by itself: a program on arrays is the program, and special values go through every control flow."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxquant.arrays import _views
from jaxquant.arrays._qarray import dequantize_array, quantize_array
from jaxquant.arrays._spec import PRESETS, PerGroup
from jaxquant.arrays._views import Unrepresentable
from jaxquant.tracing._infer import infer_axes
from jaxquant.tracing._interpreter import Frame, Interpreter, bind


@dataclasses.dataclass(frozen=True)
class Marked:
    """A weight whose products are counted in the results."""

    array: jax.Array
    name: str


jax.tree_util.register_dataclass(Marked, data_fields=["array"], meta_fields=["name"])


class Counter(Interpreter):
    """Emits, for every product with a marked weight, one and the sum of its activation."""

    def is_special(self, value):
        return isinstance(value, Marked)

    def lower(self, value, eqn, frame, reason):
        return value.array

    def sliceable(self, value):
        return value

    def pool(self, emitted, scan):
        return jax.tree.map(lambda leaf: leaf.sum(0), emitted)


def count(counter: Counter, frame: Frame, eqn: core.JaxprEqn, values: list):
    x, w = values
    counter.emit(frame, w.name, {"products": jnp.int32(1), "sum": jnp.sum(x)})
    return bind(frame, eqn, [x, w.array])


Counter.rules = {"dot_general": count}


def run(fn, w, *args):
    jaxpr = jax.make_jaxpr(fn)(w, *args)
    outs, emitted = jax.jit(lambda w, *args: Counter().run(jaxpr, [Marked(w, "w"), *args]))(w, *args)
    np.testing.assert_allclose(outs[0], fn(w, *args), rtol=1e-5, atol=1e-5)
    return emitted["w"]


def test_statistics_leave_scan_checkpoint_and_cond(rng):
    w, x = jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32), jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    assert run(lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 5)[0], w, x)["products"] == 5
    assert run(lambda w, x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x) @ w, w, x)["products"] == 2

    def branches(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x * 2)

    assert run(branches, w, x.at[0, 0].set(1.0))["products"] == 1
    got = run(branches, w, x.at[0, 0].set(-1.0))
    assert (got["products"], got["sum"]) == (0, 0)


def test_statistics_leave_a_while_loop_in_its_carry():
    def loop(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 40, lambda x: x @ w, x)

    assert run(loop, jnp.eye(3) * 2, jnp.ones((2, 3)))["products"] == 3  # 6, 12, 24, 48
    assert run(loop, jnp.eye(3) * 2, jnp.full((2, 3), 7.0))["products"] == 0


def test_custom_derivatives_of_ordinary_values_survive(rng):
    @jax.custom_vjp
    def odd(x):
        return x * 2

    odd.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 7,))
    jaxpr = jax.make_jaxpr(lambda x: jax.nn.relu(odd(x)))(jnp.float32(3))
    through = jax.grad(lambda x: Counter().run(jaxpr, [x])[0][0])
    assert through(jnp.float32(3)) == 7


AXES = {
    "transposed": (lambda w, x: x @ w.T, (24, 32), (-1,)),
    "fused and split": (lambda w, x: jnp.concatenate(jnp.split(x @ w.reshape(32, 24), 2, -1)), (32, 2, 12), (-3,)),
    "heads merged": (lambda w, x: x @ w.reshape(32, 24), (4, 8, 24), (-3, -2)),
    "experts": (lambda w, x: jnp.einsum("td,edf->etf", x, w), (3, 32, 5), (-2,)),
    "vmapped": (lambda w, x: jax.vmap(lambda w: x @ w)(w), (3, 32, 5), (-2,)),
    "scanned": (lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (3, 32, 32), (-2,)),
    "cast, scaled, rematerialised": (
        jax.checkpoint(lambda w, x: x.astype(jnp.bfloat16) @ (2 * w).astype(jnp.bfloat16)), (32, 4), (-2,)
    ),
    "chosen expert": (lambda w, x: jnp.einsum("td,tdf->tf", x, w[jnp.zeros(x.shape[0], int)]), (3, 32, 5), (-2,)),
    "ragged": (lambda w, x: jax.lax.ragged_dot(x, w, jnp.full(3, 2, jnp.int32)), (3, 32, 5), (-2,)),
    "looked up": (lambda w, x: w[jnp.zeros(4, int)], (6, 32), (-1,)),
    "looked up and attended": (lambda w, x: (x + w[jnp.zeros(6, int)]) @ w.T, (7, 32), (-1,)),
    "conditional": (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ (w + 1)), (32, 3), (-2,)),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_axes_are_inferred_in_the_parameters_own_dimensions(name):
    fn, shape, axes = AXES[name]
    x = jax.ShapeDtypeStruct((6, 32), jnp.float32)
    assert infer_axes(lambda p, x: fn(p["w"], x), {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, x) == {"w": axes}


def test_axes_of_flax_attention_and_convolution():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3), name="conv")(x).reshape(2, 16, 16)
            return nn.MultiHeadDotProductAttention(4, name="attention")(x, x)

    model, x = Model(), jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    axes = infer_axes(model.apply, params, x)
    assert axes == {
        "params/conv/kernel": (-4, -3, -2),
        **{f"params/attention/{name}/kernel": (-3,) for name in ("query", "key", "value")},
        "params/attention/out/kernel": (-3, -2),
    }


VIEWS = {
    "transpose": (lambda q: _views.transpose(q, (2, 0, 1)), lambda w: w.transpose(2, 0, 1)),
    "transpose twice": (
        lambda q: _views.transpose(_views.transpose(q, (2, 0, 1)), (1, 2, 0)), lambda w: w
    ),
    "split columns": (lambda q: _views.reshape(q, (3, 64, 6, 8)), lambda w: w.reshape(3, 64, 6, 8)),
    "split groups": (lambda q: _views.reshape(q, (3, 8, 8, 48)), lambda w: w.reshape(3, 8, 8, 48)),
    "split bytes": (lambda q: _views.reshape(q, (3, 16, 4, 48)), lambda w: w.reshape(3, 16, 4, 48)),
    "merge rows": (lambda q: _views.reshape(q, (192, 48)), lambda w: w.reshape(192, 48)),
    "merge all": (lambda q: _views.reshape(q, (3, 64 * 48)), lambda w: w.reshape(3, 64 * 48)),
    "ones": (lambda q: _views.reshape(q, (1, 3, 1, 64, 48, 1)), lambda w: w.reshape(1, 3, 1, 64, 48, 1)),
    "columns": (lambda q: _views.slice_dim(q, 2, 8, 40), lambda w: w[:, :, 8:40]),
    "every third column": (lambda q: _views.slice_dim(q, 2, 1, 40, 3), lambda w: w[:, :, 1:40:3]),
    "part of a group": (lambda q: _views.slice_dim(q, 1, 24, 44), lambda w: w[:, 24:44]),
    "join columns": (lambda q: _views.concatenate([q, q], 2), lambda w: jnp.concatenate([w, w], 2)),
    "join rows": (lambda q: _views.concatenate([q, q], 1), lambda w: jnp.concatenate([w, w], 1)),
    "chosen": (lambda q: _views.take(q, jnp.asarray([[2, 0]]), 0), lambda w: w[jnp.asarray([[2, 0]])]),
    "stretched": (lambda q: _views.broadcast_in_dim(q, (2, 3, 64, 48), (1, 2, 3)), lambda w: jnp.stack([w, w])),
    "scaled": (lambda q: _views.multiply(q, 4.0), lambda w: 4 * w),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("preset", ["w4a16", "w3a16-asym", "nf4", "fp8"])
def test_a_view_of_a_quantized_weight_is_the_view_of_its_values(rng, preset, name):
    chosen = PRESETS[preset]
    if preset != "fp8":
        chosen = dataclasses.replace(chosen, weight=dataclasses.replace(chosen.weight, granularity=PerGroup(16)))
    q = quantize_array(jnp.asarray(rng.normal(size=(3, 64, 48)), jnp.float32), chosen)
    view, want = VIEWS[name]
    if preset == "nf4" and name in ("split bytes", "merge all"):
        with pytest.raises(Unrepresentable):
            view(q)
        return
    made, values, expected = jax.jit(lambda q: (view(q), dequantize_array(view(q)), want(dequantize_array(q))))(q)
    assert made.shape == expected.shape
    np.testing.assert_array_equal(values, expected)
