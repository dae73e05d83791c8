"""Statistics of inputs through every form in which a model may use a weight, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.calibration._observe import Watch, patches
from jaxquant.tracing._tracking import track

SPEC = jq.QuantSpec(jq.TensorSpec("int4", jq.PerGroup(8)))
CONFIG = jq.QuantConfig(rules=(jq.Rule(r"(?!.*bias).*", SPEC),), algorithm=jq.gptq())
EPS = float(np.finfo(np.float32).eps)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def gram(x):
    rows = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    return rows.T @ rows


def assert_gram(hessian, x):
    """Sums of T float32 products err by at most T eps of the sum of their magnitudes."""
    rows = np.abs(np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]))
    assert np.all(np.abs(np.asarray(hessian, np.float64) - gram(x)) <= len(rows) * EPS * (rows.T @ rows) + 1e-30)


def layers(w, x):
    """Two layers in NumPy, and the input of each."""
    first = np.asarray(x, np.float64)
    return first, np.tanh(first @ np.asarray(w[0], np.float64))


def by_index(p, x):
    return jnp.tanh(x @ p["w"][0]) @ p["w"][1]


def by_scan(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def by_remat_scan(p, x):
    @jax.checkpoint
    def body(x, w):
        return jax.jit(lambda x, w: jnp.tanh(x @ w))(x, w.astype(jnp.float32)), None

    return jax.lax.scan(body, x, p["w"])[0]


def by_loop(p, x):
    return jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ jax.lax.dynamic_index_in_dim(p["w"], i, 0, False)), x)


def by_while(p, x):
    def step(state):
        i, x = state
        return i + 1, jnp.tanh(x @ jax.lax.dynamic_index_in_dim(p["w"], i, 0, False))

    return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, x))[1]


@pytest.mark.parametrize("model", [by_index, by_scan, by_remat_scan, by_loop, by_while])
def test_a_stack_of_layers_has_statistics_of_each(rng, model):
    w, x = normal(rng, 2, 8, 8), normal(rng, 3, 5, 8)
    stats = jq.calibrate(model, {"w": w}, [x], CONFIG).statistics["w"]
    assert stats.hessian.shape == (2, 8, 8)
    assert stats.count.tolist() == [15.0, 15.0]
    for found, inputs in zip(stats.hessian, layers(w, x), strict=True):
        np.testing.assert_allclose(found, gram(inputs), rtol=1e-4, atol=1e-4)  # tanh itself is good to some ulps


def test_nested_scans_and_a_weight_used_in_every_step(rng):
    w, shared, x = normal(rng, 2, 3, 8, 8), normal(rng, 8, 8), normal(rng, 4, 8)

    def model(p, x):
        def inner(x, w):
            return jnp.tanh(x @ w) @ p["shared"], None

        return jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w), x, p["w"])[0]

    stats = jq.calibrate(model, {"w": w, "shared": shared}, [x], CONFIG).statistics
    assert stats["w"].hessian.shape == (2, 3, 8, 8)
    assert stats["shared"].count.item() == 2 * 3 * 4
    value, pooled = np.asarray(x, np.float64), 0.0
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(stats["w"].hessian[i, j], gram(value), rtol=1e-3, atol=1e-3)
        hidden = np.tanh(value @ np.asarray(w[i, j], np.float64))
        pooled += gram(hidden)
        value = hidden @ np.asarray(shared, np.float64)
    np.testing.assert_allclose(stats["shared"].hessian, pooled, rtol=1e-3, atol=1e-3)


def test_two_contracting_axes_and_transposed_weights(rng):
    params = {"out": normal(rng, 4, 2, 8), "head": normal(rng, 6, 8)}
    x = normal(rng, 1, 3, 4, 2)

    def model(p, x):
        return jnp.einsum("btnh,nhd->btd", x, p["out"]) @ p["head"].T

    found = jq.calibrate(model, params, [x], CONFIG)
    assert dict(found.axes) == {"out": (-3, -2), "head": (-1,)}
    assert_gram(found.statistics["out"].hessian, x.reshape(1, 3, 8))


def test_a_fused_projection_meets_its_input_in_each_part(rng):
    x = normal(rng, 5, 8)
    stats = jq.calibrate(lambda p, x: x @ p["w"][:, :3] + x @ p["w"][:, 3:], {"w": normal(rng, 8, 6)}, [x], CONFIG)
    assert_gram(stats.statistics["w"].hessian / 2, x)


def test_experts_see_their_own_tokens(rng):
    x, w = normal(rng, 6, 8), normal(rng, 3, 8, 4)
    sizes = jnp.asarray([2, 0, 4])
    ragged = jq.calibrate(lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes), {"w": w}, [x], CONFIG).statistics["w"]
    assert ragged.count.tolist() == [2.0, 0.0, 4.0]
    padded = jnp.zeros((3, 4, 8)).at[0, :2].set(x[:2]).at[2].set(x[2:])
    einsum = jq.calibrate(lambda p, x: jnp.einsum("eck,ekn->ecn", x, p["w"]), {"w": w}, [padded], CONFIG)
    assert einsum.statistics["w"].count.tolist() == [2.0, 0.0, 4.0]
    for stats in (ragged, einsum.statistics["w"]):
        for found, rows in zip(stats.hessian, (x[:2], x[:0], x[2:]), strict=True):
            assert_gram(found, rows)


def test_branches_pool_and_batches_merge(rng):
    w, batches = normal(rng, 8, 8), [normal(rng, 3, 8), normal(rng, 5, 8)]

    def model(p, x):
        return jax.lax.cond(x.shape[0] + jnp.sum(x) * 0 > 4, lambda x: x @ p["w"], lambda x: 2 * x @ p["w"], x)

    config = jq.QuantConfig(rules=CONFIG.rules, algorithm=jq.chain(jq.smoothquant(alpha=0.5), jq.gptq()))
    whole = jq.calibrate(model, {"w": w}, batches, config)
    seen = np.concatenate([2 * np.asarray(batches[0]), np.asarray(batches[1])])
    assert_gram(whole.statistics["w"].hessian, seen)
    np.testing.assert_array_equal(whole.statistics["w"].absmax, np.abs(seen).max(0))
    halves = [jq.calibrate(model, {"w": w}, [batch], config) for batch in batches]
    merged = halves[0].merge(halves[1])
    jax.tree.map(np.testing.assert_array_equal, merged, whole)


def test_a_calibration_is_saved_and_loaded(rng, tmp_path):
    static = jq.TensorSpec("int8", jq.PerTensor(), static=True, range="mse")
    config = jq.QuantConfig(rules=(jq.Rule(".*", jq.QuantSpec(jq.TensorSpec("int8"), static)),))
    found = jq.calibrate(by_scan, {"w": normal(rng, 2, 8, 8)}, [normal(rng, 4, 8)], config)
    found.save(tmp_path / "stats")
    held = jq.Calibration.load(tmp_path / "stats")
    jax.tree.map(np.testing.assert_array_equal, held, found)
    assert held.axes == found.axes
    jq.save(tmp_path / "model", {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="holds no calibration"):
        jq.Calibration.load(tmp_path / "model")


def test_a_branch_not_taken_leaves_no_trace(rng):
    static = jq.TensorSpec("int8", jq.PerTensor(), static=True)
    config = jq.QuantConfig(rules=(jq.Rule(".*", jq.QuantSpec(jq.TensorSpec("int8"), static)),))
    x = jnp.abs(normal(rng, 4, 8)) + 1

    def model(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x @ p["v"], x)

    found = jq.calibrate(model, {"w": normal(rng, 8, 8), "v": normal(rng, 8, 8)}, [x], config).statistics
    np.testing.assert_array_equal(found["w"].low, x.min(0))
    assert found["v"].count.item() == 0
    assert np.all(np.isinf(found["v"].low))


@pytest.mark.parametrize(("strides", "padding", "dilation"), [((1, 1), "SAME", 1), ((2, 1), "VALID", 2)])
def test_patches_times_the_kernels_matrix_is_the_convolution(rng, strides, padding, dilation):
    x, kernel = normal(rng, 2, 7, 6, 3), normal(rng, 3, 2, 3, 5)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "rhs_dilation": (dilation, dilation)}

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, strides, padding, **options)

    (eqn,) = jax.make_jaxpr(convolve)(x, kernel).jaxpr.eqns
    rows = patches(x, eqn.params, track(kernel, "kernel"), Watch((3, 2, 3, 5), (-4, -3, -2), frozenset()))
    expected = convolve(x, kernel)
    got = rows @ kernel.reshape(-1, 5)
    bound = 2 * kernel.size * EPS * np.abs(rows) @ np.abs(kernel).reshape(-1, 5)
    assert np.all(np.abs(np.asarray(got - expected.reshape(-1, 5))) <= bound)


def test_a_flax_attention_is_calibrated_unmodified(rng):
    module, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16), normal(rng, 2, 5, 16)
    variables = module.init(jax.random.key(0), x)
    found = jq.calibrate(module.apply, variables, [x], CONFIG)
    assert {path.split("/")[1] for path in found.statistics} == {"query", "key", "value", "out"}
    assert_gram(found.statistics["params/query/kernel"].hessian, x)
    assert found.axes["params/out/kernel"] == (-3, -2)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda p, x: x @ p["w"], ValueError, r"unused.*no product.*Rule\('unused', None\)"),
        (
            lambda p, x: x[:, :4] @ p["w"][:4] + x @ p["unused"],
            NotImplementedError,
            "w: a product sums over 4 of its 8",
        ),
        (lambda p, x: x @ p["w"] @ p["w"].T + x @ p["unused"], NotImplementedError, r"w: .*axes \(-1,\).*Rule\('w'"),
    ],
)
def test_uses_without_statistics_name_the_weight(rng, model, error, words):
    params = {"unused": normal(rng, 8, 8), "w": normal(rng, 8, 8)}
    with pytest.raises(error, match=words):
        jq.calibrate(model, params, [normal(rng, 4, 8)], CONFIG)


def test_an_input_of_the_same_name_is_no_weight(rng):
    params, batch = {"w": normal(rng, 8, 8)}, {"w": normal(rng, 8, 8)}
    found = jq.calibrate(lambda p, b: b["w"] @ p["w"] @ b["w"].T, params, [batch], CONFIG).statistics
    assert_gram(found["w"].hessian, batch["w"])


def test_no_batch_is_an_error(rng):
    with pytest.raises(ValueError, match="batches is empty"):
        jq.calibrate(by_index, {"w": normal(rng, 2, 8, 8)}, [], CONFIG)


def test_calibrations_of_different_models_do_not_merge(rng):
    x = normal(rng, 4, 8)
    one, other = (jq.calibrate(lambda p, x, n=n: x @ p[n], {n: normal(rng, 8, 8)}, [x], CONFIG) for n in ("a", "b"))
    with pytest.raises(ValueError, match="different models"):
        one.merge(other)
