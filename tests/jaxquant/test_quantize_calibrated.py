"""`quantize` with an algorithm: whole models, experts that saw nothing, errors, the report."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.parameters._tree import named_leaves

SPEC = jq.QuantSpec(jq.TensorSpec("int4", jq.PerGroup(16)))
PAPERS = jq.gptq(rounds=0)  # descent is tested by itself, and takes as long again to compile
GPTQ = jq.QuantConfig(SPEC, algorithm=PAPERS)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def correlated(rng, rows, channels):
    """Inputs of which a few directions carry most."""
    return normal(rng, rows, 4) @ normal(rng, 4, channels) + 0.1 * normal(rng, rows, channels)


def unrolled(p, x):
    for w in p["layers"]:
        x = jnp.tanh(x @ w["kernel"])
    return x


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["kernel"])[0]


@pytest.fixture
def stack(rng):
    """Three layers, as a list and as a stack, and inputs."""
    w = normal(rng, 3, 32, 32) / 4
    return {"layers": [{"kernel": layer} for layer in w]}, {"layers": {"kernel": w}}, correlated(rng, 64, 32)


def test_scanned_and_unrolled_layers_get_the_same_codes(stack):
    listed, stacked, x = stack
    report = jq.Report()
    one = jq.quantize(listed, GPTQ, apply_fn=unrolled, batches=[x[:40], x[40:]], report=report)
    two = jq.quantize(stacked, GPTQ, apply_fn=scanned, batches=[x[:40], x[40:]])
    for i, layer in enumerate(one["layers"]):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), layer["kernel"], two["layers"]["kernel"])
    assert [row.path for row in report.rows] == [f"layers/{i}/kernel" for i in range(3)]
    assert all(row.error < row.error_rtn and row.tokens == 64 and row.dead == 0 for row in report.rows)
    assert json.loads(report.to_json())[0]["algorithm"] == "gptq"
    assert len(str(report).splitlines()) == 4


class LinenNet(nn.Module):
    """Two layers, in linen."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, use_bias=False, name="down")(jnp.tanh(nn.Dense(64, use_bias=False, name="up")(x)))


class NnxNet(nnx.Module):
    """The same in nnx."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(64, 32, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.parametrize("sequential", [False, True])
def test_linen_nnx_and_a_plain_function_get_the_same_codes(rng, sequential):
    x = correlated(rng, 64, 32)
    weights = {"up": normal(rng, 32, 64) / 6, "down": normal(rng, 64, 32) / 8}
    options = {"batches": [x[:32], x[32:]], "sequential": sequential}
    plain = jq.quantize(weights, GPTQ, apply_fn=lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], **options)
    variables = {"params": {name: {"kernel": w} for name, w in weights.items()}}
    linen = jq.quantize(variables, GPTQ, apply_fn=LinenNet().apply, **options)["params"]
    net = NnxNet(nnx.Rngs(0))
    net.up.kernel[...], net.down.kernel[...] = weights["up"], weights["down"]
    graph, state = nnx.split(net)
    merged = jq.quantize(state, GPTQ, apply_fn=lambda state, x: nnx.merge(graph, state)(x), **options)
    found = dict(named_leaves(merged))
    for name, expected in plain.items():
        jax.tree.map(np.testing.assert_array_equal, linen[name]["kernel"], expected)
        jax.tree.map(np.testing.assert_array_equal, found[f"{name}/kernel"], expected)


def projections(p, x):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, p[name]) for name in ("query", "key", "value"))
    return jnp.einsum("tnh,nhd->td", q * jnp.repeat(k, 2, axis=1) + jnp.repeat(v, 2, axis=1), p["out"])


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("algorithm", [PAPERS, jq.chain(jq.awq(clip=False), jq.salient(fraction=0.1))])
def test_weights_of_one_input_share_its_scale(rng, sequential, algorithm):
    shapes = {"query": (32, 4, 8), "key": (32, 2, 8), "value": (32, 2, 8), "out": (4, 8, 32)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    x, report = correlated(rng, 64, 32), jq.Report()
    config = jq.QuantConfig(rules=(jq.Rule(".*", SPEC),), algorithm=algorithm)
    options = {"apply_fn": projections, "batches": [x], "sequential": sequential, "report": report}
    got = jq.quantize(params, config, **options)
    assert {row.path: row.note for row in report.rows} == dict.fromkeys(
        ("query", "key", "value"), "side by side with 2 more"
    ) | {"out": ""}
    assert {name: q.shape for name, q in got.items()} == shapes
    if algorithm.name == "gptq":  # columns do not see each other: alone, each is rounded alike
        alone = jq.quantize(params["query"], config, apply_fn=lambda w, x: jnp.einsum("td,dnh->tnh", x, w), batches=[x])
        np.testing.assert_array_equal(got["query"].qvalue, alone.qvalue)
    else:
        for name in ("key", "value"):
            np.testing.assert_array_equal(got[name].base.pre_scale, got["query"].base.pre_scale)
            np.testing.assert_array_equal(got[name].index, got["query"].index)
    assert jq.quantized(projections, on_dense="error")(got, x).shape == x.shape


def test_two_steps_are_one(stack):
    listed, _, x = stack
    stats = jq.calibrate(unrolled, listed, [x], GPTQ)
    two = jq.quantize(listed, GPTQ, stats=stats)
    jax.tree.map(np.testing.assert_array_equal, two, jq.quantize(listed, GPTQ, apply_fn=unrolled, batches=[x]))


@pytest.mark.parametrize("algorithm", [PAPERS, jq.chain(jq.compensate(residual=0.5), PAPERS)])
def test_a_sequential_pass_over_scanned_unrolled_and_lazy_layers(stack, algorithm):
    listed, stacked, x = stack
    config, report = jq.QuantConfig(SPEC, algorithm=algorithm), jq.Report()
    lazy = jax.tree.map(lambda w: jq.LazyArray(w.shape, w.dtype, lambda: np.asarray(w)), listed)
    options = {"batches": [x[:32], x[32:]], "sequential": None if "compensate" in algorithm.name else True}
    one = jq.quantize(listed, config, apply_fn=unrolled, report=report, **options)
    two = jq.quantize(stacked, config, apply_fn=scanned, offload=True, **options)
    three = jq.quantize(lazy, config, apply_fn=unrolled, **options)
    jax.tree.map(np.testing.assert_array_equal, one, three)
    for i, layer in enumerate(one["layers"]):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), layer["kernel"], two["layers"]["kernel"])
    assert [row.path for row in report.rows] == [f"layers/{i}/kernel" for i in range(3)]
    parallel = jq.quantize(listed, GPTQ, apply_fn=unrolled, batches=options["batches"])
    codes = [tree["layers"][2]["kernel"].qvalue for tree in (one, parallel)]
    assert np.any(np.asarray(codes[0]) != np.asarray(codes[1]))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bits(stack, tmp_path, sequential):
    listed, _, x = stack
    options = {"apply_fn": unrolled, "batches": [x], "sequential": sequential}
    whole, report = jq.Report(), jq.Report()
    expected = jq.quantize(listed, GPTQ, report=whole, **options)

    def interrupt(row):
        if row.path == "layers/1/kernel":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jq.quantize(listed, GPTQ, report=interrupt, resume=tmp_path, **options)
    finished = sorted(place.name for place in tmp_path.iterdir())
    assert finished == ["layers%2F0%2Fkernel", "layers%2F1%2Fkernel", "run.json"]
    got = jq.quantize(listed, GPTQ, report=report, resume=tmp_path, **options)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert [(row.path, row.error) for row in report.rows] == [(row.path, row.error) for row in whole.rows]
    with pytest.raises(ValueError, match="holds weights of another run"):
        jq.quantize(listed, jq.QuantConfig(SPEC, algorithm=jq.gptq(rounds=1)), resume=tmp_path, **options)


def test_a_folder_of_something_else_is_no_run(stack, tmp_path):
    listed, _, x = stack
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no folder of a run, and not empty"):
        jq.quantize(listed, GPTQ, apply_fn=unrolled, batches=[x], resume=tmp_path)


@pytest.mark.parametrize("given", [{"sequential": False}, {"stats": jq.Calibration({}, {})}])
def test_compensation_cannot_do_with_the_float_model_alone(stack, given):
    listed, _, x = stack
    config = jq.QuantConfig(SPEC, algorithm=jq.chain(jq.compensate(), PAPERS))
    with pytest.raises(ValueError, match="layers/0/kernel compares the quantized model's activations"):
        jq.quantize(listed, config, apply_fn=unrolled, batches=[x], **given)
    with pytest.raises(ValueError, match=r"'compensate \+ gptq' for layers/0/kernel"):
        jq.calibrate(unrolled, listed, [x], config)


def test_the_model_gives_the_axes_of_a_data_free_algorithm(rng):
    params, x = {"table": normal(rng, 8, 32)}, normal(rng, 4, 32)
    config = jq.QuantConfig(SPEC)

    def model(p, x):
        return x @ p["table"].T

    assert jq.quantize(params, config, apply_fn=model, batches=[x])["table"].axis == (-1,)
    explicit = jq.QuantConfig(SPEC, algorithm=jq.rtn())
    jax.tree.map(
        np.testing.assert_array_equal,
        jq.quantize(params, explicit, apply_fn=model, batches=[x])["table"],
        jq.quantize(params, config, apply_fn=model, batches=[x])["table"],
    )


@pytest.fixture
def experts(rng):
    """Three experts of which the second sees no token."""
    x = correlated(rng, 24, 32)
    return (
        {"experts": normal(rng, 3, 32, 8)},
        lambda p, x: jax.lax.ragged_dot(x, p["experts"], jnp.asarray([8, 0, 16])),
        x,
    )


def test_an_expert_without_tokens_is_an_error(experts):
    params, model, x = experts
    with pytest.raises(ValueError, match=r"experts: 1 of 3 matrices saw no token: 1; .*unseen='rtn'"):
        jq.quantize(params, GPTQ, apply_fn=model, batches=[x])


@pytest.mark.parametrize("algorithm", [PAPERS, jq.chain(jq.awq(clip=False), PAPERS)])
def test_an_expert_without_tokens_is_rounded_to_nearest_by_option(experts, algorithm):
    params, model, x = experts
    report = jq.Report()
    config = jq.QuantConfig(SPEC, algorithm=algorithm)
    got = jq.quantize(params, config, apply_fn=model, batches=[x], unseen="rtn", report=report)["experts"]
    nearest = jq.quantize(params, jq.QuantConfig(SPEC))["experts"]
    np.testing.assert_array_equal(got.qvalue[1], nearest.qvalue[1])
    np.testing.assert_array_equal(got.scale[1], nearest.scale[1])
    assert np.any(np.asarray(got.qvalue[0]) != np.asarray(nearest.qvalue[0]))
    assert got.pre_scale is None or np.all(np.asarray(got.pre_scale[1]) == 1)
    assert re.search("1 of 3 matrices saw no token", report.rows[0].note)
    assert report.rows[0].tokens == 0


def test_static_activations_are_calibrated_without_an_algorithm(rng):
    static = jq.TensorSpec("int8", jq.PerTensor(), static=True)
    config = jq.QuantConfig(jq.QuantSpec(jq.TensorSpec("int8"), static))
    params, x = {"kernel": normal(rng, 32, 8)}, normal(rng, 16, 32)

    def model(p, x):
        return x @ p["kernel"]

    q = jq.quantize(params, config, apply_fn=model, batches=[x])["kernel"]
    expected = 2 * np.abs(np.asarray(x)).max() / 255
    np.testing.assert_allclose(np.asarray(q.act_scale).item(), expected, rtol=2 * np.finfo(np.float32).eps)
    assert jq.quantized(model, on_dense="error")({"kernel": q}, x).shape == (16, 8)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (GPTQ, {}, r"kernel: algorithm 'gptq' needs calibration; give .*apply_fn=.*stats="),
        (GPTQ, {"apply_fn": lambda p, x: x @ p["kernel"]}, "give batches= too"),
        (GPTQ, {"apply_fn": lambda p, x: x @ p["kernel"], "batches": []}, "give batches= too"),
        (GPTQ, {"unseen": "skip"}, "unseen='skip'; accepted: 'error', 'rtn'"),
    ],
)
def test_missing_data_is_an_error(rng, config, options, words):
    with pytest.raises(ValueError, match=words):
        jq.quantize({"kernel": normal(rng, 32, 8)}, config, **options)


def test_a_nan_weight_is_named(rng):
    params = {"kernel": normal(rng, 32, 8).at[3, 4].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"kernel: 1 of 256 values are NaN or Inf, the first at index \(3, 4\)"):
        jq.quantize(params, GPTQ, apply_fn=lambda p, x: x @ p["kernel"], batches=[normal(rng, 4, 32)])
