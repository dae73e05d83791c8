"""Bits go where the output needs them, and no more of them than the budget has."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.arrays._spec import PRESETS
from jaxquant.calibration._allocate_bits import Option, convex_hull, spend
from jaxquant.calibration._distances import squared_change

CHOICES = tuple(
    jq.QuantSpec(jq.TensorSpec(qtype, jq.PerGroup(16), scale_dtype="bfloat16"))
    for qtype in ("int2", "int3", "int4", "int8")
)


def apply(params, x):
    """The loud branch is most of the output."""
    return 30 * jnp.tanh(x @ params["loud"]["kernel"]) + jnp.tanh(x @ params["quiet"]["kernel"]) @ params["mix.kernel"]


@pytest.fixture
def model(rng):
    shapes = {"loud": (32, 24), "quiet": (32, 48), "mix": (48, 24)}
    loud, quiet, mix = (jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32) for s in shapes.values())
    params = {"loud": {"kernel": loud}, "quiet": {"kernel": quiet, "bias": jnp.ones(3)}, "mix.kernel": mix}
    return params, [jnp.asarray(rng.standard_normal((20, 32)), jnp.float32) for _ in range(2)]


def bits_of(params, config):
    return {row.path: row.bits for row in jq.summary(jq.quantize(params, config)).leaves if row.quantized}


def test_the_sensitive_weight_gets_the_bits_within_the_budget(model):
    params, batches = model
    config = jq.allocate_bits(apply, params, batches, budget=5.0, choices=CHOICES)
    bits = bits_of(params, config)
    assert set(bits) == {"loud/kernel", "quiet/kernel", "mix.kernel"}
    assert bits["loud/kernel"] == 9 > max(bits["quiet/kernel"], bits["mix.kernel"])
    assert jq.summary(jq.quantize(params, config)).bits_per_weight <= 5.0


def test_mixed_beats_uniform_of_the_same_bits(model):
    params, batches = model
    uniform = jq.quantize(params, jq.QuantConfig(CHOICES[2]))
    budget = jq.summary(uniform).bits_per_weight
    mixed = jq.quantize(params, jq.allocate_bits(apply, params, batches, budget, CHOICES))
    reference = apply(params, batches[0])
    error, uniform_error = (squared_change(reference, jq.quantized(apply)(q, batches[0])) for q in (mixed, uniform))
    assert jq.summary(mixed).bits_per_weight <= budget == 5.0
    assert error < uniform_error


def test_the_configuration_prints_a_line_for_each_weight(model):
    params, batches = model
    config = jq.allocate_bits(apply, params, batches, budget=100.0, choices=CHOICES)
    assert str(config).splitlines() == [
        r"loud/kernel   int8 PerGroup(size=16)",
        r"mix\.kernel   int8 PerGroup(size=16)",
        r"quiet/kernel  int8 PerGroup(size=16)",
    ]
    gptq = dataclasses.replace(config, algorithm=jq.gptq())
    assert str(gptq).splitlines()[-1].split() == ["algorithm", "gptq"]


def test_a_given_distance_is_the_one_measured(model):
    params, batches = model

    def quiet_only(reference, output):  # the first outputs, which hear the quiet branch alone
        return jnp.mean(jnp.square(reference[0] - output[0]))

    def both(params, x):
        return jnp.tanh(x @ params["quiet"]["kernel"]) @ params["mix.kernel"], x @ params["loud"]["kernel"]

    bits = bits_of(params, jq.allocate_bits(both, params, batches, 6.0, CHOICES, quiet_only))
    assert bits["loud/kernel"] == 3 < min(bits["quiet/kernel"], bits["mix.kernel"])


def test_the_choice_is_optimal_but_for_one_step(rng):
    specs = CHOICES
    options = {
        name: [Option(s, int(b), float(e)) for s, b, e in zip(specs, bits, rng.exponential(size=4), strict=True)]
        for name, bits in zip("abcde", rng.integers(1, 40, (5, 4)), strict=True)
    }

    def best(bits):
        plans = itertools.product(*options.values())
        return min((sum(o.loss for o in plan) for plan in plans if sum(o.bits for o in plan) <= bits), default=np.inf)

    hulls = {name: convex_hull(each) for name, each in options.items()}
    step = max((b.bits - a.bits for hull in hulls.values() for a, b in itertools.pairwise(hull)), default=0)
    least = sum(hull[0].bits for hull in hulls.values())
    for budget in range(least, least + 60, 7):
        chosen = spend(options, budget / 100, 100)
        plan = [next(o for o in options[name] if o.spec == spec) for name, spec in chosen.items()]
        assert sum(o.bits for o in plan) <= budget + 1e-9
        assert best(budget) <= sum(o.loss for o in plan) + 1e-12
        assert sum(o.loss for o in plan) <= best(budget - step) + 1e-12


def test_errors_say_what_is_accepted(model):
    params, batches = model
    with pytest.raises(ValueError, match=r"budget=2.5 bits a weight, and the cheapest choices take 3\.000"):
        jq.allocate_bits(apply, params, batches, 2.5, CHOICES)
    with pytest.raises(ValueError, match="batches is empty"):
        jq.allocate_bits(apply, params, [], 5.0, CHOICES)
    with pytest.raises(ValueError, match="choices must be QuantSpecs"):
        jq.allocate_bits(apply, params, batches, 5.0, ())
    with pytest.raises(ValueError, match="quantizes none of these"):
        jq.allocate_bits(lambda p, x: x @ p["bias"], {"bias": jnp.ones(32)}, batches, 5.0, CHOICES)
    with pytest.raises(ValueError, match=r"kernel: group size 128 does not divide"):
        jq.allocate_bits(apply, params, batches, 5.0, (PRESETS["w4a16"],))
    bad = jax.tree.map(lambda w: w.at[0].set(jnp.nan), params)
    with pytest.raises(ValueError, match="changes the output by nan"):
        jq.allocate_bits(apply, bad, batches, 5.0, CHOICES)
    with pytest.raises(ValueError, match="holds no floating array"):
        jq.allocate_bits(lambda p, x: jnp.argmax(apply(p, x), axis=-1), params, batches, 5.0, CHOICES)
