"""Trains a small language model on the Python standard library and writes it as a Hugging Face folder.

    python -m experiments.train_lm --size tiny --out experiments/models/tiny_python

One jitted program runs a chunk of optimizer steps (bfloat16 products, float32 parameters, AdamW, warm-up and cosine)
on tokens that stay on the device. Progress and the held-out loss are printed and written to loss_curve.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Corpus, encode, read_corpus, sample_windows, train_tokenizer
from experiments.model_card import model_card
from experiments.models import Decoder, DecoderConfig, Experts, generate, save_hf
from experiments.models.moe import load_imbalance, route

CHUNK = 25  # optimizer steps in one dispatch
WARMUP = 100  # steps
EVALUATION = (256, 513)
CALIBRATION = (64, 513)
PROMPTS = ("def ", "class Queue", "import os\nimport ", "    def __init__(self")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and how: `steps` batches of `batch` windows of `context` tokens.

    `balance` is the weight, in the loss, of how unevenly each router spreads its tokens (`load_imbalance`).
    """

    config: DecoderConfig
    batch: int
    steps: int
    peak_rate: float
    weight_decay: float = 0.1
    balance: float = 0.01

    @property
    def context(self) -> int:
        """Tokens in one training window."""
        return self.config.max_position_embeddings


_TINY = DecoderConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
_SMALL = dataclasses.replace(
    _TINY,
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
_MOE = dataclasses.replace(
    _TINY,
    model_type="mixtral",
    intermediate_size=128,
    num_hidden_layers=3,
    experts=Experts(count=8, per_token=2, intermediate_size=128),
)
# The standard libraries are too little text for `small`, which overfits them after 750 steps; the recorded run
# (results/train_small.json) was also given the Python files of third-party packages by `--sources`.
RECIPES = {
    "tiny": Recipe(_TINY, batch=32, steps=4000, peak_rate=3e-3),
    "small": Recipe(_SMALL, batch=32, steps=850, peak_rate=1.5e-3),
    "moe": Recipe(_MOE, batch=32, steps=4000, peak_rate=3e-3),
}


class State(NamedTuple):
    """Everything that an optimizer step changes."""

    params: Any
    optimizer: Any
    step: jax.Array


class Trained(NamedTuple):
    """The trained parameters (bfloat16) and what was measured on the way."""

    params: Any
    record: dict[str, Any]


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns AdamW without its learning rate, which depends on a number of steps known only when running."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )


def learning_rate(step: jax.Array, steps: jax.Array, peak: float) -> jax.Array:
    """Returns the rate of a step: linear warm-up, then a cosine that ends at zero after `steps`."""
    step, steps = step.astype(jnp.float32), steps.astype(jnp.float32)
    progress = jnp.clip((step - WARMUP) / jnp.maximum(steps - WARMUP, 1.0), 0.0, 1.0)
    return peak * jnp.minimum((step + 1) / WARMUP, 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def mean_loss(model: Decoder, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in nats of the int windows [B, T+1]: each token predicted from those before."""
    windows = windows.astype(jnp.int32)
    logits = model.forward(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def training_loss(recipe: Recipe, model: Decoder, params: Any, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (what the optimizer lowers, the mean cross-entropy in nats) of the int windows [B, T+1]."""
    windows = windows.astype(jnp.int32)
    (logits, _), sown = model.apply({"params": params}, windows[:, :-1], mutable=["router"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()
    if recipe.config.experts is None:
        return loss, loss
    routers = jax.tree.leaves(sown["router"])
    uneven = sum(load_imbalance(router, recipe.config.experts.per_token) for router in routers) / len(routers)
    return loss + recipe.balance * uneven, loss


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_chunk(recipe: Recipe, model: Decoder, state: State, tokens: jax.Array, key: jax.Array, steps: jax.Array):
    """Runs `CHUNK` optimizer steps on random windows of the uint16 tokens [N]; returns the state and losses."""

    def step(state: State, key: jax.Array):
        starts = jax.random.randint(key, (recipe.batch,), 0, tokens.shape[0] - recipe.context)
        windows = jax.vmap(lambda at: jax.lax.dynamic_slice(tokens, (at,), (recipe.context + 1,)))(starts)
        lower = jax.value_and_grad(functools.partial(training_loss, recipe, model), has_aux=True)
        (_, loss), gradient = lower(state.params, windows)
        update, moments = optimizer(recipe).update(gradient, state.optimizer, state.params)
        rate = learning_rate(state.step, steps, recipe.peak_rate)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, update)
        return State(params, moments, state.step + 1), loss

    return jax.lax.scan(step, state, jax.random.split(key, CHUNK))


@functools.partial(jax.jit, static_argnums=0)
def held_out_loss(model: Decoder, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean loss in nats over the int windows [batches, B, T+1], one batch at a time."""
    return jax.lax.map(functools.partial(mean_loss, model, params), windows).mean()


def expert_shares(model: Decoder, params: Any, windows: jax.Array) -> list[list[float]]:
    """Returns the share of the int windows' [B, T+1] routed choices that each expert gets, for each layer."""
    experts = model.config.experts
    _, sown = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["router"]))(
        params, windows[:, :-1].astype(jnp.int32)
    )
    chosen = [route(logits, experts.per_token, False)[1] for logits in jax.tree.leaves(sown["router"])]
    shares = [np.bincount(np.asarray(c).reshape(-1), minlength=experts.count) / c.size for c in chosen]
    return [[round(share, 4) for share in layer.tolist()] for layer in shares]


def held_out_windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Returns uint16 [batches, 8, context + 1]: all the tokens but a remainder."""
    batch = 8 * (context + 1)
    if len(tokens) < batch:
        raise ValueError(f"held_out_tokens: {len(tokens)} are fewer than one batch of {batch}")
    return tokens[: len(tokens) // batch * batch].reshape(-1, 8, context + 1)


def train(
    recipe: Recipe, train_tokens: np.ndarray, held_out_tokens: np.ndarray, seconds: float, implementation: str
) -> Trained:
    """Trains for the recipe's steps, or for as many as fit in `seconds` by the speed of the second chunk.

    Args:
        recipe: the model and its training.
        train_tokens: uint16 [N].
        held_out_tokens: uint16 [N].
        seconds: the time limit of the loop, compilation not counted.
        implementation: of the attention, "xla" or "cudnn".

    Returns:
        The parameters in bfloat16 and the record of the run.
    """
    model = Decoder(recipe.config, dtype=jnp.bfloat16, implementation=implementation, experts="dense")
    params = jax.jit(model.init_params)(jax.random.key(0))
    state = State(params, optimizer(recipe).init(params), jnp.int32(0))
    tokens = jnp.asarray(train_tokens)
    windows = jnp.asarray(held_out_windows(held_out_tokens, recipe.context))
    chunks, curve, began = -(-recipe.steps // CHUNK), [], 0.0
    chunk = 0
    while chunk < chunks:
        if chunk == 1:  # the first chunk held the compilation
            began = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(1), chunk)
        state, losses = train_chunk(recipe, model, state, tokens, key, jnp.int32(chunks * CHUNK))
        jax.block_until_ready(losses)
        chunk += 1
        if chunk == 2:
            chunks = max(2, int(min(chunks, 1 + seconds / (time.perf_counter() - began))))
            print(f"{chunks * CHUNK} steps", flush=True)
        if chunk == chunks or chunk % max(1, chunks // 40) == 0:
            held_out = float(held_out_loss(model, state.params, windows))
            point = {"step": chunk * CHUNK, "train_loss": float(losses.mean()), "held_out_loss": held_out}
            curve.append(point)
            print(json.dumps(point), flush=True)
    elapsed = time.perf_counter() - began
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
    seen = chunks * CHUNK * recipe.batch * recipe.context
    record = {
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "steps": chunks * CHUNK,
        "tokens_seen": seen,
        "training_tokens": len(train_tokens),
        "seconds": round(elapsed, 1),
        "tokens_per_second": round(seen * (chunks - 1) / chunks / elapsed) if chunks > 1 else None,
        "held_out_loss": float(held_out_loss(model, params, windows)),
        **({} if recipe.config.experts is None else {"expert_shares": expert_shares(model, params, windows[0])}),
        "device": jax.devices()[0].device_kind,
        "curve": curve,
    }
    return Trained(params, record)


def sample_texts(config: DecoderConfig, params: Any, tokenizer: Any, length: int = 200) -> list[str]:
    """Returns one continuation, drawn at temperature 0.7, of each of `PROMPTS`."""
    run = jax.jit(generate, static_argnums=(0, 3, 4))
    model = Decoder(config, dtype=jnp.bfloat16, experts="dense")
    texts = []
    for number, prompt in enumerate(PROMPTS):
        ids = jnp.asarray([[0, *tokenizer.encode(prompt).ids]], jnp.int32)
        tokens = run(model, params, ids, length, 0.7, jax.random.key(number))
        texts.append(tokenizer.decode(np.asarray(tokens[0, 1:]).tolist()))
    return texts


def train_and_save(
    recipe: Recipe, corpus: Corpus, folder: pathlib.Path, origin: str, seconds: float, implementation: str
) -> dict[str, Any]:
    """Trains tokenizer and model on the corpus and writes the whole folder.

    Returns:
        The record that loss_curve.json holds.
    """
    clock = time.perf_counter()
    tokenizer = train_tokenizer(corpus.train, recipe.config.vocab_size)
    train_tokens, held_out_tokens = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    print(f"{len(train_tokens)} training tokens in {time.perf_counter() - clock:.1f} s", flush=True)
    params, record = train(recipe, train_tokens, held_out_tokens, seconds, implementation)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    bits = record["held_out_loss"] / np.log(2) * len(held_out_tokens) / held_out_bytes
    record |= {"held_out_bits_per_byte": float(bits), "held_out_bytes": held_out_bytes}
    save_hf(folder, params, recipe.config, max_shard_bytes=14_000_000)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    np.save(folder / "calibration.npy", sample_windows(train_tokens, *CALIBRATION, seed=0))
    np.save(folder / "evaluation.npy", sample_windows(held_out_tokens, *EVALUATION, seed=1))
    (folder / "loss_curve.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    samples = sample_texts(recipe.config, params, tokenizer)
    (folder / "README.md").write_text(model_card(recipe.config, record, origin, samples), encoding="utf-8")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains and saves."""
    parser = argparse.ArgumentParser(description="Train a small Llama or Mixtral on the Python standard library.")
    parser.add_argument("--size", choices=RECIPES, default="tiny")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the size's own number")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="train no longer than this")
    parser.add_argument("--sources", type=pathlib.Path, nargs="+", default=(), help="folders of standard libraries")
    parser.add_argument("--attention", choices=("xla", "cudnn"), help="default: cudnn on a GPU")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.size]
    if options.steps is not None:
        recipe = dataclasses.replace(recipe, steps=options.steps)
    attention = options.attention or ("cudnn" if jax.default_backend() == "gpu" else "xla")
    names = [source.name for source in options.sources] or [f"python{platform.python_version()}"]
    corpus = read_corpus(options.sources)
    record = train_and_save(recipe, corpus, options.out, ", ".join(names), options.seconds, attention)
    print(json.dumps({name: value for name, value in record.items() if name != "curve"}, indent=1))


if __name__ == "__main__":
    main()
