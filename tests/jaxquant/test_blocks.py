"""Blocks of a program, and learned rounding of a block's weights together."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms import _block_rounding
from jaxquant.calibration._blocks import find_blocks
from jaxquant.calibration._observe import Watch
from jaxquant.calibration._plan import plan_walk
from jaxquant.tracing._arguments import split_arguments
from jaxquant.tracing._flat import flatten_program

WIDTH, HIDDEN, LAYERS = 16, 32, 2
INT3 = jq.TensorSpec("int3", jq.PerGroup(16))
LEARNED = jq.learned_rounding(steps=40, learning_rate=0.02, strength=1.0)
ONE_CUT = jq.learned_rounding(steps=40, learning_rate=0.02, cuts=1)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def mix(x, mask):
    """Attention without weights of its own: each token's mean of those it may see."""
    return jnp.einsum("bst,btd->bsd", mask / jnp.sum(mask, -1, keepdims=True), x)


def norm(x):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))


def transformer(p, batch):
    """Layers of attention and MLP over a residual stream; a mask made of the tokens is read in every layer."""
    x = p["embed"][batch]
    seen = jnp.broadcast_to((batch > 0)[:, None], (*batch.shape, batch.shape[1]))
    mask = jnp.where(seen & jnp.tril(jnp.ones_like(seen)), 1.0, 1e-3)
    for layer in range(LAYERS):
        n = norm(x)
        value, gate = n @ p[f"v{layer}"], n @ p[f"g{layer}"]
        x = x + mix(value * jnp.tanh(gate), mask) @ p[f"o{layer}"]
        n = norm(x)
        x = x + jnp.tanh(n @ p[f"up{layer}"]) @ p[f"down{layer}"]
    return norm(x) @ p["embed"].T


def transformer_params(rng):
    params = {"embed": normal(rng, 32, WIDTH)}
    for layer in range(LAYERS):
        for name, shape in {"v": (WIDTH, WIDTH), "g": (WIDTH, WIDTH), "o": (WIDTH, WIDTH), "up": (WIDTH, HIDDEN),
                            "down": (HIDDEN, WIDTH)}.items():  # fmt: skip
            params[f"{name}{layer}"] = normal(rng, *shape) * shape[0] ** -0.5
    return params


def tokens(rng, batches=2):
    return [jnp.asarray(rng.integers(0, 32, (4, 8)), jnp.int32) for _ in range(batches)]


def blocks_of(model, params, batch, cuts):
    form, arrays = split_arguments((params, batch), {})
    watches = {
        path: Watch(leaf.shape, (-2,), frozenset({"block"}))
        for path, leaf in zip(form.parameters, arrays, strict=True)
        if path not in (None, "embed")
    }
    flat = flatten_program(model, form, arrays, watches)
    plan = plan_walk(flat, form.parameters, watches)
    lane = {var for var in flat.jaxpr.invars[len(params) :]}
    for eqn in flat.jaxpr.eqns:
        if any(atom in lane for atom in eqn.invars if not hasattr(atom, "val")):
            lane |= set(eqn.outvars)
    blocks = find_blocks(flat.jaxpr, plan, lane.__contains__, cuts)
    return [[unit.path for meet in block.meets for unit in meet.units] for block in blocks], blocks


def test_a_residual_stream_is_cut_behind_each_addition(rng):
    params, (batch,) = transformer_params(rng), tokens(rng, 1)
    names, blocks = blocks_of(transformer, params, batch, 1)
    assert names == [["v0", "g0", "o0"], ["up0", "down0"], ["v1", "g1", "o1"], ["up1", "down1"]]
    assert all([var.aval.shape for var in block.outs] == [(4, 8, WIDTH)] for block in blocks)
    assert blocks_of(transformer, params, batch, 2)[0] == [["v0", "g0", "o0", "up0", "down0"],
                                                           ["v1", "g1", "o1", "up1", "down1"]]  # fmt: skip


def test_a_chain_is_cut_behind_each_product_and_skips_make_one_block(rng):
    params, x = {"a": jnp.eye(8), "b": jnp.eye(8), "c": jnp.eye(8)}, normal(rng, 5, 8)
    names, _ = blocks_of(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x, 1)
    assert names == [["a"], ["b"], ["c"]]

    def dense(p, x):  # every layer reads all before it
        y = jnp.concatenate([x, x @ p["a"]], -1)[:, :8]
        z = y @ p["b"] + x
        return z @ p["c"] + y + x

    names, blocks = blocks_of(dense, params, x, 1)
    assert names == [["a", "b", "c"]]
    assert [var.aval.shape for var in blocks[0].outs] == [(5, 8)]


def block_error(params, qparams, batches):
    """Squared error of the stream behind the last layer, by a model that ends there."""

    def stream(p, batch):
        return transformer({**p, "embed": params["embed"]}, batch)

    run = jax.jit(stream)
    dense = jq.dequantize(qparams)
    return sum(float(jnp.sum(jnp.square(run(dense, b) - run(params, b)))) for b in batches)


def test_training_blocks_lowers_the_models_error(rng):
    params, batches = transformer_params(rng), tokens(rng, batches=6)
    spec = jq.QuantSpec(dataclasses.replace(INT3, qtype="uint3"))
    report = jq.Report()
    config = jq.QuantConfig(spec, algorithm=LEARNED)
    trained = jq.quantize(params, config, apply_fn=transformer, batches=batches, report=report)
    errors = [(row.extra["block_error"], row.extra["block_error_before"]) for row in report.rows]
    assert len(errors) == 10
    assert all(after < before for after, before in errors)
    plain = jq.quantize(params, jq.QuantConfig(spec))
    assert block_error(params, trained, batches) < block_error(params, plain, batches)
    assert trained["up0"].qvalue.dtype == plain["up0"].qvalue.dtype
    json.loads(report.to_json())


def chain_of_layers(p, x):
    for name in sorted(p):
        x = x + jnp.tanh(norm(x) @ p[name])
    return x


def chain_params(rng):
    return {name: normal(rng, WIDTH, WIDTH) / 4 for name in ("k0", "k1", "k2")}


def test_training_starts_from_gptqs_codes_and_blocks_alike_compile_once(rng):
    params, batches = chain_params(rng), [normal(rng, 24, WIDTH), normal(rng, 24, WIDTH)]
    _block_rounding._step.clear_cache()
    report = jq.Report()
    config = jq.QuantConfig(jq.QuantSpec(INT3), algorithm=jq.chain(jq.gptq(rounds=0), ONE_CUT))
    jq.quantize(params, config, apply_fn=chain_of_layers, batches=batches, report=report)
    assert _block_rounding._step._cache_size() == 1
    assert [row.algorithm for row in report.rows] == ["gptq + learned_rounding"] * 3
    assert all(row.extra["block_error"] <= row.extra["block_error_before"] for row in report.rows)
    assert all(row.damping is not None for row in report.rows)


def test_training_goes_through_stacks_input_scales_outliers_and_padding(rng):
    """A scanned stack, AWQ's input scales, channels in float, groups that do not divide: each is lowered."""
    w, batches = normal(rng, 2, 20, 20) / 4, [normal(rng, 60, 20), normal(rng, 60, 20)]

    def model(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    spec = jq.QuantSpec(dataclasses.replace(INT3, pad=True, scale_dtype="bfloat16"))
    report = jq.Report()
    algorithm = jq.chain(jq.awq(clip=False), jq.salient(fraction=0.05), LEARNED)
    config = jq.QuantConfig(spec, algorithm=algorithm, skip=())
    q = jq.quantize({"w": w}, config, apply_fn=model, batches=batches, report=report)["w"]
    assert isinstance(q, jq.OutlierArray)
    assert q.base.pre_scale is not None
    assert [row.path for row in report.rows] == ["w[0]", "w[1]"]
    last = report.rows[-1].extra  # with one cut behind each layer, the second block ends with the model's output
    dense = jq.dequantize({"w": q})
    wrong = [model(dense, x) - model({"w": w}, x) for x in batches[1:]]  # the last is held out
    power = [jnp.sum(jnp.square(model({"w": w}, x))) for x in batches[1:]]
    seen = np.mean([float(jnp.sum(jnp.square(e)) / p) for e, p in zip(wrong, power, strict=True)])
    assert last["block_error"] < last["block_error_before"]
    np.testing.assert_allclose(seen, last["block_error"], rtol=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_targets_make_up_for_a_part_of_what_came_before(rng, strength):
    params, x = chain_params(rng), normal(rng, 24, WIDTH)
    still = jq.learned_rounding(steps=1, learning_rate=1e-9, cuts=1, strength=strength)  # moves no code
    report = jq.Report()
    config = jq.QuantConfig(jq.QuantSpec(INT3), algorithm=still)
    q = jq.quantize(params, config, apply_fn=chain_of_layers, batches=[x], report=report)
    dense = jq.dequantize(q)
    step = lambda p, x, name: chain_of_layers({name: p[name]}, x)  # noqa: E731
    exact, lossy = x, x
    for name, row in zip(sorted(params), report.rows, strict=True):
        target = (1 - strength) * step(params, lossy, name) + strength * step(params, exact, name)
        exact, lossy = step(params, exact, name), step(dense, lossy, name)
        expected = jnp.sum(jnp.square(lossy - target)) / jnp.sum(jnp.square(target))
        np.testing.assert_allclose(row.extra["block_error_before"], expected, rtol=1e-3)


def test_an_interrupted_run_goes_on_to_the_same_bits(rng, tmp_path, assert_same):
    params, batches = chain_params(rng), [normal(rng, 24, WIDTH), normal(rng, 24, WIDTH)]
    config = jq.QuantConfig(jq.QuantSpec(INT3), algorithm=LEARNED)  # blocks of two weights, and one of one
    options = {"apply_fn": chain_of_layers, "batches": batches}
    whole = jq.quantize(params, config, **options)

    class Killed(Exception):
        pass

    def kill(row):
        if row.path == "k0":
            raise Killed

    with pytest.raises(Killed):
        jq.quantize(params, config, resume=tmp_path, report=kill, **options)
    with pytest.raises(Killed):  # a kept half of a block is no block
        jq.quantize(params, config, resume=tmp_path, report=kill, **options)
    report = jq.Report()
    assert_same(jq.quantize(params, config, resume=tmp_path, report=report, **options), whole)
    assert [row.path for row in report.rows] == ["k0", "k1", "k2"]
    again = jq.Report()
    assert_same(jq.quantize(params, config, resume=tmp_path, report=again, **options), whole)
    assert [row.path for row in again.rows] == ["k0", "k1", "k2"]


def test_block_training_needs_the_walk(rng):
    params, batches = chain_params(rng), [normal(rng, 24, WIDTH)]
    config = jq.QuantConfig(jq.QuantSpec(INT3), algorithm=LEARNED)
    with pytest.raises(ValueError, match="sequential=False has only those"):
        jq.quantize(params, config, apply_fn=chain_of_layers, batches=batches, sequential=False)
    nf4 = jq.QuantConfig(jq.QuantSpec(jq.TensorSpec("nf4", jq.PerGroup(16))), algorithm=LEARNED)
    with pytest.raises(ValueError, match="integer codes, got 'nf4'"):
        jq.quantize(params, nf4, apply_fn=chain_of_layers, batches=batches)
