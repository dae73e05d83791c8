import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import Config, Int4Weight, default_config, int4_matmul, int4_matmul_many, pack, supports
from pallas_kernels.int4_matmul.choice import candidates, predicted_microseconds, tuned_entries
from pallas_kernels.int4_matmul.config import SHARED_MEMORY_BYTES

# The weight and the output are each rounded once to x's 8 significant bits: half an eps of its own size each.
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def problem(rng, m, k, n, groups, *, dtype="bfloat16", lead=()):
    """Fresh random operands as numpy arrays, and the exact product in float64."""
    codes = rng.integers(-8, 8, (k, n)).astype(np.int8)
    cast = lambda a: np.asarray(jnp.asarray(a, jnp.dtype(dtype)))  # noqa: E731
    scale = cast(rng.normal(size=(groups, n)) * 0.05)
    zero = rng.integers(-8, 8, (groups, n)).astype(np.float32)
    x, pre_scale, bias = cast(rng.normal(size=(*lead, m, k))), cast(rng.uniform(0.5, 2, k)), cast(rng.normal(size=n))
    scaled = np.asarray(jnp.asarray(x) * jnp.asarray(pre_scale).reshape((1,) * (x.ndim - 1) + (k,)), np.float64)
    weight = (codes.reshape(groups, k // groups, n) - zero[:, None]) * scale.astype(np.float64)[:, None]
    exact = scaled @ weight.reshape(k, n) + bias.astype(np.float64)
    operands = {"x": x, "scale": scale, "zero_point": zero, "pre_scale": pre_scale, "bias": bias}
    return pack(jnp.asarray(codes)), {name: jnp.asarray(a) for name, a in operands.items()}, exact


def product(qweight, operands, **options):
    rest = {name: a for name, a in operands.items() if name not in ("x", "scale")}
    return int4_matmul(operands["x"], qweight, operands["scale"], **rest, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("m", "k", "n", "groups"), [(1, 256, 192, 2), (7, 96, 100, 3), (17, 200, 64, 1), (0, 64, 64, 1)]
)
def test_matches_float64(rng, m, k, n, groups, dtype):
    qweight, operands, exact = problem(rng, m, k, n, groups, dtype=dtype, lead=(2,))
    out = np.asarray(jax.jit(product)(qweight, operands), np.float64)
    assert out.shape == exact.shape
    if m:
        assert np.linalg.norm(out - exact) <= EPS[dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("code", [-8, 7])
@pytest.mark.parametrize("exponent", [100, -100, -130])
def test_extreme_codes_and_scales(rng, code, exponent):
    m, k, n = 3, 128, 70
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    scale = jnp.asarray(np.ldexp(rng.choice([-1.0, 1.0], (2, n)), exponent), jnp.bfloat16)
    out = int4_matmul(x, pack(jnp.full((k, n), code, jnp.int8)), scale)
    wide = np.asarray(x, np.float64)
    exact = wide @ (code * np.repeat(np.asarray(scale, np.float64), k // 2, axis=0))
    flushed = np.abs(wide).sum(1, keepdims=True) * 8 * 2.0**-126  # subnormal scales may count as zero
    error = np.abs(np.asarray(out, np.float64) - exact)
    absolute = np.abs(wide).sum(1, keepdims=True) * 8 * 2.0**exponent * EPS["bfloat16"]
    assert (error <= absolute + (flushed if exponent < -126 else 0)).all()
    assert exponent < -126 or np.abs(np.asarray(out, np.float64)).mean() > absolute.mean()


def test_tuned_configurations_take_the_problems_they_were_tuned_on():
    fastest: dict = {}
    for entry in tuned_entries():
        problem, config = (entry["m"], entry["k"], entry["n"]), Config(**entry["config"])
        assert supports(*problem[1:], problem[1] // 128, jnp.bfloat16, config=config) is None
        fastest[problem] = min(fastest.get(problem, (1e9,)), (entry["microseconds"], config), key=lambda pair: pair[0])
    for (m, k, n), (_, config) in fastest.items():
        assert default_config(m, k, n, k // 128) == config


def test_operands_that_warpgroups_cannot_share_take_the_next_tuned_cut():
    shared, whole = default_config(16, 14336, 4096, 112), default_config(16, 14336, 4096, 1)
    assert shared.k_warpgroups > 1 == whole.k_warpgroups
    assert supports(14336, 4096, 1, jnp.bfloat16, config=whole) is None
    assert "scaled after" in (supports(14336, 4096, 1, jnp.bfloat16, config=shared) or "")
    assert default_config(16, 14336, 4096, 112, jnp.int8).k_warpgroups == 1


def test_problems_unlike_the_tuned_ones_go_to_the_cost_model():
    config = default_config(4, 4096, 1024, 32)
    fitting = [c for c in candidates(4, 4096, 1024, 32) if c.blocks_per_sm == c.k_warpgroups == 1 and c.scale_after]
    assert config == min(fitting, key=lambda c: predicted_microseconds(c, 4, 4096, 1024))


@pytest.mark.parametrize("m", [2, 24, 50, 120, 700])
def test_problems_near_a_tuned_one_take_its_cut(m):
    config, tuned = default_config(m, 4096, 5120, 64, has_zero_point=True), default_config(m, 4096, 5120, 32)
    assert supports(4096, 5120, 64, jnp.bfloat16, config=config, has_zero_point=True) is None
    assert config.num_warpgroups == tuned.num_warpgroups
    assert m > 64 or config.block_m >= m


def test_vmap_over_tokens_and_over_weights_is_the_loop(rng):
    qweight, operands, _ = problem(rng, 3, 128, 64, 1, lead=(4,))
    over_tokens = jax.vmap(lambda x: product(qweight, operands | {"x": x}))(operands["x"])
    np.testing.assert_array_equal(over_tokens, product(qweight, operands))
    stack = jnp.stack([qweight, qweight ^ 0x11111111])
    over_weights = jax.vmap(lambda q: product(q, operands))(stack)
    np.testing.assert_array_equal(over_weights, jnp.stack([product(q, operands) for q in stack]))


def test_scan_with_the_layer_axis_in_front(rng):
    k = 128
    qweight, operands, _ = problem(rng, 2, k, k, 1)
    stack = jnp.stack([qweight, qweight ^ 0x70707070, qweight])
    step = lambda x, q: (product(q, operands | {"x": x}) / 8, None)  # noqa: E731
    scanned, _ = jax.lax.scan(step, operands["x"], stack)
    looped = operands["x"]
    for q in stack:
        looped, _ = step(looped, q)
    np.testing.assert_allclose(np.asarray(scanned, np.float32), np.asarray(looped, np.float32), rtol=2e-2, atol=2e-2)


def test_gradient_is_the_transposed_product(rng):
    qweight, operands, _ = problem(rng, 5, 128, 64, 2)
    cotangent = jnp.asarray(rng.normal(size=(5, 64)), jnp.bfloat16)
    fn = lambda x, bias: product(qweight, operands | {"x": x, "bias": bias})  # noqa: E731
    _, vjp = jax.vjp(fn, operands["x"], operands["bias"])
    dx, dbias = vjp(cotangent)
    identity = {"x": jnp.eye(128, dtype=jnp.bfloat16), "bias": jnp.zeros(64, jnp.bfloat16)}
    weight = np.asarray(product(qweight, operands | identity), np.float64)
    expected = np.asarray(cotangent, np.float64) @ weight.T
    assert np.linalg.norm(np.asarray(dx, np.float64) - expected) <= 2 * EPS["bfloat16"] * np.linalg.norm(expected)
    np.testing.assert_allclose(
        np.asarray(dbias, np.float64), np.asarray(cotangent, np.float64).sum(0), rtol=0, atol=5 * 2 * EPS["bfloat16"]
    )


def test_no_kernel_is_asked_of_a_cpu_unless_named(rng):
    qweight, operands, _ = problem(rng, 1, 128, 64, 1)
    text = jax.jit(product).lower(qweight, operands).as_text()
    assert "mosaic" not in text
    with pytest.raises(ValueError, match="interpret"):
        product(qweight, operands, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 192), jnp.bfloat16)}, "qweight has shape"),
        ({"scale": jnp.ones((3, 64), jnp.bfloat16)}, "3 groups"),
        ({"zero_point": jnp.ones((1, 64))}, "zero_point has shape"),
        ({"bias": jnp.ones((65,))}, "bias has shape"),
        ({"pre_scale": jnp.ones((64,))}, "pre_scale has shape"),
    ],
)
def test_misfits_are_named(rng, change, message):
    qweight, operands, _ = problem(rng, 2, 128, 64, 2)
    with pytest.raises(ValueError, match=message):
        product(qweight, operands | change)


def test_named_kernel_refuses_with_the_reason(rng):
    qweight, operands, _ = problem(rng, 2, 96, 64, 2)
    with pytest.raises(NotImplementedError, match="groups of 48"):
        product(qweight, operands, implementation="mosaic_gpu")
    assert product(qweight, operands).shape == (2, 64)


@pytest.mark.parametrize("m", [1, 16, 33, 64, 128, 300, 4096])
@pytest.mark.parametrize(("k", "n", "groups"), [(4096, 4096, 32), (14336, 4096, 1), (1056, 320, 33), (8192, 57344, 64)])
def test_default_config_fits_shared_memory(m, k, n, groups):
    config = default_config(m, k, n, groups)
    assert isinstance(config, Config)
    assert config.shared_memory_bytes(k // groups, has_zero_point=False) <= SHARED_MEMORY_BYTES
    assert supports(k, n, groups, jnp.bfloat16, config=config) is None


def weights_alike(rng, k, outputs, groups, zero=True):
    made = [problem(rng, 1, k, n, groups) for n in outputs]
    zeros = [operands["zero_point"] if zero else None for _, operands, _ in made]
    return [
        Int4Weight(qweight, operands["scale"], z, operands["bias"])
        for (qweight, operands, _), z in zip(made, zeros, strict=True)
    ]


@pytest.mark.parametrize("zero", [True, False])
def test_many_weights_are_one_by_one(rng, zero):
    weights = weights_alike(rng, 128, (64, 100, 192), 2, zero)
    x, pre_scale = jnp.asarray(rng.normal(size=(2, 3, 128)), jnp.bfloat16), jnp.asarray(rng.uniform(0.5, 2, 128))
    outs = int4_matmul_many(x, weights, pre_scale=pre_scale)
    for out, weight in zip(outs, weights, strict=True):
        alone = int4_matmul(x, weight.qweight, weight.scale, weight.zero_point, pre_scale=pre_scale, bias=weight.bias)
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(alone, np.float32))


def test_gradient_of_many_is_the_sum(rng):
    weights, x = weights_alike(rng, 128, (64, 100), 2), jnp.asarray(rng.normal(size=(3, 128)), jnp.bfloat16)

    def loss(x, scales, multiply):
        held = [w._replace(scale=s) for w, s in zip(weights, scales, strict=True)]
        return sum(jnp.sum(out.astype(jnp.float32)) for out in multiply(x, held))

    one_by_one = lambda x, held: [int4_matmul(x, w.qweight, w.scale, w.zero_point, bias=w.bias) for w in held]  # noqa: E731
    scales = [w.scale for w in weights]
    together, alone = (jax.grad(loss, (0, 1))(x, scales, f) for f in (int4_matmul_many, one_by_one))
    # dx is a sum of two terms that one of them rounds apart: half an eps each.
    dx = [np.asarray(slopes[0], np.float64) for slopes in (together, alone)]
    assert np.linalg.norm(dx[0] - dx[1]) <= 2 * EPS["bfloat16"] * np.linalg.norm(dx[1])
    for a, b in zip(together[1], alone[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_weights_that_are_not_alike_are_refused(rng):
    first, second = weights_alike(rng, 128, (64,), 2)[0], weights_alike(rng, 128, (64,), 1)[0]
    with pytest.raises(ValueError, match="the weights differ in the groups"):
        int4_matmul_many(jnp.ones((1, 128), jnp.bfloat16), [first, second])
    with pytest.raises(ValueError, match="zero points"):
        int4_matmul_many(jnp.ones((1, 128), jnp.bfloat16), [first, first._replace(zero_point=None)])


def coded_problem(rng, m, k, n, groups, dtype, lead=()):
    """A weight packed for codes, codes and scales of activations, and the exact product in float64."""
    codes = rng.integers(-8, 8, (k, n)).astype(np.int8)
    x = rng.integers(-128, 128, (*lead, m, k)).astype(np.float32)
    x = jnp.asarray(x if dtype == "int8" else x / 8).astype(dtype)
    scale = jnp.asarray(rng.normal(size=(groups, n)) * 0.05, jnp.bfloat16)
    x_scale = jnp.asarray(rng.uniform(0.5, 2, (*lead, m, 1)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=n), jnp.bfloat16)
    weight = codes * np.repeat(np.asarray(scale, np.float64), k // groups, axis=0)
    exact = np.asarray(x, np.float64) @ weight * np.asarray(x_scale, np.float64) + np.asarray(bias, np.float64)
    return pack(jnp.asarray(codes), x_bytes=1), {"x": x, "scale": scale, "x_scale": x_scale, "bias": bias}, exact


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("m", "k", "n", "groups"), [(1, 256, 192, 2), (17, 200, 70, 1), (0, 64, 64, 1)])
def test_codes_of_activations_match_float64(rng, m, k, n, groups, dtype):
    qweight, operands, exact = coded_problem(rng, m, k, n, groups, dtype, lead=(2,))
    for out_dtype in (None, "float16", "float32"):
        out = jax.jit(functools.partial(product, out_dtype=out_dtype))(qweight, operands)
        assert out.shape == exact.shape
        assert out.dtype == (out_dtype or "bfloat16")
        # A weight with groups is rounded to bfloat16 here, and one with channels is exact.
        bound = 2.0**-20 if groups == 1 and out_dtype == "float32" else EPS["bfloat16"]
        if m:
            assert np.linalg.norm(np.asarray(out, np.float64) - exact) <= bound * np.linalg.norm(exact)


def test_vmap_over_codes_folds_their_scales(rng):
    qweight, operands, _ = coded_problem(rng, 3, 128, 64, 2, "int8", lead=(4,))
    whole = product(qweight, operands)
    mapped = jax.vmap(lambda x, s: product(qweight, operands | {"x": x, "x_scale": s}))
    np.testing.assert_array_equal(mapped(operands["x"], operands["x_scale"]), whole)
    one = operands["x_scale"][:1, :1]
    shared = jax.vmap(lambda x: product(qweight, operands | {"x": x, "x_scale": one[0]}))(operands["x"])
    np.testing.assert_array_equal(shared, product(qweight, operands | {"x_scale": one}))


def test_gradients_reach_the_scales_of_codes(rng):
    qweight, operands, _ = coded_problem(rng, 3, 128, 64, 1, "int8")
    total = lambda x_scale, bias: product(  # noqa: E731
        qweight, operands | {"x_scale": x_scale, "bias": bias}, out_dtype="float32"
    ).sum()
    slope, dbias = jax.grad(total, (0, 1))(operands["x_scale"], operands["bias"])
    unit = product(qweight, operands | {"x_scale": jnp.ones((3, 1)), "bias": 0 * operands["bias"]}, out_dtype="float32")
    np.testing.assert_allclose(slope[:, 0], unit.sum(1), rtol=1e-4)
    np.testing.assert_array_equal(dbias, jnp.full(64, 3, jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_scale": None}, TypeError, "without x_scale"),
        ({"x": jnp.ones((2, 128), jnp.bfloat16)}, TypeError, "with x_scale"),
        ({"x_scale": jnp.ones((3, 1))}, ValueError, "x_scale has shape"),
        ({"pre_scale": jnp.ones((128,))}, ValueError, "before quantizing"),
        ({"out_dtype": jnp.int32}, TypeError, "accepted are bfloat16"),
        ({"implementation": "mosaic_gpu", "zero_point": jnp.ones((2, 64))}, NotImplementedError, "zero points"),
    ],
)
def test_misfits_of_codes_are_named(rng, change, error, message):
    qweight, operands, _ = coded_problem(rng, 2, 128, 64, 2, "int8")
    with pytest.raises(error, match=message):
        product(qweight, operands | change)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 300, 4096])
@pytest.mark.parametrize(("k", "n", "groups"), [(4096, 4096, 32), (14336, 4096, 1), (1088, 320, 17), (8192, 57344, 64)])
def test_default_config_for_codes_fits(m, k, n, groups, dtype):
    config = default_config(m, k, n, groups, dtype)
    assert supports(k, n, groups, dtype, config=config) is None
