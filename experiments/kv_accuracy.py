"""What quantized caches and attention cost the embedded model: `python -m experiments.kv_accuracy [--json FILE]`.

Caches are compared on the model's own long generations: prompts of held-out source text, continued by 1,500 sampled
tokens. The float model and the model whose keys and values are rounded then read the same tokens; KL(float || rounded)
is taken at every generated one. All positions are computed at once: a query takes the tokens that are in the rings of
recent ones at its time as they are, and the others rounded, which is what a decode loop over a `jaxquant.KVCache` does.
Positions reach to 1,536 of the 2,048 that the model's configuration allows.

Attention is compared on the held-out sequences, mode by mode, with the cosine similarity of every layer's output.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments._clock import write_results
from experiments.evaluation import token_measures
from experiments.models import Decoder, generate, load_hf
from jaxquant.arrays._qtypes import NF4_LEVELS
from jaxquant.kv_cache._groups import quantize_groups
from pallas_kernels.decode_attention import quantized_tokens
from pallas_kernels.decode_attention.reference import dequantize_codes

MODEL = pathlib.Path(__file__).parent / "models" / "tiny_python"
WINDOW = 128
GROUP = 32
PROMPT = 36
GENERATED = 1500
Rounding = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def main() -> int:
    """Measures everything, prints it and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    parser.add_argument("--sequences", type=int, default=2, help="generations to compare on")
    arguments = parser.parse_args()
    config, params = load_hf(MODEL)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    held_out = np.load(MODEL / "evaluation.npy").astype(np.int32)
    tokens = generations(Decoder(config), params, jnp.asarray(held_out[: arguments.sequences, :PROMPT]), GENERATED)
    rows = {
        "caches": cache_rows(Decoder(config), params, tokens),
        "attention": attention_rows(Decoder(config), params, jnp.asarray(held_out[:32])),
    }
    if arguments.json:
        write_results(arguments.json, **rows)
    return 0


def generations(model: Decoder, params, prompts: jax.Array, count: int) -> jax.Array:
    """Prompts [B, P] continued by `count` tokens drawn from the model's own distribution."""
    run = jax.jit(generate, static_argnums=(0, 3, 4))
    return run(model, params, prompts, count, 1.0, jax.random.key(0))


def cache_rows(model: Decoder, params, tokens: jax.Array) -> list[dict]:
    """KL to the float cache of every format, over the generated tokens."""
    reference = jax.jit(model.forward)(params, tokens[:, :-1])
    heads = {"kv_heads": model.config.num_key_value_heads, "head_dim": model.config.head_dim}
    rows = []
    for name, (rounding, window, bits) in caches(model.config.head_dim).items():
        rounded = model.clone(implementation=functools.partial(rounded_attention, rounding, window))
        logits = jax.jit(rounded.forward)(params, tokens[:, :-1])
        _, kl, same = (x[:, PROMPT - 1 :] for x in token_measures(reference, logits, tokens[:, 1:]))
        row = {"cache": name, "bits": bits, "kl": float(kl.mean()), "top1": float(same.mean()), **heads}
        row["kl_last_third"] = float(kl[:, -GENERATED // 3 :].mean())
        rows.append(row)
        print(f"{name:34} {bits:5.2f} bits  KL {row['kl']:.2e}  last third {row['kl_last_third']:.2e}", flush=True)
    return rows


def caches(head_dim: int) -> dict[str, tuple[Rounding, int, float]]:
    """Of each cache: how it rounds keys and values [B, T, K, H], how many recent tokens stay float, bits an element."""
    int8, fp8 = (functools.partial(eight_bits, format=name) for name in ("int8", "float8_e4m3fn"))
    four, two = (functools.partial(kivi, bits=bits) for bits in (4, 2))
    asymmetric = functools.partial(per_token, quantize=functools.partial(affine, bits=4))
    normal = functools.partial(per_token, quantize=nf4)
    eight = 8 + 32 / head_dim
    return {
        "int8": (int8, 0, eight),
        "int8, 128 recent": (int8, WINDOW, eight),
        "fp8": (fp8, 0, eight),
        "fp8, 128 recent": (fp8, WINDOW, eight),
        "int4, 128 recent (KIVI)": (four, WINDOW, 5.0),
        "int4, rotated, 128 recent": (rotated(four), WINDOW, 5.0),
        "int4 per token, 128 recent": (asymmetric, WINDOW, 5.0),
        "NF4 per token, 128 recent": (normal, WINDOW, 4.5),
        "NF4 per token, rotated, 128 recent": (rotated(normal), WINDOW, 4.5),
        "int2, 128 recent (KIVI)": (two, WINDOW, 3.0),
        "int2, rotated, 128 recent": (rotated(two), WINDOW, 3.0),
    }


def rounded_attention(rounding: Rounding, window: int, q, k, v, *, causal: bool):
    """Causal attention [B, T, N, H] over a cache of rounded keys and values, `window` recent ones being float."""
    rounded_k, rounded_v = rounding(k, v)
    at = jnp.arange(q.shape[1], dtype=jnp.int32)
    left = quantized_tokens(at + 1, window) if window else at + 1
    is_rounded, seen = ((at[None] < end[:, None])[None, None, None] for end in (left, at + 1))
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    rounded, recent = (jnp.einsum("btkgd,bskd->bkgts", grouped, keys) * q.shape[3] ** -0.5 for keys in (rounded_k, k))
    scores = jnp.where(is_rounded, rounded, recent)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    parts = (jnp.where(is_rounded, weights, 0.0), rounded_v), (jnp.where(is_rounded, 0.0, weights), v)
    return sum(jnp.einsum("bkgts,bskd->btkgd", *part) for part in parts).reshape(q.shape)


def eight_bits(k, v, *, format: str):
    """A `KVCache` of a token's own scale."""
    cache = jq.KVCache.init(k.shape[0], k.shape[1], k.shape[2], k.shape[3], format=format, dtype=jnp.float32)
    k, v = cache.append(k, v).dequantize()
    return k.swapaxes(1, 2), v.transpose(0, 3, 1, 2)


def kivi(k, v, *, bits: int):
    """Keys per channel in groups of tokens, values per token in groups of channels."""
    padded = jnp.pad(k, ((0, 0), (0, -k.shape[1] % GROUP), (0, 0), (0, 0)))
    k = affine(padded.swapaxes(1, 2), bits=bits).swapaxes(1, 2)[:, : k.shape[1]]
    return k, affine(v.transpose(0, 2, 3, 1), bits=bits).transpose(0, 3, 1, 2)


def per_token(k, v, *, quantize: Callable):
    """Keys and values per token in groups of channels."""
    return tuple(quantize(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for x in (k, v))


def affine(x, *, bits: int):
    """Rounds x [..., R, C] in groups of 32 rows with a scale and an offset each."""
    codes, scale, offset = quantize_groups(x, bits)
    return dequantize_codes(codes, scale, offset, bits)


def nf4(x):
    """Rounds x [..., R, C] to the 16 levels of NF4 in groups of 32 rows with a float16 largest magnitude each."""
    groups = x.reshape(*x.shape[:-2], -1, GROUP, x.shape[-1])
    largest = jnp.max(jnp.abs(groups), axis=-2, keepdims=True).astype(jnp.float16).astype(jnp.float32)
    levels = jnp.asarray(NF4_LEVELS, jnp.float32)
    midpoints = (levels[1:] + levels[:-1]) / 2
    return (levels[jnp.searchsorted(midpoints, groups / largest)] * largest).reshape(x.shape)


def rotated(rounding: Rounding) -> Rounding:
    """Rounds keys and values in a Hadamard basis of each head's channels, which spreads outliers over all of them."""

    def round_rotated(k, v):
        basis = hadamard(k.shape[3])
        k, v = rounding(k @ basis, v @ basis)
        return k @ basis.T, v @ basis.T

    return round_rotated


def hadamard(size: int) -> jax.Array:
    """The orthonormal Hadamard matrix of a power of two, its rows' signs drawn at random."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size)
    return jnp.asarray(signs[:, None] * matrix / np.sqrt(size), jnp.float32)


def attention_rows(model: Decoder, params, tokens: jax.Array) -> list[dict]:
    """KL of every mode of `jq.attention` in all layers, the cosine of each layer, and the chosen modes."""
    modes = ("int8_fp8", "int8_f16", "fp8", "int8_int8", "f16_fp8")

    def run(params, inputs, attention):
        return model.clone(implementation=attention).forward(params, inputs)

    batches = [tokens[start : start + 8, :-1] for start in range(0, len(tokens), 8)]
    chosen = jq.choose_attention_modes(run, params, batches, modes=modes)
    attentions = {mode: lambda mode=mode: functools.partial(jq.attention, mode=mode) for mode in modes}
    reference = jax.jit(model.forward)
    rows = []
    for name, attention in (attentions | {"chosen": chosen.attention}).items():
        forward = jax.jit(lambda params, inputs, attention=attention: run(params, inputs, attention()))
        kl = [token_measures(reference(params, x), forward(params, x), jnp.zeros_like(x))[1].mean() for x in batches]
        row = {"mode": name, "kl": float(np.mean(kl))}
        row["cosines"] = [c[name] for c in chosen.cosines] if name in modes else list(chosen.modes)
        rows.append(row)
        print(f"attention {name:12} KL {row['kl']:.2e}  {row['cosines']}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
