"""The decoder against `transformers` (golden logits) and against itself, with and without a cache."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import Decoder, DecoderConfig, generate, load_hf
from experiments.models.generate import continue_text

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "decoder"
FAMILIES = ["llama", "llama_bias", "mistral", "qwen2", "qwen2_window", "qwen3", "mixtral", "qwen3_moe", "qwen3_moe_raw"]

# Each logit is the end of about 12 chained float32 products and norms (6 a layer, 2 layers), each of which carries a
# relative rounding error of about eps * sqrt(48), 48 being the longest contraction; the terms of a logit
# add up to several times its own size. Together: 12 * sqrt(48) * 1.2e-7 = 1e-5 of the largest logit, times 4.
RELATIVE = 4 * 12 * 48**0.5 * np.finfo(np.float32).eps


def _golden(family):
    config, params = load_hf(FIXTURES / family)
    golden = np.load(FIXTURES / family / "golden.npz")
    return Decoder(config), params, jnp.asarray(golden["tokens"]), golden["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_what_transformers_computes(family):
    model, params, tokens, logits = _golden(family)
    got = jax.jit(model.forward)(params, tokens)
    np.testing.assert_allclose(got, logits, rtol=0, atol=RELATIVE * np.abs(logits).max())


# What an attention over a cache may differ in: bias and experts are not among it.
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2_window", "qwen3", "mixtral"])
def test_prefill_in_pieces_and_decode_steps_follow_transformers(family):
    model, params, tokens, logits = _golden(family)
    cache = model.init_cache(batch=2, capacity=27)
    got = {}
    prefill = jax.jit(model.prefill)
    got[7], cache = prefill(params, tokens[:, :8], cache)
    got[15], cache = prefill(params, tokens[:, 8:16], cache)
    decode = jax.jit(model.decode_step)
    for at in range(16, 24):
        got[at], cache = decode(params, tokens[:, at], cache)
    assert int(cache.length) == 24
    expected = logits[:, list(got)]
    np.testing.assert_allclose(jnp.stack(list(got.values()), 1), expected, rtol=0, atol=RELATIVE * np.abs(logits).max())


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_bfloat16_products_stay_near_float32(family):
    model, params, tokens, logits = _golden(family)
    low = jax.jit(model.clone(dtype=jnp.bfloat16).forward)(params, tokens)
    assert low.dtype == jnp.float32
    # the same count of roundings as RELATIVE, with bfloat16's eps, but sums kept in float32: no sqrt(48)
    assert np.abs(low - logits).max() < 4 * 12 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(logits).max()
    assert np.abs(low - logits).max() > RELATIVE * np.abs(logits).max()


@pytest.mark.parametrize(("family", "reach"), [("mistral", 9), ("llama", 24)])
def test_a_token_sees_as_far_back_as_its_windows_allow(family, reach):
    """Two layers of a window of 5 see 1 + 2 * 4 tokens; full attention sees all."""
    model, params, tokens, _ = _golden(family)

    def last_logit(embedding):
        return model.forward({**params, "embed_tokens": {"embedding": embedding}}, tokens[:1])[0, -1, 0]

    influence = jax.jit(jax.grad(last_logit))(params["embed_tokens"]["embedding"])
    seen = np.flatnonzero(np.abs(influence).sum(-1))
    assert set(seen) == set(np.asarray(tokens[0, 24 - reach :]).tolist())


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, params, tokens, _ = _golden("qwen3")
    prompt = tokens[:, :5]
    out = jax.jit(generate, static_argnums=(0, 3))(model, params, prompt, 6)
    likeliest = jnp.argmax(jax.jit(model.forward)(params, out), axis=-1)
    np.testing.assert_array_equal(out[:, :5], prompt)
    np.testing.assert_array_equal(out[:, 5:], likeliest[:, 4:-1])


def test_sampling_follows_the_model_s_distribution():
    model, params, tokens, _ = _golden("llama")
    prompt = jnp.broadcast_to(tokens[:1, :4], (4000, 4))
    drawn = jax.jit(generate, static_argnums=(0, 3, 4))(model, params, prompt, 1, 1.0, jax.random.key(3))[:, -1]
    share = np.bincount(drawn, minlength=64) / 4000
    chance = np.asarray(jax.nn.softmax(jax.jit(model.forward)(params, tokens[:1, :4])[0, -1]))
    # five standard deviations of a binomial share
    assert (np.abs(share - chance) <= 5 * np.sqrt(chance * (1 - chance) / 4000) + 1 / 4000).all()


def test_continuations_start_from_other_excerpts_and_are_the_same_in_every_call():
    model, params, tokens, _ = _golden("llama")
    sequences = np.asarray(tokens)[:, :24]
    first, second, third = continue_text(model, params, sequences, 3)
    for n, text in enumerate((first, second, third)):
        assert text.shape == sequences.shape
        np.testing.assert_array_equal(text[:, :6], sequences[:, 6 * n : 6 * n + 6])
    np.testing.assert_array_equal(continue_text(model, params, sequences, 2)[1], second)
    assert (first[:, 6:] != sequences[:, 6:]).any()


def test_generation_refuses_bad_arguments():
    model, params, tokens, _ = _golden("llama")
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, params, tokens, 0)
    with pytest.raises(ValueError, match="key"):
        generate(model, params, tokens, 1, temperature=0.5)


def _hf(**changes):
    fields = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
    }
    return fields | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "linear"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked"] * 2},
            "chunked",
        ),
    ],
)
def test_config_refuses_what_the_decoder_has_not(changes, named):
    with pytest.raises(NotImplementedError, match=named):
        DecoderConfig.from_hf(_hf(**changes))


@pytest.mark.parametrize(
    ("changes", "named"), [({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim")]
)
def test_config_refuses_impossible_heads(changes, named):
    with pytest.raises(ValueError, match=named):
        DecoderConfig.from_hf(_hf(**changes))


def test_config_reads_both_spellings_of_the_rotary_fields():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = DecoderConfig.from_hf(_hf(rope_theta=5e5, rope_scaling=scaling))
    new = DecoderConfig.from_hf(_hf(rope_parameters={"rope_theta": 5e5, **scaling}))
    assert old == new
    assert (old.rope_theta, old.rope_scaling.factor, old.head_dim, old.num_key_value_heads) == (5e5, 8.0, 8, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_the_way_out_and_back(family):
    config, _ = load_hf(FIXTURES / family)
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_config_with_two_windows_cannot_be_written():
    config = dataclasses.replace(load_hf(FIXTURES / "qwen2")[0], windows=(3, 5))
    with pytest.raises(NotImplementedError, match="sliding_window"):
        config.to_hf()


# The largest error of a value over the largest value: half a step of each format, of which a key's token has both ends.
STEPS = {"float": 0, "int8": 1 / 254, "int4": 1 / 15}


@pytest.mark.parametrize("format", STEPS)
def test_decoding_with_a_quantized_cache(format):
    """A prompt in pieces, then a generation: what is cached differs from the float model's by its format's step."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = Decoder(DecoderConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=32))
    params = jax.jit(model.init_params)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 64)
    expected = jax.jit(model.forward)(params, tokens)[:, 5:]
    cache = model.init_cache(batch=2, capacity=12, format=format)
    first, cache = jax.jit(model.prefill)(params, tokens[:, :6], cache)
    got, decode = [first], jax.jit(model.decode_step)
    for at in range(6, 9):
        out, cache = decode(params, tokens[:, at], cache)
        got.append(out)
    np.testing.assert_array_equal(cache[-1].lengths, [9, 9])
    error = np.abs(jnp.stack(got, 1) - expected).max() / np.abs(expected).max()
    # One layer: the last norm sees the attention's output and a stream that the cache does not touch, which here is
    # the smaller of the two, and divides by their sum: a few times the relative error at most.
    assert error <= RELATIVE + 4 * STEPS[format]
    assert format == "float" or error > 0
    if format == "int4":
        run = jax.jit(generate, static_argnums=(0, 3), static_argnames="cache_format")
        assert run(model, params, tokens, 3, cache_format=format).shape == (2, 12)
