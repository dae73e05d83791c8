"""`OutlierArray` as a weight: its products, views, tables, and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant._quantize import dequantize, quantize
from jaxquant.algorithms._apply import quantize_weight
from jaxquant.algorithms._statistics import init_statistics, update_statistics
from jaxquant.algorithms._transform import chain
from jaxquant.algorithms.llm_int8 import llm_int8, salient
from jaxquant.algorithms.smoothquant import smoothquant
from jaxquant.arrays import _views
from jaxquant.arrays._outliers import OutlierArray, dequantize_outliers, view_weight
from jaxquant.arrays._spec import PRESETS, PerGroup, QuantConfig, QuantSpec, TensorSpec
from jaxquant.arrays._views import Unrepresentable
from jaxquant.calibration._report import Report
from jaxquant.checkpoint import load, save
from jaxquant.interop.huggingface_write import save_huggingface
from jaxquant.parameters._pack_for import pack_for
from jaxquant.parameters._summary import summary
from jaxquant.parameters._tree import named_leaves
from jaxquant.products import _ops
from jaxquant.tracing._quantized import explain, quantized

W4 = QuantSpec(TensorSpec("int4", PerGroup(16)))
W8 = PRESETS["w8a8"]
K, N, OUTLIER = 64, 24, 100.0


def inputs(rng, *lead, outlier=7):
    """Activations of which one channel is a hundred times larger than the rest."""
    x = rng.uniform(-1, 1, (*lead, K))
    x[..., outlier] *= OUTLIER
    return jnp.asarray(x, jnp.float32)


def weight(rng, *shape):
    return jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)


@jax.jit
def gather(x):
    return update_statistics(init_statistics({"absmax", "mean_abs"}, x.shape[-1]), x)


def with_outliers(w, spec, x, transform, **form):
    return quantize_weight(w, spec, transform, gather(x.reshape(-1, K)), **form)[0]


def stacked(rng, count, spec, transform, *shape):
    """A stack of weights whose outliers differ: slice i has channel 5 + i."""
    stats = jax.tree.map(lambda *s: jnp.stack(s), *(gather(inputs(rng, 8, outlier=5 + i)) for i in range(count)))
    w = weight(rng, count, *(shape or (K, N)))
    return quantize_weight(w, spec, transform, stats, axis=(-2,), batch_dims=1)[0]


def rounding(x, w):
    """The greatest |error| of x @ w from rounding x, outlier 7 kept, to int8 by token: half a step times sum |w|.

    The step is 2 absmax / 255; float32 sums add at most K eps of the sum of magnitudes.
    """
    x, w = np.asarray(x, np.float64), np.abs(np.asarray(w, np.float64))
    step = 2 * np.abs(np.delete(x, 7, -1)).max(-1, keepdims=True) / 255
    return step / 2 * w.sum(0) + K * 1.2e-7 * np.abs(x) @ w


def summing(x, w):
    """The greatest |error| that summing K terms in float32, in two parts, allows; float16 scales are exact in both."""
    return (K + 2) * 1.2e-7 * np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))


def test_int8_with_an_outlier_is_as_exact_as_without(rng):
    x, w = inputs(rng, 3, 5), weight(rng, K, N)
    q = with_outliers(w, W8, x, llm_int8(capacity=0.02))
    dense = np.asarray(dequantize(q), np.float64)
    got = quantized(lambda w, x: x @ w, on_dense="error")(q, x)
    error = np.abs(got - np.asarray(x, np.float64) @ dense)
    assert np.all(error <= rounding(x, dense))
    stretched = quantized(lambda w, x: x @ w)(quantize(w, QuantConfig(W8)), x)
    assert np.abs(stretched - np.asarray(x, np.float64) @ np.asarray(w, np.float64)).mean() > 10 * error.mean()


@pytest.mark.parametrize("algorithm", [salient(fraction=0.05), chain(smoothquant(alpha=0.5), salient(fraction=0.05))])
def test_weight_only_product_is_the_float_one(rng, algorithm):
    x, w = inputs(rng, 5), weight(rng, K, N)
    q = with_outliers(w, W4, x, algorithm)
    dense = np.asarray(dequantize(q), np.float64)
    got = quantized(lambda w, x: x @ w, on_dense="error")(q, x)
    # a pre_scale rounds x and the weight once more each
    assert np.all(np.abs(got - np.asarray(x, np.float64) @ dense) <= 2 * summing(x, dense))
    np.testing.assert_allclose(dense[7], w[7], rtol=3e-7)


def test_derivative_by_the_activation(rng):
    x, w = inputs(rng, 5), weight(rng, K, N)
    q = with_outliers(w, W8, x, llm_int8())
    got = jax.grad(lambda x: jnp.sum(quantized(jnp.matmul)(x, q)))(x)
    want = jnp.broadcast_to(dequantize(q).sum(1), x.shape)
    np.testing.assert_allclose(got, want, atol=N * 1.2e-7 * N)


def test_bfloat16_under_scan(rng):
    """XLA's CPU backend compiled this product of the outliers to a call that it could not run."""
    w = stacked(rng, 2, W4, salient(fraction=0.1), K, K)
    x = jnp.asarray(rng.uniform(-1, 1, (9, K)), jnp.bfloat16)

    def apply(w, x):
        return jax.lax.scan(lambda x, w: (x, x @ w.astype(x.dtype)), x, w)[1]

    got, exact, dense = quantized(apply)(w, x), np.asarray(x, np.float64), np.asarray(dequantize_outliers(w))
    # the float rows are rounded to 8 bits, and the result once more
    assert np.all(np.abs(np.asarray(got, np.float64) - exact @ dense) <= 2**-7 * np.abs(exact) @ np.abs(dense))


def test_heads_transposed_and_weight_first(rng):
    """Two contracting axes in either order, an activation laid out otherwise, the weight on the left, bfloat16."""
    x, w = inputs(rng, 2, 3), weight(rng, K, N).reshape(4, 16, N)
    q = quantize_weight(w, W8, llm_int8(), gather(x.reshape(-1, K)), axis=(-3, -2))[0]
    heads, dense = x.reshape(2, 3, 4, 16), np.asarray(dequantize(q), np.float64)
    want = np.einsum("bthd,hdn->btn", np.asarray(heads, np.float64), dense)
    atol = rounding(x, dense.reshape(K, N))
    products = (
        (lambda w, x: jnp.einsum("bthd,hdn->btn", x, w), heads),
        (lambda w, x: jnp.einsum("bdth,hdn->btn", x, w), heads.transpose(0, 3, 1, 2)),
        (lambda w, x: jnp.einsum("ndh,bthd->btn", w.transpose(2, 1, 0), x), heads),
        (lambda w, x: x @ w.reshape(K, N), x),
        (lambda w, x: x @ w.reshape(K, 2, N // 2).transpose(1, 2, 0).reshape(N, K).T, x),
        (lambda w, x: jnp.moveaxis(jnp.einsum("hdn,bthd->nbt", w, x), 0, -1), heads),
    )

    @jax.jit
    def run(q):
        return [quantized(fn, on_dense="error")(q, moved) for fn, moved in products]

    for got in run(q):
        assert np.all(np.abs(got - want) <= atol)
    half = quantized(lambda w, x: x @ w.reshape(K, N).astype(x.dtype))(q, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # x and the float rows are rounded to 8 bits, the result once more
    assert np.all(
        np.abs(np.asarray(half, np.float64) - want) <= atol + 3 * 2**-8 * np.abs(x) @ np.abs(dense.reshape(K, N))
    )


@pytest.mark.parametrize(("spec", "transform"), [(W8, llm_int8()), (W4, salient())], ids=["w8a8", "w4a16"])
def test_scan_stack_vmap_experts_and_slices(rng, spec, transform):
    q, x = stacked(rng, 3, spec, transform), inputs(rng, 3, 4)
    dense, wide = np.asarray(dequantize(q), np.float64), np.asarray(x, np.float64)
    assert q.index.shape == (3, 1, 1)

    products = {
        "scan": (lambda w, x: jax.lax.scan(lambda _, wx: (None, wx[1] @ wx[0]), None, (w, x))[1], slice(None)),
        "vmap": (jax.vmap(lambda w, x: x @ w), slice(None)),
        "einsum": (lambda w, x: jnp.einsum("ekn,emk->emn", w, x), slice(None)),
        "index": (lambda w, x: x[1] @ w[1], 1),
        "dynamic": (lambda w, x: x[2] @ jax.lax.dynamic_index_in_dim(w, jnp.argmax(x[:, 0, 0] * 0) + 2, 0, False), 2),
        "gather": (lambda w, x: jnp.einsum("emk,ekn->emn", x[jnp.asarray([2, 0])], w[jnp.asarray([2, 0])]), [2, 0]),
        "halves": (lambda w, x: jnp.concatenate([x[0] @ part for part in jnp.split(w[0], 2, -1)], -1), 0),
        "scaled": (lambda w, x: x[0] @ (-w[0] / 2) * -2, 0),
    }

    @jax.jit
    def run(q, x):
        return {name: quantized(fn, on_dense="error")(q, x) for name, (fn, _) in products.items()}

    for name, got in run(q, x).items():
        at = products[name][1]
        assert np.all(np.abs(got - wide[at] @ dense[at]) <= slack(wide[at], dense[at], spec)), name


def slack(x, w, spec):
    """Where outliers of x need not be the weight's own, a token's step is that of its greatest element."""
    sums = np.abs(x) @ np.abs(w) * (K + 2) * 1.2e-7
    if spec.activation is None:
        return sums
    return np.abs(x).max(-1, keepdims=True) / 255 * np.abs(w).sum(-2, keepdims=True) + sums


@pytest.mark.parametrize("spec", [(None, "model"), ("model", None)], ids=["outputs", "channels"])
def test_shard_map(rng, spec):
    x, w = inputs(rng, 3), weight(rng, K, N)
    q = with_outliers(w, W4, x, salient())
    parts = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, w):
        return jax.lax.psum(x @ w, "model") if spec[0] else x @ w

    def model(w, x):
        ins, out = (parts(None, spec[0]), parts(*spec)), parts(None, spec[1])
        return jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=out)(x, w)

    assert bool(explain(model, q, x).dense) == bool(spec[0])
    dense = np.asarray(dequantize(q), np.float64)
    assert np.all(np.abs(jax.jit(quantized(model))(q, x) - np.asarray(x, np.float64) @ dense) <= summing(x, dense))


def test_packed_for_a_kernel(rng):
    """The base may lie as a kernel reads it; every view leaves the outliers beside it."""
    q = stacked(rng, 2, QuantSpec(TensorSpec("int4", PerGroup(32), scale_dtype="bfloat16")), salient(), K, 64)
    packed, x = pack_for(q, "h200"), inputs(rng, 2, 3).astype(jnp.bfloat16)
    assert packed.base.layout != "plain"
    run = jax.jit(
        quantized(lambda w, x: jax.lax.scan(lambda _, wx: (None, wx[1] @ wx[0].astype(x.dtype)), None, (w, x))[1])
    )
    for got in (run(packed, x), run(q, x)):
        want = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
        # the base's part, the float rows and the sum are rounded to 8 bits
        assert np.all(np.abs(np.asarray(got, np.float64) - want) <= 3 * 2**-8 * np.abs(x) @ np.abs(dequantize(q)))
    for got, want in zip(jax.tree.leaves(pack_for(packed, "plain")), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(got, want)


def test_ragged_experts(rng):
    q = stacked(rng, 3, W8, llm_int8())
    parts = [inputs(rng, m, outlier=5 + i) for i, m in enumerate((2, 0, 4))]
    sizes, rows = jnp.asarray([2, 0, 4]), jnp.concatenate(parts)
    got = quantized(jax.lax.ragged_dot, on_dense="error")(rows, q, sizes)
    dense = np.asarray(dequantize(q), np.float64)
    want = np.concatenate([np.asarray(p, np.float64) @ w for p, w in zip(parts, dense, strict=True)])
    # every row's outlier is its own expert's, so steps are those of elements of at most 1
    allowed = [
        1 / 255 * np.abs(w).sum(0) + (K + 2) * 1.2e-7 * np.abs(p) @ np.abs(w) for p, w in zip(parts, dense, strict=True)
    ]
    assert np.all(np.abs(got - want) <= np.concatenate(allowed))


def test_lookups_give_the_float_rows(rng):
    """A table [V, D] whose D has outliers, as a tied embedding's, is looked up and attended."""
    x = inputs(rng, 4)
    table = quantize_weight(weight(rng, 10, K), W8, llm_int8(), gather(x), axis=(-1,))[0]
    rows = quantized(lambda t, i: t[i], on_dense="error")(table, jnp.asarray([3, 9, 0]))
    np.testing.assert_array_equal(rows, dequantize(table)[jnp.asarray([3, 9, 0])])
    attended = quantized(lambda t, x: x @ t.T, on_dense="error")(table, x)
    dense = np.asarray(dequantize(table), np.float64)
    assert np.all(np.abs(attended - np.asarray(x, np.float64) @ dense.T) <= rounding(x, dense.T))


def test_what_has_no_form_is_recorded_dense(rng):
    x, w = inputs(rng, N), weight(rng, K, N)
    q = with_outliers(w, W8, x, llm_int8())
    uses = (
        (lambda w: w @ jnp.ones((N, 2)), "counted along other axes"),
        (lambda w: jnp.ones((1, K // 2)) @ w[: K // 2], "outliers are counted in"),
        (lambda w: w.reshape(-1) * 2.0, "outliers are counted in"),
        (lambda w: jnp.concatenate([w, w], 1), "joins weights that have outlier"),
        (lambda w: w[jnp.asarray([1])], "packed axis"),
    )
    got = jax.jit(lambda q: [quantized(fn)(q) for fn, _ in uses])(q)
    want = jax.jit(lambda w: [fn(w) for fn, _ in uses])(dequantize(q))
    for (fn, reason), ours, theirs in zip(uses, got, want, strict=True):
        table = explain(fn, q)
        assert table.rows[0][5] == "DENSE"
        assert reason in table.rows[0][6], table
        np.testing.assert_allclose(ours, theirs, atol=K * K * 1.2e-7)
    with pytest.raises(Unrepresentable, match="counted in"):
        view_weight(q, lambda part: _views.slice_dim(part, 0, 0, 32))
    with pytest.raises(NotImplementedError, match="counted along other axes"):
        _ops.dot_general(q, jnp.ones((N, 2)), (((1,), (0,)), ((), ())))


def test_sequential_quantization_goes_on_with_outliers(rng):
    """The second layer is calibrated on what the first one, outliers in float, gives."""
    params, x = {"w": weight(rng, 2, K, K)}, inputs(rng, 16)

    def model(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w / K), None), x, p["w"])[0]

    config = QuantConfig(W8, algorithm=llm_int8())
    q = quantize(params, config, apply_fn=model, batches=[x], sequential=True)
    assert q["w"].index.ravel().tolist() == [7, 7]
    want = model(params, x)
    kept = jnp.abs(jax.jit(quantized(model, on_dense="error"))(q, x) - want)
    stretched = jnp.abs(jax.jit(quantized(model))(quantize(params, QuantConfig(W8)), x) - want)
    assert kept.mean() < stretched.mean() / 10


def test_tables_name_the_format(rng, tmp_path):
    x = inputs(rng, 4, 5)
    params = {"layer": {"kernel": weight(rng, K, N), "bias": jnp.zeros(N)}}

    def model(p, x):
        return x @ p["layer"]["kernel"] + p["layer"]["bias"].reshape(1, 1, N)

    config = QuantConfig(W8, algorithm=llm_int8(capacity=0.02))
    qparams = quantize(params, config, apply_fn=model, batches=[x])
    q = qparams["layer"]["kernel"]
    assert isinstance(q, OutlierArray)
    assert [path for path, _ in named_leaves(qparams)] == ["layer/bias", "layer/kernel"]
    row = summary(qparams).leaves[1]
    assert (row.format, row.nbytes, row.quantized) == ("int8+outliers", q.nbytes, True)
    assert q.nbytes == K * N + q.base.scale.nbytes + 2 * N * 4 + 2 * 4
    assert row.bits == summary(qparams).bits_per_weight == 8 * q.nbytes / (K * N)
    table = explain(model, qparams, x, config=config)
    assert [r[:2] + r[4:6] for r in table.rows] == [("layer/kernel", "int8+outliers", "dot_general", "xla")]
    assert table.left[0][0] == "layer/bias"
    assert quantize(qparams, QuantConfig(W8))["layer"]["kernel"] is q
    save(tmp_path / "q", qparams)
    restored = load(tmp_path / "q")
    with pytest.raises(ValueError, match="layer/kernel: no format of Hugging Face holds float channels"):
        save_huggingface(tmp_path / "hf", {"layer": {"kernel": q}}, {"model_type": "llama"}, format="gptq")
    run = jax.jit(quantized(model))
    np.testing.assert_array_equal(run(restored, x), run(qparams, x))


def test_padded_heads_count_logical_channels(rng):
    """K is padded inside the matrix, head by head; the container counts channels without padding."""
    w, stats = weight(rng, 3, 10, N), jnp.asarray(rng.uniform(0, 1, (8, 30)), jnp.float32).at[:, 27].set(50)
    q = quantize_weight(
        w, QuantSpec(TensorSpec("int4", PerGroup(8), pad=True)), salient(fraction=0.01), gather(stats), axis=(-3, -2)
    )[0]
    assert q.index.item() == 27
    np.testing.assert_array_equal(dequantize_outliers(q)[2, 7], w[2, 7])
    x = jnp.asarray(rng.uniform(-1, 1, (5, 3, 10)), jnp.float32)
    got = quantized(lambda w, x: jnp.einsum("bhd,hdn->bn", x, w), on_dense="error")(q, x)
    dense = np.asarray(dequantize(q), np.float64)
    np.testing.assert_allclose(got, np.einsum("bhd,hdn->bn", np.asarray(x, np.float64), dense), atol=30 * 30 * 1.2e-7)


def test_a_weight_with_more_outliers_than_places_keeps_its_inputs_in_float(rng):
    x = np.clip(rng.normal(size=(32, 64)), -5, 5).astype(np.float32)  # below the threshold of 6
    params = {name: jnp.asarray(rng.normal(size=(64, 64)).astype(np.float32) / 8) for name in ("few", "many")}

    def model(p, x):
        return x @ p["few"], (x * 3) @ p["many"]

    report = Report()
    config = QuantConfig.preset("w8a8", algorithm=llm_int8())
    q = quantize(params, config, apply_fn=model, batches=[jnp.asarray(x)], report=report)
    assert q["few"].base.activation is not None
    assert q["many"].base.activation is None
    assert [row.note for row in report.rows] == ["", "more outliers than places: its inputs stay in float"]
    few, many = quantized(model)(q, jnp.asarray(x))
    dense = dequantize(q)
    # Float inputs: the product differs from the dequantized weight's by rounding only; rounded ones by a step of 1/255.
    assert np.abs(many - (x * 3) @ dense["many"]).max() < 64 * np.finfo(np.float32).eps * np.abs(x * 3).max() * 8
    assert np.abs(few - x @ dense["few"]).max() > 1e-4


def test_a_stack_walked_layer_by_layer_has_one_form(rng):
    x = np.clip(rng.normal(size=(8, 64)), -5, 5).astype(np.float32)
    w = np.stack([np.eye(64), 3 * np.eye(64), np.eye(64)]).astype(
        np.float32
    )  # the last layer's inputs pass the threshold
    config = QuantConfig(PRESETS["w8a8"], algorithm=llm_int8(threshold=7.0), skip=())

    def model(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    options = {"apply_fn": model, "batches": [jnp.asarray(x)]}
    with pytest.raises(ValueError, match="w: its layers differ in form"):
        quantize({"w": jnp.asarray(w)}, config, sequential=True, **options)
    assert quantize({"w": jnp.asarray(w)}, config, **options)["w"].base.activation is None  # as a whole, in float
