"""Unmodified models run quantized: how many quantized products, no dense fallback, the dequantized model's result."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant._quantize import dequantize, quantize
from jaxquant.arrays._spec import QuantConfig, Rule
from jaxquant.parameters._tree import is_quantized
from jaxquant.tracing._quantized import explain, quantized

D, HEADS, BATCH, LENGTH = 32, 4, 2, 5


def everything(name="w4a16", group=16, rules=()):
    """A preset that leaves nothing but vectors alone."""
    preset = QuantConfig.preset(name, group_size=group if name in ("w4a16", "w4a16-asym", "w4a8") else None)
    return QuantConfig(preset.default, tuple(rules), skip=(r"(.*/)?(bias|scale|cache.*|cached_.*)",))


def uniform(*shape, dtype=jnp.float32):
    """Fresh random input."""
    rng = np.random.default_rng()
    return jnp.asarray(rng.uniform(-1, 1, shape), dtype)


def bound(want, depth, dtype=jnp.float32):
    """The largest |got - want| that summing in another order allows.

    Each product of K <= 4 D terms is off by at most eps sqrt(K) of its size (random signs), the result and its casts by
    a few eps more; layers here have gain of about one, so `depth` products add up. 8 covers the ratio of largest to
    typical.
    """
    largest = float(jnp.max(jnp.abs(want.astype(jnp.float32))))
    return 8 * depth * float(jnp.finfo(dtype).eps) * math.sqrt(4 * D) * largest


def check(fn, params, *args, products, config=None, depth=4, dtype=jnp.float32):
    """Runs fn quantized under on_dense='error' and compares with the dequantized model."""
    qparams = quantize(params, config or everything())
    assert any(map(is_quantized, jax.tree.leaves(qparams, is_leaf=is_quantized)))
    explanation = explain(fn, qparams, *args)
    assert explanation.dense == (), str(explanation)
    assert explanation.products == products, str(explanation)
    got = jax.tree.leaves(dequantize(jax.jit(quantized(fn, on_dense="error"))(qparams, *args)))
    want = jax.tree.leaves(jax.jit(fn)(dequantize(qparams), *args))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(b.dtype, jnp.floating):
            error = jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
            assert error <= bound(b, depth, dtype), f"{error} > {bound(b, depth, dtype)}"
        else:
            np.testing.assert_array_equal(a, b)
    return qparams


class Mlp(nn.Module):
    dtype: jnp.dtype = jnp.float32
    wrap: str = "none"

    @nn.compact
    def __call__(self, x):
        dense = {"none": nn.Dense, "remat": nn.remat(nn.Dense), "jit": nn.jit(nn.Dense)}[self.wrap]
        x = nn.gelu(dense(4 * D, dtype=self.dtype, name="up")(x))
        return dense(D, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h)
        return x + Mlp()(nn.LayerNorm()(x)), None


def scanned_block(policy=None):
    return nn.scan(nn.remat(Block, policy=policy), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()


@pytest.mark.parametrize(
    ("wrap", "dtype"), [("none", jnp.float32), ("none", jnp.bfloat16), ("remat", jnp.float32), ("jit", jnp.bfloat16)]
)
def test_linen_dense(wrap, dtype):
    model, x = Mlp(dtype, wrap), uniform(BATCH, LENGTH, D, dtype=dtype)
    params = jax.jit(model.init)(jax.random.key(0), x)
    check(model.apply, params, x, products=2, dtype=dtype)


@pytest.mark.parametrize("preset", ["w8a16", "w4a16-asym", "nf4", "w4a16-channel"])
def test_linen_dense_in_every_weight_format(preset):
    model, x = Mlp(), uniform(BATCH, LENGTH, 128)
    config = everything(preset)
    check(model.apply, model.init(jax.random.key(0), x), x, products=2, config=config)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_scan_over_remat_blocks(policy):
    model, x = scanned_block(policy), uniform(BATCH, LENGTH, D)
    params = jax.jit(model.init)(jax.random.key(0), x, None)
    check(lambda p, x: model.apply(p, x, None)[0], params, x, products=6, depth=20)


def test_linen_attention_projections_and_two_contracting_axes():
    model, x = nn.MultiHeadDotProductAttention(HEADS), uniform(BATCH, LENGTH, D)
    qparams = check(model.apply, jax.jit(model.init)(jax.random.key(0), x, x), x, x, products=4)
    assert qparams["params"]["out"]["kernel"].axis == (-3, -2)


def test_nnx_attention_split_and_merge():
    graph, state = nnx.split(nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0)), nnx.Param, ...)[:2]
    rest = nnx.split(nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0)), nnx.Param, ...)[2]
    x = uniform(BATCH, LENGTH, D)
    check(lambda p, x: nnx.merge(graph, p, rest)(x), state, x, products=4)


def test_nnx_scan():
    @nnx.vmap(in_axes=0)
    def make(key):
        return nnx.Linear(D, D, rngs=nnx.Rngs(params=key))

    graph, state = nnx.split(make(jax.random.split(jax.random.key(0), 3)))

    def run(state, x):
        layers = nnx.merge(graph, state)
        step = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, layers)

    check(run, state, uniform(BATCH, D), products=1, depth=8)


def test_tied_embedding_is_looked_up_and_attended():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(48, D)
            return embed.attend(embed(tokens))

    model, tokens = Tied(), jnp.asarray(np.random.default_rng().integers(0, 48, (BATCH, LENGTH)))
    qparams = check(model.apply, model.init(jax.random.key(0), tokens), tokens, products=2)
    assert qparams["params"]["Embed_0"]["embedding"].axis == (-1,)


def experts():
    return {"w_up": uniform(3, D, 2 * D), "w_down": uniform(3, 2 * D, D)}


def moe_einsum(p, x, route):
    h = jax.nn.silu(jnp.einsum("btd,edf->betf", x, p["w_up"]))
    return jnp.einsum("betf,efd,bte->btd", h, p["w_down"], route)


def moe_batched(p, x):
    return jnp.einsum("ecf,efd->ecd", jax.nn.relu(jnp.einsum("ecd,edf->ecf", x, p["w_up"])), p["w_down"])


def moe_ragged(p, x, sizes):
    return jax.lax.ragged_dot(jax.nn.relu(jax.lax.ragged_dot(x, p["w_up"], sizes)), p["w_down"], sizes)


def moe_gathered(p, x, chosen):
    return jnp.einsum("td,tdf->tf", x, p["w_up"][chosen]) @ p["w_down"][0]


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (moe_einsum, lambda: (uniform(BATCH, LENGTH, D), uniform(BATCH, LENGTH, 3))),
        (moe_batched, lambda: (uniform(3, 7, D),)),
        (moe_ragged, lambda: (uniform(9, D), jnp.asarray([4, 0, 5]))),
        (moe_gathered, lambda: (uniform(4, D), jnp.asarray([2, 0, 0, 1]))),
    ],
)
def test_experts(fn, args):
    check(fn, experts(), *args(), products=2, depth=16)


def test_gemma_style_projections():
    p = {"q_einsum": uniform(HEADS, D, 8), "kv_einsum": uniform(2, 2, D, 8), "attn_vec_einsum": uniform(HEADS, 8, D)}
    rules = [Rule("attn_vec_einsum", everything().default, (-3, -2))]

    def attend(p, x):
        q = jnp.einsum("BTD,NDH->BTNH", x, p["q_einsum"])
        k, v = jnp.einsum("BSD,CKDH->CBSKH", x, p["kv_einsum"])
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(*q.shape[:2], 2, 2, 8), k)
        mixed = jnp.einsum("BTKGS,BSKH->BTKGH", jax.nn.softmax(scores), v).reshape(q.shape)
        return jnp.einsum("BTNH,NHD->BTD", mixed, p["attn_vec_einsum"])

    check(attend, p, uniform(BATCH, LENGTH, D), products=3, config=everything(rules=rules), depth=16)


def fused_qkv_split(p, x):
    q, k, v = jnp.split(p["wqkv"], 3, axis=1)
    return (x @ q) * (x @ k) + x @ v


def fused_qkv_reshape(p, x):
    return jnp.einsum("td,dshk->shtk", x, p["wqkv"].reshape(D, 3, HEADS, D // HEADS))


def fused_qkv_slice(p, x):
    return x @ p["wqkv"][:, :D] + (2.0 * x) @ jax.lax.dynamic_slice_in_dim(p["wqkv"], D, D, axis=1)


def rows_in_groups(p, x):
    return x[:, :16] @ p["wqkv"][:16] + x[:, 16:] @ p["wqkv"][16:]


def transposed_and_joined(p, x):
    return jax.lax.dot_general(p["wqkv"].T, x, (((1,), (1,)), ((), ()))) @ jnp.ones((x.shape[0], 2)) + x.sum()


def joined(p, x):
    return x @ jnp.concatenate([p["wqkv"], p["wqkv"] * 0.5, -p["wqkv"] / 3], axis=1)


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (fused_qkv_split, 3),
        (fused_qkv_reshape, 1),
        (fused_qkv_slice, 2),
        (rows_in_groups, 2),
        (transposed_and_joined, 1),
        (joined, 1),
    ],
)
def test_views_of_a_weight_before_its_product(fn, products):
    check(fn, {"wqkv": uniform(D, 3 * D)}, uniform(LENGTH, D), products=products, depth=16)


@pytest.mark.parametrize("preset", ["w8a16", "w4a16"])
def test_linen_and_nnx_convolutions(preset):
    x = uniform(BATCH, 6, 6, 16)
    model = nn.Conv(24, (3, 3), strides=(2, 1))
    config = everything(preset)
    check(model.apply, model.init(jax.random.key(0), x), x, products=1, config=config)
    graph, state = nnx.split(nnx.Conv(16, 24, (3, 3), rngs=nnx.Rngs(0)))
    check(lambda p, x: nnx.merge(graph, p)(x), state, x, products=1, config=config)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_convolutions_of_integers(library):
    x = uniform(BATCH, 6, 6, 16)
    if library == "linen":
        model = nn.Conv(24, (3, 3), strides=(2, 1))
        params, run = model.init(jax.random.key(0), x), model.apply
    else:
        graph, params = nnx.split(nnx.Conv(16, 24, (3, 3), rngs=nnx.Rngs(0)))
        run = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
    qparams = quantize(params, everything("w8a8"))
    (line,) = [line for line in str(jax.make_jaxpr(quantized(run))(qparams, x)).splitlines() if "conv_general" in line]
    assert line.split(":")[1].startswith("i32")
    got, floats = quantized(run, on_dense="error")(qparams, x), dequantize(qparams)
    kernel = next(leaf for leaf in jax.tree.leaves(floats) if leaf.ndim == 4)
    # half a step of x, whose scale is at most absmax / 127, meets each weight of the window
    allowed = jnp.max(jnp.abs(x)) / 254 * jnp.sum(jnp.abs(kernel), (0, 1, 2)) * 1.01
    assert jnp.all(jnp.abs(got - run(floats, x)) <= allowed[None, None, None])


def test_depthwise_convolution():
    x, model = uniform(BATCH, 6, 16), nn.Conv(16, (3,), feature_group_count=16)
    config = everything("w8a16", rules=[Rule(".*kernel", everything("w8a16").default, (-3, -2))])
    check(model.apply, model.init(jax.random.key(0), x), x, products=1, config=config)


def test_lora_stays_a_sum_of_two_products():
    params = {"w": uniform(D, 2 * D), "lora": {"a": uniform(D, 4), "b": uniform(4, 2 * D)}}
    config = everything(rules=[Rule("lora/.*", None)])

    def adapted(p, x):
        return x @ (p["w"] + 2.0 * (p["lora"]["a"] @ p["lora"]["b"]))

    check(adapted, params, uniform(LENGTH, D), products=1, config=config)
    jaxpr = str(jax.make_jaxpr(quantized(adapted))(quantize(params, config), uniform(LENGTH, D)))
    live = jax.jit(quantized(adapted)).lower(quantize(params, config), uniform(LENGTH, D)).compile().as_text()
    assert jaxpr.count("dot_general") >= 4  # w's, x @ a, (x @ a) @ b, and a @ b
    assert f"dot(f32[{D},4]" not in live  # of which nobody reads the last


def test_scan_with_rng_and_mutable_cache():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            cache = self.variable("cache", "held", jnp.zeros, (BATCH, D))
            cache.value = cache.value + x
            x = nn.Dense(D)(x)
            return nn.Dropout(0.5, deterministic=False)(x), None

    model = nn.scan(
        Cell, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True, "dropout": True}, length=3
    )()
    x, key = uniform(BATCH, D), jax.random.key(1)
    variables = model.init({"params": jax.random.key(0), "dropout": key}, x, None)
    check(
        lambda v, x, key: model.apply(v, x, None, rngs={"dropout": key}, mutable=["cache"]),
        variables, x, key, products=1, depth=12,
    )  # fmt: skip


def loop_map(w, x):
    return jax.lax.map(lambda row: row @ w, x)


def loop_while(w, x):
    def step(state):
        i, w, x = state
        return i + 1, w, jnp.tanh(x @ w)

    return jax.lax.while_loop(lambda state: state[0] < 4, step, (0, w, x))[2]


def loop_scan_carry(w, x):
    return jax.lax.scan(lambda carry, _: ((carry[0], jnp.tanh(carry[1] @ carry[0])), carry[1]), (w, x), None, 3)


def branch(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: x @ w.T, w, x)


def choose(w, x):
    return x @ jax.lax.switch(jnp.int32(1), [lambda w: w, lambda w: w], w)


@jax.custom_vjp
def custom(w, x):
    return x @ w


custom.defvjp(lambda w, x: (x @ w, (w, x)), lambda held, g: (g.T @ held[1], g @ held[0].T))


@jax.custom_jvp
def custom_forward(w, x):
    return x @ w


custom_forward.defjvp(lambda primals, tangents: (primals[1] @ primals[0], tangents[1] @ primals[0]))


def vmapped(w, x):
    return jax.vmap(lambda row: row @ w)(x)


def barrier(w, x):
    w, x = jax.lax.optimization_barrier((w, x))
    return x @ jax.lax.stop_gradient(w)


@pytest.mark.parametrize(
    ("fn", "products"),
    [(loop_map, 1), (loop_while, 1), (loop_scan_carry, 1), (branch, 2), (custom, 1), (custom_forward, 1), (vmapped, 1),
     (barrier, 1), (choose, 1)],
)  # fmt: skip
def test_control_flow(fn, products):
    check(fn, uniform(D, D) / 4, uniform(LENGTH, D), products=products, depth=8)


def test_decode_loop_carries_parameters_and_cache():
    p = {"embedding": uniform(16, D), "wk": uniform(D, D), "wo": uniform(D, D)}

    def generate(p, first):
        def step(state):
            i, token, cache, p = state
            x = p["embedding"][token]
            cache = jax.lax.dynamic_update_index_in_dim(cache, x @ p["wk"], i, 0)
            logits = (cache.sum(0) @ p["wo"]) @ p["embedding"].T
            # The choice is made, but the result is without it: rounding may decide between two likely tokens.
            return i + 1, (token + 3) % 16 + 0 * jnp.argmax(logits), cache, p

        return jax.lax.while_loop(lambda s: s[0] < 6, step, (0, first, jnp.zeros((6, D)), p))[2]

    check(generate, p, jnp.int32(3), products=4, depth=16)


def test_vmap_over_stacked_weights():
    config = everything()
    stack, x = quantize({"w": uniform(3, D, D)}, config), uniform(3, LENGTH, D)
    got = jax.vmap(quantized(lambda p, x: x @ p["w"], on_dense="error"))(stack, x)
    want = jnp.matmul(x, dequantize(stack)["w"])
    assert jnp.max(jnp.abs(got - want)) <= bound(want, 1)


@pytest.mark.parametrize("preset", ["w4a16", "w8a8", "fp8", "w4a8"])
def test_gradient_by_x_is_that_of_the_dequantized_weight(preset):
    qparams, x = quantize({"w": uniform(D, D)}, everything(preset)), uniform(LENGTH, D)
    out = uniform(LENGTH, D)
    got = jax.grad(lambda x: jnp.vdot(quantized(lambda p, x: x @ p["w"])(qparams, x), out))(x)
    want = out @ dequantize(qparams)["w"].T
    assert jnp.max(jnp.abs(got - want)) <= bound(want, 1)


def test_gradient_by_x_against_finite_differences():
    model, x = nn.remat(Block)(), uniform(BATCH, LENGTH, D)
    qparams = quantize(model.init(jax.random.key(0), x), everything())
    run = quantized(lambda p, x: jnp.sum(jnp.sin(model.apply(p, x)[0])), on_dense="error")
    f = jax.jit(lambda x: run(qparams, x))
    way = uniform(BATCH, LENGTH, D)
    slope = jnp.vdot(jax.jit(jax.grad(f))(x), way)
    h = 1e-2
    steps = (8 * (f(x + h * way) - f(x - h * way)) - (f(x + 2 * h * way) - f(x - 2 * h * way))) / (12 * h)
    # fourth-order differences: O(h^4) of the fifth derivative, and rounding of a sum of 320 terms over h
    assert abs(slope - steps) <= 1e-2 * (1 + abs(slope))


def test_shard_map():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def sharded(w, x):
        def local(w, x):
            return x @ w

        return jax.shard_map(local, mesh=mesh, in_specs=(spec(None, "model"), spec()), out_specs=spec(None, "model"))(
            w, x
        )

    check(sharded, uniform(D, D), uniform(LENGTH, D), products=1)


def test_a_program_is_traced_once_for_each_shape():
    traces = []

    def model(w, x):
        traces.append(x.shape)
        return x @ w

    run, w = quantized(model), quantize(uniform(D, D), everything())
    for _ in range(3):
        run(w, uniform(LENGTH, D))
    assert traces == [(LENGTH, D)]


def test_integers_meet_in_the_product():
    for preset, dtype in (("w8a8", "i8"), ("w4a8", "i8"), ("fp8", "f8_e4m3fn")):
        q, x = quantize(uniform(D, D), everything(preset)), uniform(3, D)
        text = str(jax.make_jaxpr(quantized(lambda w, x: x @ w))(q, x))
        products = [line for line in text.splitlines() if "dot_general[" in line]
        assert len(products) == 1
        accumulator = "i32" if dtype == "i8" else "f32"
        assert products[0].split(":")[1].startswith(accumulator), text
        assert text.count(f"{dtype}[") >= 2, text


def test_products_of_one_activation_quantize_it_once():
    q = quantize({name: uniform(D, D) for name in "qkv"}, everything("w8a8"))
    run = quantized(lambda p, x: jnp.tanh(x @ p["q"]) * (x @ p["k"]) + x @ p["v"])
    assert str(jax.make_jaxpr(run)(q, uniform(3, D))).count(" round[") == 1


def test_static_arguments_pass_through():
    def model(w, x, *, activation: str, flag: bool):
        return getattr(jax.nn, activation)(x @ w) if flag else x

    q, x = quantize(uniform(D, D), everything()), uniform(3, D)
    assert quantized(model)(q, x, activation="relu", flag=True).shape == (3, D)
