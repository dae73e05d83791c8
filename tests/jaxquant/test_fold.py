"""Input scales folded into the layer before: the model's function stays, and what cannot be shown exact stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

WIDTH, HEADS, HEAD, HIDDEN = 16, 2, 8, 24
EPS = float(jnp.finfo(jnp.float32).eps)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def layer(p, x):
    """Attention of full heads, a norm with a shift, a gated MLP, and a stream around both."""
    batch, length, _ = x.shape
    n = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True)) * p["norm1"][None, None]
    q, k, v = ((n @ p[name]).reshape(batch, length, HEADS, HEAD) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1) @ p["o"]
    n = (x - jnp.mean(x, -1, keepdims=True)) * p["norm2"][None, None] + p["shift"][None, None]
    return x + (jax.nn.silu(n @ p["gate"]) * (n @ p["up"])) @ p["down"]


def make(rng):
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
    shapes |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    params = {name: normal(rng, *shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    return params | {name: 1 + normal(rng, WIDTH) / 4 for name in ("norm1", "norm2", "shift")}


def scaled(rng, params, names, **other):
    """Quantized weights with input scales of our own, q, k and v with one, gate and up with one."""
    spec = jq.QuantSpec(jq.TensorSpec("int8"))
    config = jq.QuantConfig(None, tuple(jq.Rule(name, spec) for name in params if params[name].ndim == 2))
    q = jq.quantize(params, config)
    shared = {name: jnp.exp(normal(rng, WIDTH, 1)) for name in ("q", "gate", "o")} | {
        "down": jnp.exp(normal(rng, HIDDEN, 1))
    }
    owner = {"k": "q", "v": "q", "up": "gate"}
    scales = {name: shared[owner.get(name, name)] for name in names} | other
    return q | {name: dataclasses.replace(q[name], pre_scale=scale) for name, scale in scales.items()}


def left(qparams):
    return {name for name, w in qparams.items() if isinstance(w, jq.QArray) and w.pre_scale is not None}


ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("float_values", [False, True])
def test_norms_and_linear_layers_take_the_scales(rng, float_values):
    params, x = make(rng), normal(rng, 2, 5, WIDTH)
    q = scaled(rng, params, ALL)
    if float_values:  # a float layer takes them as well as a quantized one
        q |= {"v": params["v"], "up": params["up"]}
        q = {name: dataclasses.replace(w, pre_scale=None) if name in ("q", "k", "gate") else w for name, w in q.items()}
    folded = jq.fold_pre_scale(layer, q, x)
    assert left(folded) == set()
    assert jax.tree.structure(jq.dequantize(folded)) == jax.tree.structure(params)
    run = jax.jit(jq.quantized(layer))
    before, after = run(q, x), run(folded, x)
    # Factors move to other places of the same products: each of some 2 * 24 terms is rounded once more or less.
    np.testing.assert_allclose(after, before, atol=64 * EPS * float(jnp.abs(before).max()) * 16)
    assert not np.allclose(after, run({n: dataclasses.replace(w, pre_scale=None) if isinstance(w, jq.QArray) else w
                                       for n, w in q.items()}, x), rtol=0.05)  # fmt: skip


def test_what_is_not_exact_stays(rng):
    params, x = make(rng), normal(rng, 2, 5, WIDTH)
    other = scaled(rng, params, ALL, k=jnp.exp(normal(rng, WIDTH, 1)))  # q, k and v read one input
    assert left(jq.fold_pre_scale(layer, other, x)) == {"q", "k", "v"}
    assert left(jq.fold_pre_scale(layer, scaled(rng, params, ("q", "k")), x)) == {"q", "k"}  # v would see it

    def plain_mlp(p, x):  # a nonlinearity lets no scale through
        return jnp.tanh(x @ p["up"]) @ p["down"]

    assert left(jq.fold_pre_scale(plain_mlp, scaled(rng, params, ("up", "down")), x)) == {"up", "down"}

    def read_twice(p, x):  # the norm's output goes elsewhere too
        n = x * p["norm1"][None, None]
        return n + n @ p["q"]

    assert left(jq.fold_pre_scale(read_twice, scaled(rng, params, ("q",)), x)) == {"q"}

    def grouped(p, x):  # a value head that two query heads read cannot take two scales
        v = (x @ p["v"])[..., :HEAD]
        return jnp.concatenate([v, v], -1) @ p["o"]

    assert left(jq.fold_pre_scale(grouped, scaled(rng, params, ("o",)), x)) == {"o"}


def stack_of(rng, layers=3):
    """Parameters of layers in front of each other, and their quantized form with input scales."""
    made = [make(rng) for _ in range(layers)]
    quantized = [scaled(rng, params, ALL) for params in made]
    return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *some) for some in (made, quantized))


def scanned(p, x):
    return jax.lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]


def test_a_stack_under_a_scan_folds_layer_by_layer(rng):
    (params, q), x = stack_of(rng), normal(rng, 2, 5, WIDTH)
    folded = jq.fold_pre_scale(scanned, q, x)
    assert left(folded) == set()
    assert jax.tree.structure(jq.dequantize(folded)) == jax.tree.structure(params)
    for number in range(3):  # each layer as it would be alone
        alone = jq.fold_pre_scale(layer, jax.tree.map(lambda leaf, n=number: leaf[n], q), x)
        one = jax.tree.map(lambda leaf, n=number: leaf[n], folded)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=4 * EPS), one, alone)


def test_a_stack_keeps_its_scales_where_one_layer_must(rng):
    (_, q), x = stack_of(rng), normal(rng, 2, 5, WIDTH)
    odd = dataclasses.replace(q["k"], pre_scale=q["k"].pre_scale.at[1].mul(2.0))  # q, k and v read one input
    assert left(jq.fold_pre_scale(scanned, q | {"k": odd}, x)) == {"q", "k", "v"}

    def read_again(p, x):  # a norm's scale that is read elsewhere as a whole
        return scanned(p, x) + jnp.sum(p["norm2"])

    assert left(jq.fold_pre_scale(read_again, q, x)) == {"gate", "up"}

    def plain(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    stack = jq.quantize(
        {"w": normal(rng, 3, WIDTH, WIDTH)}, jq.QuantConfig(jq.QuantSpec(jq.TensorSpec("int8")), skip=())
    )
    stack["w"] = dataclasses.replace(stack["w"], pre_scale=jnp.ones((3, WIDTH, 1)))
    assert left(jq.fold_pre_scale(plain, stack, x)) == {"w"}


def test_a_tree_without_scales_is_itself(rng):
    params = make(rng)
    assert jq.fold_pre_scale(layer, params, normal(rng, 2, 5, WIDTH)) is params
