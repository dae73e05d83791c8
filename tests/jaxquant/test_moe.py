"""`moe` against NumPy in float64: routings, quantized and float experts, group sizes of every kind, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.products._moe import COMPARED, sort_by_expert

D, F = 32, 64
ROUTINGS = {
    "mixtral": (8, jq.Routing(per_token=2)),
    "qwen raw": (6, jq.Routing(per_token=3, normalised=False)),
    "one": (5, jq.Routing(per_token=1)),
    "every": (4, jq.Routing(per_token=4)),
    "deepseek v2": (12, jq.Routing(3, normalised=False, groups=4, groups_per_token=2, group_best=1, scale=16.0)),
    "deepseek v3": (16, jq.Routing(4, "sigmoid", groups=4, groups_per_token=2, scale=2.5)),
}


def oracle_route(logits, routing, bias=None):
    """Each token on its own, in float64: (weights, experts), experts in ascending order."""
    logits = np.asarray(logits, np.float64)
    weights = np.zeros(logits.shape)
    for token, row in enumerate(logits):
        scores = np.exp(row) / np.exp(row).sum() if routing.score == "softmax" else 1 / (1 + np.exp(-row))
        ranked = scores if bias is None else scores + np.asarray(bias, np.float64)
        size = len(row) // routing.groups
        groups = [sum(sorted(ranked[g * size : (g + 1) * size])[-routing.group_best :]) for g in range(routing.groups)]
        kept = np.argsort(groups)[-routing.groups_per_token :]
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: ranked[e])[-routing.per_token :]
        total = sum(scores[chosen]) if routing.normalised else 1.0
        weights[token, chosen] = scores[chosen] / total * routing.scale
    return weights


def draw_logits(rng, tokens, experts, routing, bias=None, dtype=jnp.float32):
    """Logits [T, E] that no rounding of float32 routes otherwise: scores, and those of groups, lie 1e-5 apart."""
    rows = []
    while len(rows) < tokens:
        row = np.asarray(jnp.asarray(2 * rng.normal(size=experts), dtype), np.float32)
        scores = np.exp(row) / np.exp(row).sum() if routing.score == "softmax" else 1 / (1 + np.exp(-row))
        ranked = scores if bias is None else scores + np.asarray(bias)
        groups = np.sort(ranked.reshape(routing.groups, -1))[:, -routing.group_best :].sum(1)
        if all(np.diff(np.sort(each)).min(initial=1.0) > 1e-5 for each in (ranked, groups)):
            rows.append(row)
    return jnp.asarray(np.stack(rows))


def oracle_moe(x, weights, gate, up, down, shared=None):
    """The weighted sum over experts, every expert computed for every token, in float64."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))

    def through(gate, up, down):
        pre = x @ gate
        return (pre / (1 + np.exp(-pre)) * (x @ up)) @ down

    out = sum(weights[:, [e]] * through(gate[e], up[e], down[e]) for e in range(len(gate)))
    return out if shared is None else out + through(*(np.asarray(w, np.float64) for w in shared))


@pytest.fixture
def layer(rng):
    """Draws (x [T, D], logits [T, E], gate, up, down)."""

    def make(experts, tokens, routing=ROUTINGS["mixtral"][1], dtype=jnp.float32):
        shapes = ((tokens, D), (experts, D, F), (experts, D, F), (experts, F, D))
        scales = (1, D**-0.5, D**-0.5, F**-0.5)
        draws = (rng.normal(size=shape) * scale for shape, scale in zip(shapes, scales, strict=True))
        x, *weights = (jnp.asarray(a, dtype) for a in draws)
        return [x, draw_logits(rng, tokens, experts, routing, dtype=dtype).astype(dtype), *weights]

    return make


# A layer is three products in a row and a sum of k terms; a float32 sum of K <= 64 terms in any order is within
# K eps of the sum of their magnitudes, about sqrt(K) times its own norm. Together 3 * 64**1.5 eps of the norm, and the
# experts' weights carry a few eps more: 1600 eps.
TOLERANCE = 1600 * float(jnp.finfo(jnp.float32).eps)


def assert_near(got, wanted, tolerance=TOLERANCE):
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routes_as_written_out_in_numpy(rng, name):
    experts, routing = ROUTINGS[name]
    bias = jnp.asarray(rng.normal(size=experts) * 0.1, jnp.float32) if routing.score == "sigmoid" else None
    logits = draw_logits(rng, 40, experts, routing, bias)
    weights, chosen = jax.jit(jq.route, static_argnums=1)(logits, routing, bias)
    placed = np.zeros((40, experts))
    np.put_along_axis(placed, np.asarray(chosen), np.asarray(weights, np.float64), axis=1)
    # softmax, division and scale: a few roundings of float32
    np.testing.assert_allclose(placed, oracle_route(logits, routing, bias), rtol=32 * 1.2e-7, atol=1e-12)


def test_normalising_is_the_softmax_of_the_chosen_logits(rng):
    logits = jnp.asarray(rng.normal(size=(30, 8)), jnp.float32)
    weights, chosen = jq.route(logits, jq.Routing(per_token=3))
    after = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1), axis=-1)
    np.testing.assert_allclose(weights, after, rtol=32 * 1.2e-7)


@pytest.mark.parametrize("name", ROUTINGS)
def test_float_experts_are_those_of_numpy(layer, name):
    experts, routing = ROUTINGS[name]
    x, logits, *weights = layer(experts, 23, routing)
    got = jax.jit(jq.moe, static_argnums=5)(x, logits, *weights, routing)
    assert_near(got, oracle_moe(x, oracle_route(logits, routing), *weights))


SPECS = {"w4a16": 32, "w4a16-asym": 32, "w8a16": None}


def quantize_experts(weights, preset):
    spec = jq.QuantConfig.preset(preset).default
    if (size := SPECS[preset]) is not None:
        spec = dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, granularity=jq.PerGroup(size)))
    made = jq.quantize(dict(zip(("1 gate", "2 up", "3 down"), weights, strict=True)), jq.QuantConfig(spec))
    return [made[name] for name in sorted(made)]


@pytest.mark.parametrize("preset", SPECS)
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_quantized_experts_are_those_of_their_float_weights(layer, preset, tokens):
    routing = jq.Routing(per_token=2)
    x, logits, *weights = layer(7, tokens)
    quantized = quantize_experts(weights, preset)
    got = jax.jit(jq.moe, static_argnums=5)(x, logits, *quantized, routing)
    assert_near(got, oracle_moe(x, oracle_route(logits, routing), *map(jq.dequantize, quantized)))


@pytest.mark.parametrize("crowd", [0, 3, 6])
def test_all_tokens_may_go_to_one_expert(layer, crowd):
    x, logits, *weights = layer(7, 19)
    logits = logits.at[:, crowd].add(100.0)
    routing = jq.Routing(per_token=1)
    quantized = quantize_experts(weights, "w4a16")
    got = jax.jit(jq.moe, static_argnums=5)(x, logits, *quantized, routing)
    assert_near(got, oracle_moe(x, oracle_route(logits, routing), *map(jq.dequantize, quantized)))


def test_shared_experts_are_added(layer, rng):
    routing = jq.Routing(per_token=2)
    x, logits, *weights = layer(4, 9)
    shared = tuple(jnp.asarray(rng.normal(size=size) * 0.2, jnp.float32) for size in ((D, 48), (D, 48), (48, D)))
    got = jq.moe(x, logits, *weights, routing, shared=shared)
    assert_near(got, oracle_moe(x, oracle_route(logits, routing), *weights, shared))
    coded = tuple(jq.quantize({"w": w}, jq.QuantConfig.preset("w8a16"))["w"] for w in shared)
    got = jq.moe(x, logits, *weights, routing, shared=coded)
    wanted = oracle_moe(x, oracle_route(logits, routing), *weights, tuple(map(jq.dequantize, coded)))
    assert_near(got, wanted)


def test_the_order_of_experts_and_of_tokens_does_not_matter(layer, rng):
    """Renumbering experts changes no bit where no scores tie; shuffling tokens shuffles the rows of the result."""
    routing = jq.Routing(per_token=3)
    x, logits, *weights = layer(6, 15)
    run = jax.jit(jq.moe, static_argnums=5)
    base = np.asarray(run(x, logits, *weights, routing))
    experts, tokens = rng.permutation(6), rng.permutation(15)
    renamed = run(x, logits[:, experts], *(w[experts] for w in weights), routing)
    assert_near(renamed, base.astype(np.float64))
    assert_near(run(x[tokens], logits[tokens], *weights, routing), base[tokens].astype(np.float64))


def test_equal_inputs_give_equal_bits_and_leading_axes_are_kept(layer):
    routing = jq.Routing(per_token=2)
    x, logits, *weights = layer(5, 12)
    run = jax.jit(jq.moe, static_argnums=5)
    flat = run(x, logits, *weights, routing)
    np.testing.assert_array_equal(flat, run(x, logits, *weights, routing))
    cube = run(x.reshape(3, 4, D), logits.reshape(3, 4, 5), *weights, routing)
    np.testing.assert_array_equal(cube, flat.reshape(3, 4, D))


def test_bfloat16_stays_bfloat16(layer):
    routing = jq.Routing(per_token=2)
    x, logits, *weights = layer(4, 8, routing, jnp.bfloat16)
    got = jq.moe(x, logits, *weights, routing)
    assert got.dtype == jnp.bfloat16
    # every intermediate is rounded to bfloat16 once: gate, up, hidden, down, result; float32 sums between
    assert_near(got, oracle_moe(x, oracle_route(logits, routing), *weights), 5 * float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.parametrize("count", [1, 7, 300, COMPARED + 5])
def test_choices_are_sorted_stably(rng, count):
    chosen = rng.integers(0, 6, count).astype(np.int32)
    order, place, sizes = jax.jit(sort_by_expert, static_argnums=1)(jnp.asarray(chosen), 7)
    np.testing.assert_array_equal(order, np.argsort(chosen, kind="stable"))
    np.testing.assert_array_equal(np.asarray(order)[place], np.arange(count))
    np.testing.assert_array_equal(sizes, np.bincount(chosen, minlength=7))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"per_token": 0}, "per_token=0"),
        ({"per_token": 1, "score": "tanh"}, "score='tanh'"),
        ({"per_token": 1, "groups": 2, "groups_per_token": 3}, "groups_per_token=3 of groups=2"),
    ],
)
def test_impossible_routings_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        jq.Routing(**fields)


def test_shapes_that_do_not_fit_are_named(layer):
    x, logits, gate, up, down = layer(4, 6)
    routing = jq.Routing(per_token=2)
    with pytest.raises(ValueError, match=r"moe: down \(4, 32, 64\).*\(4, 32, 32\) fits"):
        jq.moe(x, logits, gate, up, up, routing)
    with pytest.raises(ValueError, match=r"logits \(5, 4\)"):
        jq.moe(x, logits[:5], gate, up, down, routing)
    with pytest.raises(ValueError, match="does not fit 4 experts"):
        jq.moe(x, logits, gate, up, down, jq.Routing(per_token=5))
    with pytest.raises(ValueError, match=r"bias \(3,\) for 4 experts"):
        jq.moe(x, logits, gate, up, down, routing, bias=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shared\[2\]"):
        jq.moe(x, logits, gate, up, down, routing, shared=(gate[0], up[0], up[0]))
