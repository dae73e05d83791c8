"""The op on a CPU (what "xla" runs) and its kernel in the interpreter, against NumPy."""

import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int8_matmul import (
    Config,
    Int8Weight,
    candidates,
    default_config,
    int8_matmul,
    int8_matmul_many,
    output_sums,
    pack,
    supports,
    unpack,
)
from pallas_kernels.int8_matmul import config as table
from pallas_kernels.int8_matmul.config import SHARED_MEMORY_BYTES, _tuned, bucket
from pallas_kernels.int8_matmul.core import Call, Rows, resolve
from pallas_kernels.int8_matmul.mosaic_gpu import _Plan, int8_matmul_mosaic_gpu

kernel = importlib.import_module("pallas_kernels.int8_matmul.mosaic_gpu")
E4M3 = ml_dtypes.float8_e4m3fn
# The result is rounded once, to half an eps of its own size; float32 sums of K products add K eps / 2 of the sum of
# magnitudes, which for the K here stays under 2^-13 of the norm.
EPS = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 0.0}
FLOAT32_SUMS = 2.0**-13


def codes(rng, shape, dtype):
    values = rng.integers(-128, 128, shape) if dtype == "int8" else rng.normal(size=shape) * 50
    return values.astype(np.int8 if dtype == "int8" else E4M3)


def problem(rng, m, k, n, dtype, form="token", *, lead=()):
    """Fresh operands as NumPy arrays and the exact product in float64."""
    x, w = codes(rng, (*lead, m, k), dtype), codes(rng, (k, n), dtype)
    groups, columns = -(-k // 128), -(-n // 128)
    x_shape = {"tensor": (1,) * (len(lead) + 2), "block": (*lead, m, groups)}.get(form, (*lead, m, 1))
    w_shape = {"tensor": (1, 1), "block": (groups, columns)}.get(form, (1, n))
    x_scale, w_scale = (rng.uniform(0.005, 0.015, s).astype(np.float32) for s in (x_shape, w_shape))
    zero = rng.integers(-128, 128, (*lead, m, 1)).astype(np.int32) if form == "asymmetric" else None
    bias = rng.normal(size=n).astype(np.float32)
    wide = lambda a, size, axis: np.repeat(a.astype(np.float64), 128, axis).take(range(size), axis)  # noqa: E731
    left = x.astype(np.float64) - (0 if zero is None else zero)
    left = left * (wide(x_scale, k, -1) if form == "block" else x_scale)
    right = w.astype(np.float64) * (wide(wide(w_scale, k, 0), n, 1) if form == "block" else w_scale)
    operands = {"x": x, "weight": w, "w_scale": w_scale, "x_scale": x_scale, "x_zero_point": zero, "bias": bias}
    return operands, left @ right + bias


def product(operands, **options):
    arrays = {name: None if a is None else jnp.asarray(a) for name, a in operands.items()}
    arrays["weight"] = pack(arrays["weight"])
    options = {"num_outputs": operands["weight"].shape[1]} | options
    return int8_matmul(**arrays, **options)


def relative_error(out, exact):
    return np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("form", ["token", "tensor", "block", "asymmetric"])
@pytest.mark.parametrize(
    ("m", "k", "n", "out_dtype"), [(1, 256, 384, "float16"), (7, 200, 100, "bfloat16"), (2, 128, 1, "float32")]
)
def test_matches_float64(rng, m, k, n, out_dtype, form, dtype):
    form = "token" if dtype != "int8" and form == "asymmetric" else form  # fp8 has no zero points
    operands, exact = problem(rng, m, k, n, dtype, form, lead=(3,))
    out = product(operands, out_dtype=out_dtype)
    assert out.shape == exact.shape
    assert out.dtype == jnp.dtype(out_dtype)
    assert relative_error(out, exact) <= EPS[out_dtype] + FLOAT32_SUMS


def test_integer_sums_are_exact(rng):
    """The largest sums, with odd low bits: float32 accumulation would lose them."""
    k = 4096
    x = np.full((1, k), 127, np.int8)
    w = np.full((k, 2), 127, np.int8)
    w[0] = [126, -128]
    one = np.ones((1, 1), np.float32)
    sums = x.astype(np.int64) @ w
    out = int8_matmul(jnp.asarray(x), pack(jnp.asarray(w)), jnp.ones((1, 2)), jnp.asarray(one), out_dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(out, np.float64), sums.astype(np.float32))
    shifted = int8_matmul(
        jnp.asarray(x), pack(jnp.asarray(w)), jnp.ones((1, 2)), jnp.asarray(one),
        x_zero_point=jnp.full((1, 1), 127), out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(shifted, 0)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(1, 1), (130, 7), (128, 256), (2, 3, 129)])
def test_pack_is_invertible(rng, shape, dtype):
    w = codes(rng, shape, dtype)
    packed = pack(jnp.asarray(w))
    assert all(size % 128 == 0 for size in packed.shape[-2:])
    np.testing.assert_array_equal(np.asarray(unpack(packed, *shape[-2:])).view(np.uint8), w.view(np.uint8))
    if dtype == "int8":
        np.testing.assert_array_equal(output_sums(packed)[..., : shape[-1]], w.astype(np.int64).sum(-2))


def test_float_activations_are_quantized_per_token(rng):
    operands, _ = problem(rng, 5, 256, 96, "int8")
    x = jnp.asarray(rng.normal(size=(5, 256)), jnp.bfloat16)
    out = product(operands | {"x": x, "x_scale": None})
    exact = np.asarray(x, np.float64) @ (operands["weight"] * operands["w_scale"].astype(np.float64)) + operands["bias"]
    # Rounding a token's elements is off by at most half a 127th of its largest, of which rms(x) is at least a quarter.
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, exact) <= 4 / 254 + 2 * EPS["bfloat16"]


def test_gradient_passes_straight_through(rng):
    operands, _ = problem(rng, 5, 256, 96, "int8")
    x, cotangent = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 256), (5, 96)))
    weight = operands["weight"] * operands["w_scale"].astype(np.float64)
    fn = lambda x, bias: product(operands | {"x": x, "x_scale": None, "bias": bias})  # noqa: E731
    _, vjp = jax.vjp(fn, x, jnp.asarray(operands["bias"]))
    dx, dbias = vjp(cotangent)
    assert relative_error(dx, np.asarray(cotangent, np.float64) @ weight.T) <= FLOAT32_SUMS
    np.testing.assert_allclose(dbias, np.asarray(cotangent).sum(0), rtol=1e-5, atol=1e-5)


def test_gradient_of_scales_is_that_of_the_dequantized_product(rng):
    operands, _ = problem(rng, 3, 128, 128, "float8_e4m3fn")
    w, x = (jnp.asarray(operands[name], jnp.float32) for name in ("weight", "x"))

    def quantized(x_scale, w_scale):
        return product(operands | {"x_scale": x_scale, "w_scale": w_scale}, out_dtype=jnp.float32).sum()

    def dense(x_scale, w_scale):
        return jnp.matmul(x * x_scale, w * w_scale, precision="highest").sum()

    scales = jnp.asarray(operands["x_scale"]), jnp.asarray(operands["w_scale"])
    for got, want in zip(*(jax.grad(f, (0, 1))(*scales) for f in (quantized, dense)), strict=True):
        assert relative_error(got, np.asarray(want, np.float64)) <= 2 * FLOAT32_SUMS


@pytest.mark.parametrize("form", ["token", "tensor", "block", "asymmetric"])
def test_vmap_is_the_loop(rng, form):
    operands, exact = problem(rng, 3, 256, 128, "int8", form, lead=(4,))
    batched = {name for name in ("x", "x_scale", "x_zero_point") if operands[name] is not None}
    if form == "tensor":
        operands["x_scale"], batched = operands["x_scale"][0], {"x"}
    rest = {name: a for name, a in operands.items() if name not in batched}
    over_tokens = jax.vmap(lambda mapped: product(rest | mapped))({name: operands[name] for name in batched})
    assert relative_error(over_tokens, exact) <= EPS["bfloat16"] + FLOAT32_SUMS
    stack = jnp.stack([pack(jnp.asarray(operands["weight"]))] * 2)
    stack = stack.at[1].set(-jnp.maximum(stack[1], -127))
    one = {name: a[0] if name in batched else a for name, a in operands.items() if name != "weight" and a is not None}
    single = functools.partial(int8_matmul, **{name: jnp.asarray(a) for name, a in one.items()})
    over_weights = jax.vmap(lambda weight: single(weight=weight))(stack)
    np.testing.assert_array_equal(over_weights, jnp.stack([single(weight=weight) for weight in stack]))


CUTS = {
    "tokens on rows": ("int8", 64, "asymmetric", {"block_m": 128, "block_n": 128}),
    "two row tiles": ("float8_e4m3fn", 256, "tensor", {"block_m": 256, "block_n": 128}),
    "the weight shared": ("int8", 256, "token", {"block_m": 128, "block_n": 128, "multicast": 2}),
    "x shared": ("float8_e4m3fn", 256, "token", {"block_m": 256, "block_n": 128, "multicast": 2}),
    "blocks": ("float8_e4m3fn", 128, "block", {"block_m": 128, "block_n": 128}),
    "outputs on rows": ("int8", 16, "token", {"block_m": 16, "block_n": 128, "weights_first": True}),
    "x shared by outputs on rows": (
        "int8", 60, "token", {"block_m": 64, "block_n": 64, "num_warpgroups": 1, "weights_first": True, "multicast": 2},
    ),
    "blocks, outputs on rows": (
        "float8_e4m3fn", 8, "block", {"block_m": 8, "block_n": 128, "block_k": 512, "weights_first": True},
    ),
}  # fmt: skip


def kernel_operands(operands):
    """What the kernel takes: of the rows, and of the weight."""
    arrays = {name: None if a is None else jnp.asarray(a) for name, a in operands.items()}
    weight, zero = pack(arrays["weight"]), arrays["x_zero_point"]
    x_scale, w_scale = arrays["x_scale"], arrays["w_scale"]
    blocked = x_scale.shape[-1] > 1
    rows = arrays["x"], x_scale.T if blocked else x_scale.reshape(-1), None if zero is None else zero.reshape(-1)
    w_scale = w_scale if blocked else w_scale.reshape(-1)
    return rows, (weight, w_scale, None if zero is None else output_sums(weight), arrays["bias"])


def interpreted(rows, weights, sizes, out_dtype=jnp.float32):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        config = Config(num_stages=2, **sizes)
        return int8_matmul_mosaic_gpu(*rows, weights, out_dtype=out_dtype, config=config)


@pytest.mark.parametrize("cut", CUTS)
def test_kernel_in_the_interpreter(rng, cut):
    dtype, m, form, sizes = CUTS[cut]
    operands, exact = problem(rng, m, 512, 256, dtype, form)
    rows, weight = kernel_operands(operands)
    (out,) = interpreted(rows, [weight], sizes)
    assert relative_error(out, exact) <= FLOAT32_SUMS


SIBLINGS = {
    "tiles across the end": ("float8_e4m3fn", "token", {"block_m": 16, "block_n": 256, "num_warpgroups": 4}),
    "inputs split": ("int8", "asymmetric", {"block_m": 16, "block_n": 128, "split_k": 2}),
    "x shared": ("int8", "tensor", {"block_m": 16, "block_n": 64, "num_warpgroups": 1, "multicast": 2}),
}
SIBLINGS = {name: (*form, sizes | {"weights_first": True}) for name, (*form, sizes) in SIBLINGS.items()}


@pytest.mark.parametrize("cut", SIBLINGS)
def test_several_weights_in_the_interpreter(rng, monkeypatch, complete_interpreter, cut):
    """One cluster at once, that goes from the tiles of a weight to those of the next."""
    monkeypatch.setattr(kernel, "num_clusters", lambda size: 1)
    dtype, form, sizes = SIBLINGS[cut]
    found = [problem(rng, 16, 256, n, dtype, form) for n in (384, 128)]
    for operands, _ in found[1:]:
        operands |= {name: found[0][0][name] for name in ("x", "x_scale", "x_zero_point")}
    rows, weights = zip(*(kernel_operands(operands) for operands, _ in found), strict=True)
    for out, (operands, _) in zip(interpreted(rows[0], weights, sizes), found, strict=True):
        assert relative_error(out, float64_product(operands)) <= FLOAT32_SUMS


def float64_product(operands):
    """Of scales a token and a channel, or the tensor's."""
    zero = 0 if operands["x_zero_point"] is None else operands["x_zero_point"]
    x = (operands["x"].astype(np.float64) - zero) * operands["x_scale"]
    return x @ (operands["weight"].astype(np.float64) * operands["w_scale"]) + operands["bias"]


@pytest.mark.parametrize("form", ["token", "tensor", "asymmetric"])
def test_several_weights_are_one_of_each(rng, form):
    found = {n: problem(rng, 5, 200, n, "int8", form)[0] for n in (100, 1, 130)}
    alike = {name: found[100][name] for name in ("x", "x_scale", "x_zero_point")}
    arrays = {name: None if a is None else jnp.asarray(a) for name, a in alike.items()}
    x, x_scale, zero = arrays.values()
    weights = [
        Int8Weight(
            *(jnp.asarray(a) for a in (pack(jnp.asarray(o["weight"])), o["w_scale"])), None, jnp.asarray(o["bias"]), n
        )
        for n, o in found.items()
    ]
    outs = int8_matmul_many(x, weights, x_scale, x_zero_point=zero)
    for out, operands in zip(outs, found.values(), strict=True):
        np.testing.assert_array_equal(out, product(operands | alike))


def test_several_weights_quantize_once_and_add_up_gradients(rng):
    x = jnp.asarray(rng.normal(size=(5, 256)), jnp.float32)
    scales = [jnp.asarray(rng.uniform(0.1, 1, (1, n)), jnp.float32) for n in (96, 128)]
    weights = [Int8Weight(pack(jnp.asarray(codes(rng, (256, s.shape[1]), "int8"))), s) for s in scales]
    both = lambda x: sum(jnp.sum(out) for out in int8_matmul_many(x, weights))  # noqa: E731
    each = [lambda x, w=weight: jnp.sum(int8_matmul(x, *w[:2])) for weight in weights]
    maxima = [str(jax.make_jaxpr(fn)(x)).count("reduce_max") for fn in (both, each[0])]
    assert maxima[0] == maxima[1] > 0
    want = sum(np.asarray(jax.grad(fn)(x), np.float64) for fn in each)
    assert relative_error(jax.grad(both)(x), want) <= FLOAT32_SUMS


def test_several_weights_that_are_not_alike_are_refused(rng):
    plain, blocks = (problem(rng, 4, 256, 256, "int8", form)[0] for form in ("token", "block"))
    one, other = (Int8Weight(pack(jnp.asarray(o["weight"])), jnp.asarray(o["w_scale"])) for o in (plain, blocks))
    x, scales = jnp.asarray(plain["x"]), [jnp.asarray(o["x_scale"]) for o in (plain, blocks)]
    with pytest.raises(ValueError, match="differ in dtype, K, blocked scales"):
        int8_matmul_many(x, [one, other], scales[0])
    with pytest.raises(ValueError, match="weights is empty"):
        int8_matmul_many(x, [], scales[0])
    with pytest.raises(NotImplementedError, match="blocked scales; multiply by one weight after another"):
        int8_matmul_many(x, [other, other], scales[1])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("m", [1, 8, 60, 100, 200, 5000])
def test_every_candidate_is_supported(m, out_dtype, blocked, dtype):
    found = candidates(m, 4096, 4096, dtype, blocked=blocked, out_dtype=out_dtype)
    assert found
    assert all(c.shared_memory_bytes(out_dtype) <= SHARED_MEMORY_BYTES for c in found)
    assert default_config(m, 4096, 4096, dtype, blocked=blocked, out_dtype=out_dtype) in found


def test_default_exists_for_the_smallest_problem():
    assert default_config(1, 128, 128, "int8").num_stages >= 2


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("m", [3, 16, 24, 64])
def test_the_copy_engine_writes_to_multiples_of_128_bytes(m, blocked, dtype):
    shapes = {"x_scale": (8, m) if blocked else (m,), "w_scale": (8, 3) if blocked else (384,)}
    operands = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    operands["bias"] = jax.ShapeDtypeStruct((384,), jnp.bfloat16)
    operands["x"] = jax.ShapeDtypeStruct((m, 1024), dtype)
    for config in candidates(m, 1024, 384, dtype, blocked=blocked):
        scratch = _Plan(operands, [384], jnp.dtype(jnp.bfloat16), config).scratch()
        slots = list(scratch["vectors"].values())
        assert all(ref.shape[-1] * jnp.dtype(ref.dtype).itemsize % 128 == 0 for ref in slots)
        if blocked:
            assert np.prod(scratch["group_scale"].shape[1:]) * 4 % 128 == 0


def test_the_table_holds_what_the_kernel_takes():
    rows = _tuned()
    assert rows
    for (dtype, blocked, tokens, k, n), config in rows.items():
        assert supports(dtype, blocked=blocked, config=config) is None
        assert default_config(tokens, k, n, dtype, blocked=blocked) == config
        assert bucket(tokens) == tokens


def test_xla_runs_what_it_was_measured_to_be_faster_on(monkeypatch):
    x, weight, x_scale, w_scale = jnp.zeros((4, 256), jnp.int8), jnp.zeros((128, 256), jnp.int8), *jnp.ones((2, 1, 1))
    rows, weights = Rows(x, x_scale, None), [Int8Weight(weight, w_scale)] * 2
    runs = lambda *call: resolve(Call(*call, jnp.dtype("bfloat16")), rows, weights)  # noqa: E731
    assert runs(None, None).implementation is None
    monkeypatch.setattr(table, "_faster_by_xla", lambda: {("int8", False, 8, 256, 256)})
    assert runs(None, None).implementation == "xla"
    assert runs("mosaic_gpu", None).implementation == "mosaic_gpu"
    assert runs(None, default_config(4, 256, 256, "int8")).implementation is None


def test_explicit_kernel_never_falls_back(rng):
    operands, _ = problem(rng, 4, 256, 256, "int8", "block")
    mixed = operands | {"x_scale": operands["x_scale"][:, :1]}
    with pytest.raises(NotImplementedError, match="only one of the scales is blocked"):
        product(mixed, implementation="mosaic_gpu")
    assert product(mixed).shape == (4, 256)
    assert supports("int8", blocked=False, config=Config(block_m=256, block_n=128, num_stages=12)) is not None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": np.zeros((256, 128), np.int16)}, TypeError, "int16"),
        ({"x": np.zeros((4, 256), np.float32)}, TypeError, "weight's dtype"),
        ({"x": np.zeros((4, 100), np.int8)}, ValueError, "K = 100"),
        ({"w_scale": np.ones((1, 300), np.float32)}, ValueError, r"w_scale has shape \(1, 300\)"),
        ({"x_scale": np.ones((3, 1), np.float32)}, ValueError, r"x_scale has shape \(3, 1\)"),
        ({"x_zero_point": np.zeros((4,), np.int32)}, ValueError, "x_zero_point"),
        ({"bias": np.zeros((1, 128), np.float32)}, ValueError, "bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refusals_name_the_operand(rng, change, error, match):
    operands, _ = problem(rng, 4, 256, 128, "int8")
    with pytest.raises(error, match=match):
        product(operands | change)


def test_configs_that_cannot_be(rng):
    with pytest.raises(ValueError, match="multiple of 64 rows"):
        Config(block_m=96, block_n=128, num_stages=2)
    with pytest.raises(ValueError, match="not both"):
        Config(block_m=128, block_n=128, num_stages=2, multicast=2, split_k=2)
    with pytest.raises(ValueError, match="implementation="):
        product(problem(rng, 1, 128, 128, "int8")[0], implementation="cuda")
