"""The sequential walk: what each weight is quantized from, over every form a stack of layers may have."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.arrays._qarray import dequantize_array, quantize_array
from jaxquant.calibration._lanes import Inputs
from jaxquant.calibration._observe import Watch
from jaxquant.calibration._plan import plan_walk
from jaxquant.calibration._sequential import walk_model
from jaxquant.calibration._walk import Walk
from jaxquant.parameters._lazy import LazyArray
from jaxquant.tracing._arguments import split_arguments
from jaxquant.tracing._flat import flatten_program

SPEC = jq.QuantSpec(jq.TensorSpec("int4"))


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def wide(x):
    return np.asarray(x, np.float64)


def gram(x, y=None):
    rows, other = (wide(a).reshape(-1, a.shape[-1]) for a in (x, x if y is None else y))
    return rows.T @ other


def round_columns(w):
    """int4, a scale a column: what the walks below quantize with."""
    return quantize_array(jnp.asarray(w, jnp.float32), SPEC)


def rounded(w):
    return wide(dequantize_array(round_columns(w)))


class Rounder:
    """Quantizes with round-to-nearest, and keeps the statistics that each unit was quantized from."""

    def __init__(self):
        self.seen, self.calls = {}, []

    def restore(self, name):
        return None

    def joins(self, paths, shapes):
        return True

    def quantize(self, paths, names, leaves, stats):
        self.seen |= dict.fromkeys(names, stats)
        self.calls.append(names)
        return [round_columns(w) for w in leaves]


def walk(model, params, batches, needs=("hessian",), axis=(-2,), **options):
    """Walks with round-to-nearest; gives the quantized weights and the statistics each was made from."""
    rounder = Rounder()
    leaves = {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    watches = {path: Watch(leaf.shape, axis, frozenset(needs)) for path, leaf in leaves.items()}
    return walk_model(model, params, batches, watches, rounder, **options), rounder.seen


def listed(p, x):
    for name in sorted(p):
        x = jnp.tanh(x @ p[name])
    return x


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def scanned_with_outputs(p, x):
    @jax.checkpoint
    def body(x, scanned):
        step, w = scanned
        x = jax.jit(lambda x, w: jnp.tanh(x @ w.T.T))(x, w)
        return x, x * step

    last, steps = jax.lax.scan(body, x, (jnp.arange(3.0), p["w"]))
    return last + steps[1]


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ jax.lax.dynamic_index_in_dim(p["w"], i, 0, False)), x)


def test_each_layer_sees_what_the_quantized_ones_before_it_made(rng):
    w, batches = normal(rng, 3, 8, 8) / 2, [normal(rng, 2, 5, 8), normal(rng, 2, 5, 8)]
    done, seen = walk(listed, dict(zip("abc", w, strict=True)), batches)
    x = np.concatenate([wide(batch) for batch in batches])
    for name, layer in zip("abc", w, strict=True):
        assert seen[name].count.item() == 20
        np.testing.assert_allclose(seen[name].hessian, gram(x), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(done[name].qvalue, round_columns(layer).qvalue)
        x = np.tanh(x @ rounded(layer))


@pytest.mark.parametrize("model", [scanned, scanned_with_outputs, looped])
def test_a_stack_is_walked_layer_by_layer(rng, model):
    w, batches = normal(rng, 3, 8, 8) / 2, [normal(rng, 2, 5, 8)]
    as_list, from_list = walk(listed, dict(zip("abc", w, strict=True)), batches)
    done, seen = walk(model, {"w": w}, batches)
    for i, name in enumerate("abc"):
        jax.tree.map(np.testing.assert_array_equal, seen[f"w[{i}]"], from_list[name])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), as_list[name], done["w"])


def test_a_reordered_stack_is_refused_by_name(rng):
    def model(p, x):
        return scanned({"w": p["w"].transpose(0, 2, 1)}, x)

    with pytest.raises(NotImplementedError, match=r"w: the model reorders it .*sequential=False.*Rule\('w'"):
        walk(model, {"w": normal(rng, 3, 8, 8)}, [normal(rng, 5, 8)], axis=(-1,))


def test_nested_scans(rng):
    w, x = normal(rng, 2, 3, 8, 8) / 2, normal(rng, 5, 8)
    done, seen = walk(lambda p, x: jax.lax.scan(lambda x, w: (scanned({"w": w}, x), None), x, p["w"])[0], {"w": w}, [x])
    value = wide(x)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(seen[f"w[{i}][{j}]"].hessian, gram(value), rtol=1e-3, atol=1e-3)
        value = np.tanh(value @ rounded(w[i, j]))
    np.testing.assert_array_equal(done["w"].qvalue, round_columns(w).qvalue)


def residual_block(p, x):
    hidden = jnp.tanh(x @ p["up"] + 0.1)
    return x + hidden @ p["down"]


def blocks(p, x):
    return jax.lax.scan(lambda x, layer: (residual_block(layer, x), None), x, p)[0]


def make_walk(rng, depth, needs=frozenset({"hessian"})):
    params = {"up": normal(rng, depth, 8, 8), "down": normal(rng, depth, 8, 8)}
    form, arrays = split_arguments((params, normal(rng, 4, 8)), {})
    watches = {name: Watch((depth, 8, 8), (-2,), needs) for name in ("down", "up")}
    flat = flatten_program(blocks, form, arrays, watches)
    plan = plan_walk(flat, form.parameters, watches)
    inputs = Inputs(dict(zip(("down", "up"), arrays, strict=False)), [arrays[2:]])
    return Walk(flat, plan, watches, inputs, Rounder())


def test_compilations_do_not_grow_with_depth(rng):
    shallow, deep = make_walk(rng, 3), make_walk(rng, 7)
    for one in (shallow, deep):
        one.run()
        assert not one.lanes
    assert len(deep.done) == 14
    assert len(deep.segments.compiled) == len(shallow.segments.compiled) <= 4
    assert [len(one.updates) for one in (shallow, deep)] == [1, 1]


def test_cross_statistics_and_the_streams_deviation(rng):
    params = {"a_up": normal(rng, 8, 6), "b_down": normal(rng, 6, 8)}
    params |= {"c_up": normal(rng, 8, 6), "d_down": normal(rng, 6, 8)}
    x = normal(rng, 7, 8)

    def model(p, x):
        x = x + jnp.tanh(x @ p["a_up"]) @ p["b_down"]
        return x + jnp.tanh(x @ p["c_up"]) @ p["d_down"]

    _, seen = walk(model, params, [x], needs=("hessian", "cross", "residual"))
    exact, lossy = wide(x), wide(x)
    for up, down in (("a_up", "b_down"), ("c_up", "d_down")):
        assert not np.any(np.asarray(seen[up].residual))
        np.testing.assert_allclose(seen[up].cross, gram(lossy, exact), rtol=1e-3, atol=1e-3)
        hidden = np.tanh(lossy @ rounded(params[up])), np.tanh(exact @ wide(params[up]))
        np.testing.assert_allclose(seen[down].cross, gram(*hidden), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(seen[down].residual, gram(hidden[0], exact - lossy), rtol=1e-3, atol=1e-3)
        lossy = lossy + hidden[0] @ rounded(params[down])
        exact = exact + hidden[1] @ wide(params[down])


def test_rounded_activations_are_walked_as_they_will_run(rng):
    spec = jq.QuantSpec(jq.TensorSpec("int8"), jq.TensorSpec("int8", jq.PerToken()))
    params, x = {"a": normal(rng, 8, 8), "b": normal(rng, 8, 8)}, normal(rng, 5, 8)
    rounder = Rounder()
    rounder.quantize = lambda paths, names, leaves, stats: [
        rounder.seen.update(dict.fromkeys(names, stats)) or quantize_array(w, spec) for w in leaves
    ]
    watches = {name: Watch((8, 8), (-2,), frozenset({"hessian"})) for name in params}
    walk_model(lambda p, x: x @ p["a"] @ p["b"], params, [x], watches, rounder)
    after = jq.dot_general(x, quantize_array(params["a"], spec), (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(rounder.seen["b"].hessian, gram(after), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(after - x @ params["a"])).max() > 1e-3


def test_a_weight_used_twice_pools_and_stays_float_until_then(rng):
    w, x = normal(rng, 8, 8) / 2, normal(rng, 5, 8)
    _, seen = walk(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}, [x])
    np.testing.assert_allclose(seen["w"].hessian, gram(x) + gram(np.tanh(wide(x) @ wide(w))), rtol=1e-4, atol=1e-4)


def test_parts_of_a_fused_weight_are_all_quantized_when_they_are_used(rng):
    w, v, x = normal(rng, 8, 12), normal(rng, 4, 4), normal(rng, 5, 8)

    def model(p, x):
        q, k, u = (x @ part for part in jnp.split(p["a"], 3, axis=1))
        return (q * k + u) @ p["b"]

    _, seen = walk(model, {"a": w, "b": v}, [x])
    q, k, u = np.split(wide(x) @ rounded(w), 3, axis=1)
    np.testing.assert_allclose(seen["b"].hessian, gram(q * k + u), rtol=1e-3, atol=1e-3)


def test_weights_of_one_input_are_quantized_together(rng):
    rounder, x = Rounder(), normal(rng, 5, 8)
    names = ("a_q", "b_k", "c_v", "d_out", "e_gate", "f_twice")
    params = {name: normal(rng, 8, 8) for name in names}

    def model(p, x):
        h = (x @ p["a_q"]) * (x @ p["b_k"]) + jnp.tanh(x @ p["c_v"])
        h = h @ p["d_out"]
        return (h @ p["e_gate"]) * (h @ p["f_twice"]) @ p["f_twice"]

    watches = {name: Watch((8, 8), (-2,), frozenset({"hessian"})) for name in names}
    walk_model(model, params, [x], watches, rounder)
    assert rounder.calls == [["a_q", "b_k", "c_v"], ["d_out"], ["e_gate"], ["f_twice"]]


def test_branches_pool_over_batches(rng):
    w, batches = normal(rng, 8, 8), [normal(rng, 5, 8), -5 + normal(rng, 5, 8)]

    def model(p, x):
        x = jax.lax.cond(jnp.mean(x) > -2, lambda x: x @ p["a"], lambda x: (2 * x) @ p["a"], x)
        return x @ p["b"]

    _, seen = walk(model, {"a": w, "b": w}, batches)
    np.testing.assert_allclose(seen["a"].hessian, gram(batches[0]) + 4 * gram(batches[1]), rtol=1e-4, atol=1e-4)
    after = np.concatenate([wide(batches[0]), 2 * wide(batches[1])]) @ rounded(w)
    np.testing.assert_allclose(seen["b"].hessian, gram(after), rtol=1e-3, atol=1e-3)


def test_experts_are_walked(rng):
    experts, x = normal(rng, 3, 8, 8), normal(rng, 6, 8)

    def model(p, x):
        sizes = jnp.asarray([2, 1, 3]) + 0 * x.shape[0]
        return jax.lax.ragged_dot(jax.lax.ragged_dot(x, p["a"], sizes), p["b"], sizes)

    _, seen = walk(model, {"a": experts, "b": experts}, [x, x])
    rows = np.split(wide(x), [2, 3])
    for i in range(3):
        np.testing.assert_allclose(seen["a"].hessian[i], 2 * gram(rows[i]), rtol=1e-4, atol=1e-4)
        after = rows[i] @ rounded(experts)[i]
        np.testing.assert_allclose(seen["b"].hessian[i], 2 * gram(after), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda p, x: jax.lax.while_loop(lambda x: x[0, 0] > 9, lambda x: x @ p["w"][0], x), "w: a while uses"),
        (lambda p, x: x @ p["w"][jnp.argmax(x[0, :2])], "w: the model picks layers by an index that depends on data"),
    ],
)
def test_what_cannot_be_walked_is_refused_by_name(rng, model, words):
    with pytest.raises(NotImplementedError, match=words + r".*sequential=False"):
        walk(model, {"w": normal(rng, 2, 8, 8)}, [normal(rng, 5, 8)])


def test_layers_that_no_product_reaches_are_named(rng):
    with pytest.raises(ValueError, match=r"w: .*only some of its layers \(\[1\]"):
        walk(lambda p, x: x @ p["w"][0] @ p["w"][2], {"w": normal(rng, 3, 8, 8)}, [normal(rng, 5, 8)])


def test_batches_of_two_shapes_are_refused(rng):
    with pytest.raises(ValueError, match=r"batch 1 has shapes .*pad or drop the last"):
        walk(listed, {"a": normal(rng, 8, 8)}, [normal(rng, 5, 8), normal(rng, 4, 8)])


def test_lazy_leaves_are_loaded_when_needed_and_freed(rng):
    w, x = rng.normal(size=(4, 8, 8)).astype(np.float32), normal(rng, 5, 8)
    loaded, most = [], []

    def load(i):
        array = w[i].copy()
        loaded.append(weakref.ref(array))
        gc.collect()
        most.append(sum(ref() is not None for ref in loaded))
        return array

    lazy = {name: LazyArray((8, 8), jnp.dtype("float32"), functools.partial(load, i)) for i, name in enumerate("abcd")}
    eager = {name: jnp.asarray(w[i]) for i, name in enumerate("abcd")}
    got, _ = walk(listed, lazy, [x])
    expected, _ = walk(listed, eager, [x], offload=True)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert max(most) <= 2
