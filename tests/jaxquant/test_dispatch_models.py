"""Models that nobody here wrote run quantized under the default rules, with no dense fallback."""

import math

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from mamba2_jax import modeling

from jaxquant._quantize import dequantize, quantize
from jaxquant.arrays._spec import QuantConfig
from jaxquant.tracing._quantized import explain, quantized

CONFIG = QuantConfig.preset("w4a16", group_size=16)


def check(fn, params, tokens, products, layers):
    """Compares with the dequantized model: eps sqrt(K) for each of about eight products a layer, summed in float32."""
    qparams = quantize(params, CONFIG)
    explanation = explain(fn, qparams, tokens)
    assert explanation.dense == (), str(explanation)
    assert explanation.products == products, str(explanation)
    got = jax.jit(quantized(fn, on_dense="error"))(qparams, tokens)
    want = jax.jit(fn)(dequantize(qparams), tokens)
    allowed = 8 * 8 * layers * float(jnp.finfo(jnp.float32).eps) * math.sqrt(64) * jnp.max(jnp.abs(want))
    assert jnp.max(jnp.abs(got - want)) <= allowed


def test_gemma(gemma, lenient_jax, rng):
    local, full = gemma.nn.AttentionType.LOCAL_SLIDING, gemma.nn.AttentionType.GLOBAL
    config = gemma.nn.config.TransformerConfig(
        num_embed=48, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=16, num_kv_heads=2, final_logit_softcap=30.0,
        use_post_attn_norm=True, use_post_ffw_norm=True, attention_types=(local, full), sliding_window_size=4,
        use_qk_norm=True, transpose_gating_einsum=True,
    )  # fmt: skip
    model = gemma.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens")
    tokens = jnp.asarray(rng.integers(1, 48, (2, 7)))
    params = model.init(jax.random.key(int(rng.integers(2**31))), tokens)["params"]
    # q, k and v (one einsum), the attention's output, gate and up (one einsum), down
    check(lambda p, t: model.apply({"params": p}, t).logits, params, tokens, products=2 * 5, layers=2)


def test_mamba2(lenient_jax, rng):
    config = modeling.Mamba2Config(
        vocab_size=48, hidden_size=32, state_size=16, head_dim=16, chunk_size=4, num_hidden_layers=2
    )
    model = modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.asarray(rng.integers(1, 48, (2, 8)))
    check(lambda p, t: nnx.merge(graph, p, rest)(t)["logits"], params, tokens, products=2 * 2, layers=2)


def test_haiku(lenient_jax, rng):
    def body(x):
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(4, 8, w_init=hk.initializers.VarianceScaling(1.0), model_size=32)(h, h, h)
        return x + hk.Linear(32)(jax.nn.gelu(hk.Linear(64)(hk.LayerNorm(-1, True, True)(x))))

    model = hk.without_apply_rng(hk.transform(body))
    x = jnp.asarray(rng.standard_normal((2, 7, 32)), jnp.float32)
    params = model.init(jax.random.key(int(rng.integers(2**31))), x)
    check(model.apply, params, x, products=4 + 2, layers=1)


def test_equinox(lenient_jax, rng):
    key = jax.random.key(int(rng.integers(2**31)))
    attention, mlp = eqx.nn.MultiheadAttention(4, 32, key=key), eqx.nn.MLP(32, 32, 64, 2, key=key)
    params, static = eqx.partition((attention, mlp), eqx.is_array)

    def run(params, x):
        attention, mlp = eqx.combine(params, static)
        return jax.vmap(mlp)(x + attention(x, x, x))

    # [out, in] weights, as Equinox keeps them, contract their last axis
    check(run, params, jnp.asarray(rng.standard_normal((7, 32)), jnp.float32), products=4 + 3, layers=1)
