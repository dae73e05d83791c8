"""Calibration of experts: routed, borrowed and all tokens against NumPy, each expert as though alone, the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms._apply import quantize_weight
from jaxquant.algorithms._statistics import init_statistics, update_statistics

T, D, F, E = 24, 32, 32, 4
CONFIG = jq.QuantConfig(jq.QuantConfig.preset("w4a16", group_size=32).default, algorithm=jq.gptq())
ROUTES = np.array([0] * 14 + [2] * 9 + [3])  # expert 1 is never hit, expert 3 once


def model(p, x):
    """One token, one expert: rows sorted by a fixed routing."""
    sizes = jnp.asarray(np.bincount(ROUTES, minlength=E), jnp.int32)
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, p["gate_proj"], sizes)) * jax.lax.ragged_dot(x, p["up_proj"], sizes)
    return jax.lax.ragged_dot(hidden, p["down_proj"], sizes)


@pytest.fixture
def problem(rng):
    shapes = {"gate_proj": (E, D, F), "up_proj": (E, D, F), "down_proj": (E, F, D)}
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(T, D)), jnp.float32)


def hessians(rows, weights):
    """[E, K, K] sums of x^T x in float64; rows are [T, K], or [E, T, K] where experts see different ones."""
    rows = np.broadcast_to(np.asarray(rows, np.float64), (E, *rows.shape[-2:]))
    return np.einsum("etk,et,etl->ekl", rows, weights, rows)


def through(params, x, expert):
    """Hidden rows of all tokens in one expert, float64."""
    gate, up = (np.asarray(params[name], np.float64)[expert] for name in ("gate_proj", "up_proj"))
    pre = np.asarray(x, np.float64) @ gate
    return pre / (1 + np.exp(-pre)) * (np.asarray(x, np.float64) @ up)


def assert_near(got, wanted):
    """A float32 sum of T products, each of rows that carry a few dozen roundings."""
    got = np.asarray(got, np.float64)
    assert np.linalg.norm(got - wanted) <= (T + 64) * 1.2e-7 * np.linalg.norm(wanted)


@pytest.mark.parametrize("borrow", [0.0, 0.25, 1.0])
def test_borrowed_tokens_count_by_their_weight(problem, borrow):
    params, x = problem
    seen = jq.calibrate(model, params, [x], CONFIG, borrow=borrow)
    own = (np.arange(E)[:, None] == ROUTES[None]).astype(np.float64)
    weights = own + borrow * (1 - own)
    assert_near(seen.statistics["gate_proj"].hessian, hessians(x, weights))
    np.testing.assert_allclose(seen.tokens["down_proj"], weights.sum(1))
    hidden = np.stack([through(params, x, expert)[row] for row, expert in enumerate(ROUTES)])
    assert_near(seen.statistics["down_proj"].hessian, hessians(hidden, weights))


def test_all_tokens_go_through_every_expert_s_own_products(problem):
    params, x = problem
    seen = jq.calibrate(model, params, [x], CONFIG, expert_tokens="all")
    everyone = np.ones((E, T))
    assert_near(seen.statistics["up_proj"].hessian, hessians(x, everyone))
    hidden = np.stack([through(params, x, expert) for expert in range(E)])
    assert_near(seen.statistics["down_proj"].hessian, hessians(hidden, everyone))
    np.testing.assert_array_equal(seen.tokens["down_proj"], np.full(E, T))


def test_slots_of_a_capacity_borrow_too(rng):
    x = jnp.asarray(rng.normal(size=(E, 5, D)), jnp.float32).at[2, 3:].set(0.0)  # two places not taken
    w = jnp.asarray(rng.normal(size=(E, D, F)), jnp.float32)
    fn = lambda p, x: jnp.einsum("eck,ekn->ecn", x, p["w"])  # noqa: E731
    seen = jq.calibrate(fn, {"w": w}, [x], CONFIG, borrow=0.5)
    each = np.einsum("eck,ecl->ekl", *[np.asarray(x, np.float64)] * 2)
    assert_near(seen.statistics["w"].hessian, 0.5 * each + 0.5 * each.sum(0))
    np.testing.assert_allclose(seen.tokens["w"], [11.5, 11.5, 10.5, 11.5])


ALGORITHMS = {"gptq": jq.gptq(), "awq": jq.awq(), "smoothquant": jq.smoothquant(), "rtn": None}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_expert_is_quantized_as_it_would_be_alone(rng, name):
    preset = "w8a8" if name == "smoothquant" else "w4a16"
    spec = jq.QuantConfig.preset(preset, **({} if preset == "w8a8" else {"group_size": 32})).default
    config = jq.QuantConfig(spec, algorithm=ALGORITHMS[name])
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, D, F), (41, D)))
    sizes = jnp.asarray([40, 1], jnp.int32)
    data = {"apply_fn": lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes), "batches": [x]}
    stacked = jq.quantize({"w": w}, config, **data)["w"]
    for expert, rows in enumerate((x[:40], x[40:])):
        alone = jq.quantize({"w": w[expert]}, config, apply_fn=lambda p, x: x @ p["w"], batches=[rows])["w"]
        got, wanted = (
            np.asarray(jq.dequantize(q), np.float64) for q in (jax.tree.map(lambda a, e=expert: a[e], stacked), alone)
        )
        # the same arithmetic but for the order of sums in the Hessian, where rounding may fall to the other side: rare
        assert (np.abs(got - wanted) > 1e-4 * np.abs(wanted).max()).mean() <= 0.05


def test_the_report_lists_the_tokens_of_each_expert(problem):
    params, x = problem
    report = jq.Report()
    jq.quantize(params, CONFIG, apply_fn=model, batches=[x], unseen="rtn", report=report)
    assert [row.tokens_of_each for row in report.rows] == [(14, 0, 9, 1)] * 3
    assert "14 0 9 1" in str(report)
    assert '"tokens_of_each": [\n' in report.to_json()


@pytest.mark.parametrize("options", [{"borrow": 0.1}, {"expert_tokens": "all"}])
def test_no_expert_is_skipped_where_tokens_are_shared(problem, options):
    params, x = problem
    report = jq.Report()
    jq.quantize(params, CONFIG, apply_fn=model, batches=[x], report=report, **options)
    assert all("saw no token" not in row.note and row.tokens > 0 for row in report.rows)
    with pytest.raises(ValueError, match=r"1 of 4 matrices saw no token: 1"):
        jq.quantize(params, CONFIG, apply_fn=model, batches=[x])


def test_a_sequential_pass_borrows_as_well(problem):
    params, x = problem
    report = jq.Report()
    jq.quantize(params, CONFIG, apply_fn=model, batches=[x], report=report, sequential=True, borrow=0.5)
    assert report.rows[0].tokens_of_each == (19, 12, 16, 12)  # 14 + 10 / 2, 24 / 2, 9 + 15 / 2, 1 + 23 / 2


def test_a_sequential_pass_sends_all_tokens_through_every_expert(problem):
    params, x = problem
    options = {"apply_fn": model, "batches": [x[:T], x[::-1]], "expert_tokens": "all"}
    alone = jq.Rule(".*(gate|up)_proj", None)  # the down projection's inputs are then those of the float model
    config = jq.QuantConfig(CONFIG.default, (alone,), algorithm=CONFIG.algorithm)
    parallel, walked = (jq.quantize(params, config, sequential=way, **options) for way in (False, True))
    got, wanted = (np.asarray(jq.dequantize(q)["down_proj"], np.float64) for q in (walked, parallel))
    # the same arithmetic but for the order of sums in the Hessian, where rounding may fall to the other side: rare
    assert (np.abs(got - wanted) > 1e-4 * np.abs(wanted).max()).mean() <= 0.05

    report = jq.Report()
    qparams = jq.quantize(params, CONFIG, sequential=True, report=report, **options)
    assert [row.tokens_of_each for row in report.rows] == [(2 * T,) * E] * 3
    # expert 1, which no token is routed to, was calibrated by what its own quantized gate and up make of all tokens
    w, spec = params["down_proj"][1], CONFIG.default
    rows = [through(jq.dequantize(qparams), x, 1)] * 2
    stats = update_statistics(init_statistics({"hessian"}, F), jnp.asarray(np.concatenate(rows), jnp.float32))
    wanted = np.asarray(jq.dequantize({"w": quantize_weight(w, spec, CONFIG.algorithm, stats)[0]})["w"], np.float64)
    got = np.asarray(jq.dequantize(qparams)["down_proj"][1], np.float64)
    assert (np.abs(got - wanted) > 1e-4 * np.abs(wanted).max()).mean() <= 0.05


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"expert_tokens": "some"}, "expert_tokens='some'"),
        ({"borrow": 1.5}, "borrow=1.5"),
        ({"borrow": 0.5, "expert_tokens": "all"}, "shows every token already"),
    ],
)
def test_options_that_say_nothing_are_refused(problem, options, named):
    params, x = problem
    with pytest.raises(ValueError, match=named):
        jq.calibrate(model, params, [x], CONFIG, **options)
    with pytest.raises(ValueError, match=named):
        jq.quantize(params, CONFIG, apply_fn=model, batches=[x], **options)


def test_statistics_given_are_as_they_were_gathered(problem):
    params, x = problem
    stats = jq.calibrate(model, params, [x], CONFIG, borrow=0.5)
    with pytest.raises(ValueError, match="give expert_tokens and borrow to calibrate"):
        jq.quantize(params, CONFIG, stats=stats, borrow=0.5)


def test_compensation_does_not_compare_tokens_that_were_routed_elsewhere(rng):
    """A coarse first layer reroutes tokens: rows of experts then belong to other tokens than in the float model."""
    params = {"in_proj": rng.normal(size=(D, D)) * 0.3, "w1": rng.normal(size=(E, D, F)) * 0.3}
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, rng.normal(size=(200, D))))
    config = jq.QuantConfig.preset("w2a16", group_size=32, algorithm=jq.chain(jq.compensate(), jq.gptq()))

    def routed(p, x):
        hidden = x @ p["in_proj"]
        chosen = jnp.argmax(hidden[:, :E], axis=-1)
        rows = hidden[jnp.argsort(chosen, stable=True)]
        return jax.lax.ragged_dot(rows, p["w1"], jnp.bincount(chosen, length=E))

    report = jq.Report()
    jq.quantize(params, config, apply_fn=routed, batches=[x], report=report)
    moved = {row.path: row.extra["compensation"] for row in report.rows}
    # with itself, cross statistics and Hessian are the same sums: what is left is their rounding
    assert moved["w1"] < 1e-3
    assert report.rows[1].error < report.rows[1].error_rtn
