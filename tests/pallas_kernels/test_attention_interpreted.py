"""The attention kernel's body on a CPU: its schedule, barriers, masks, skipped tiles and online softmax.

What is written in MLIR (`registers`) is replaced by what it must yield, which `test_attention_registers` checks lane by
lane. A barrier that never completes shows as a hang.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import Config
from pallas_kernels.attention.quantize import E4M3, F16, INT8, quantize_keys, quantize_values, smooth_keys
from pallas_kernels.attention.reference import Masking, Window, attention_reference, formats, visible
from pallas_kernels.attention.registers import MAGIC

kernel, steps, quantize = (
    importlib.import_module(f"pallas_kernels.attention.{name}")
    for name in ("mosaic_gpu", "steps", "quantize_mosaic_gpu")
)


def fresh_product(multiply, shape, dtype):
    accumulator = jnp.int32 if dtype == INT8 else jnp.float32

    def product(ref):
        multiply(ref)
        return ref[...]

    x = pl.run_scoped(product, plgpu.ACC(shape, accumulator)).astype(F16 if dtype == F16 else jnp.float32)
    return x + MAGIC if dtype == INT8 else x


def added_product(multiply, acc):
    return acc + fresh_product(multiply, acc.shape, jnp.float32)


def interleaved(x):
    """Columns as `round_to_operand` leaves them: in each 16, position 4c + 2h + e holds column 8h + 2c + e."""
    return x.reshape(x.shape[0], -1, 2, 4, 2).swapaxes(2, 3).reshape(x.shape)


def round_to_operand(x, dtype):
    return interleaved((jnp.round(x) if dtype == INT8 else x).astype(dtype))


def keep_columns(x, first, last):
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    seen = column <= last[:, None]
    if first is not None:
        seen &= column >= first[:, None]
    return jnp.where(seen, x, -jnp.inf)


REPLACED = {
    "fresh_product": fresh_product,
    "added_product": added_product,
    "round_to_operand": round_to_operand,
    "keep_columns": keep_columns,
    "weights_of_halves": lambda x, shift, _: interleaved(jnp.exp2(x + shift.astype(F16)[:, None]).astype(E4M3)),
    "repeat_columns": lambda x, columns: jnp.tile(x, (1, columns // 8)),
    "largest_of_columns": lambda x, positive: x.reshape(x.shape[0], -1, 8).max(axis=1),
    "powers_of_two": lambda y, by_polynomial: jnp.exp2(y),
    "sum_of_own_columns": lambda x: x.sum(axis=1),
    "sum_of_parts": lambda x: x,
    "split_columns": lambda x, columns: (x[:, :columns], x[:, columns]),
}


class Problem(NamedTuple):
    """A call: lengths are of queries and of keys."""

    mode: str
    config: Config
    shape: tuple[int, ...]  # batch, queries, keys, heads, kv_heads, head_dim
    window: Window = (None, None)
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def arrays(self, rng):
        batch, tokens, kv_tokens, heads, kv_heads, head_dim = self.shape
        shapes = (batch, tokens, heads, head_dim), *2 * [(batch, kv_tokens, kv_heads, head_dim)]
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    @property
    def masking(self) -> Masking:
        q_lengths, kv_lengths = (None, None) if self.lengths is None else (jnp.array(x) for x in self.lengths)
        return Masking(query_lengths=q_lengths, kv_lengths=kv_lengths)


TWO, THREE = Config(64, 2, 2), Config(128, 2, 3)
PROBLEMS = {
    # A tile's edge inside each warpgroup's queries, and one warpgroup that sees nothing of a tile the other sees.
    "causal": Problem("int8_fp8", TWO, (1, 150, 150, 2, 1, 64), (None, 0)),
    "two_sided_window": Problem("int8_int8", THREE, (1, 203, 333, 1, 1, 64), (70, 20)),
    # Lengths of 0, inside a tile and at its end; queries past theirs, in the block and in all of it; rows without keys.
    "lengths": Problem(
        "f16_fp8",
        Config(64, 3, 1),
        (4, 70, 200, 1, 1, 128),
        (40, 0),
        ((70, 7, 33, 0), (200, 128, 0, 5)),
    ),
    "one_token": Problem("int8_fp8", TWO, (1, 1, 1, 4, 2, 128)),
    "more_queries_than_keys": Problem("int8_f16", TWO, (1, 150, 70, 1, 1, 128), (20, 0)),
    "halves": Problem("f16_fp8", Config(64, 2, 1), (2, 70, 200, 1, 1, 64), (90, 0), ((70, 33), (200, 128))),
}


def spoiled(x, lengths):
    """NaN past the lengths: what lies there must not matter."""
    if lengths is None:
        return x
    past = jnp.arange(x.shape[1])[None] >= lengths[:, None]
    return jnp.where(past[:, :, None, None], jnp.asarray(jnp.nan, x.dtype), x)


def forget_what_was_seen(deallocate):
    """Nobody waits for the last stages to be free again, which the interpreter takes for an oversight."""

    def patched(barrier):
        if barrier.ref_count == 1:  # the last thread to leave
            barrier.last_observed_phase_by_thread.clear()
        deallocate(barrier)

    return patched


@pytest.fixture
def interpreted(monkeypatch, complete_interpreter):
    for name, replacement in REPLACED.items():
        for module in (kernel, steps, quantize):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr(shared_memory.Barrier, "deallocate", forget_what_was_seen(shared_memory.Barrier.deallocate))

    def run(problem, q, k, v):
        scores_dtype, values_dtype = formats(problem.mode, problem.shape[-1])
        q_lengths, kv_lengths = problem.masking[2:]
        q, k, v = spoiled(q, q_lengths), spoiled(k, kv_lengths), spoiled(v, kv_lengths)
        block = problem.config.block_kv
        if scores_dtype == F16:
            keys = smooth_keys(k, block, kv_lengths)
        else:
            keys = k if scores_dtype is None else quantize_keys(k, scores_dtype, block, kv_lengths)
        values = v
        if values_dtype is not None:
            values = quantize_values(v, values_dtype, block, kv_lengths)
            codes = values.codes.reshape(-1, values.codes.shape[-1])
            values = values._replace(
                codes=interleaved(codes).reshape(values.codes.shape),
                block_scale=jnp.stack([values.block_scale, 1 / values.block_scale], axis=-1),
            )
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
            return kernel.quantized_attention(
                q,
                keys,
                values,
                None if problem.lengths is None else (q_lengths, kv_lengths),
                mode=problem.mode,
                kv_tokens=k.shape[1],
                window=problem.window,
                scale=0.125,
                config=problem.config,
            )

    return run


@pytest.mark.parametrize("name", PROBLEMS)
def test_exactly_the_visible_keys_count(rng, interpreted, name):
    """Equal scores, and values that say which key they are of: an output counts the keys that its query saw."""
    problem = PROBLEMS[name]
    q, k, _ = problem.arrays(rng)
    batch, tokens, kv_tokens, heads, kv_heads, head_dim = problem.shape
    key = np.arange(kv_tokens)
    values = np.zeros((kv_tokens, head_dim))
    values[key, key % 32] = values[key, 32 + key // 32] = 1
    v = jnp.broadcast_to(jnp.asarray(values, jnp.bfloat16)[:, None], (batch, kv_tokens, kv_heads, head_dim))
    out = np.asarray(interpreted(problem, jnp.zeros_like(q), k, v), np.float64)
    seen = np.asarray(visible(problem.masking, problem.window, (batch, heads, tokens, kv_tokens)), np.float64)
    expected = np.einsum("bnts,sh->btnh", seen / np.maximum(seen.sum(-1, keepdims=True), 1), values)
    # Weights and values are 448, 127 or 1 and exact; the quotient is rounded to bfloat16. A key too many or too few
    # changes one of its two counts, of at most 32 and 11, by more than 1/33.
    np.testing.assert_allclose(out, expected, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", ["causal", "lengths", "one_token", "more_queries_than_keys", "halves"])
def test_interpreted_kernel_is_the_reference(rng, interpreted, name):
    problem = PROBLEMS[name]
    q, k, v = problem.arrays(rng)
    louder = jnp.asarray([1, 2, 1.5, 0.5], jnp.bfloat16)[jnp.arange(k.shape[1]) % 8 // 2]  # each scale group of a tile
    k = k * louder[None, :, None, None]
    out = interpreted(problem, q, k, v).astype(jnp.float32)
    reference = functools.partial(
        attention_reference,
        q,
        k,
        masking=problem.masking,
        window=problem.window,
        scale=0.125,
        mode=problem.mode,
        block=problem.config.block_kv,
    )
    # Each weight is rounded once, in both, against another maximum: e4m3 errs by 1/16 of a weight at most, bfloat16 by
    # 1/256. And the sums, where they are of rounded weights; and the result, to bfloat16. Below 2^-15 of the largest,
    # weights in e4m3 are not normal: 2^-9 for those. The codes are the same, but for one of a query that was a tie: it
    # changes scores by a step of the query times a channel of a key, and weights relative to their sum by twice that.
    mean_of_magnitudes = np.asarray(reference(v=jnp.abs(v)), np.float64)
    relative = {"int8_f16": 2.0**-8}.get(problem.mode, 2.0**-4)
    tie = float(jnp.abs(q).max()) / 127 * float(jnp.abs(k).max()) * 0.125
    bound = (3 * relative + 2.0**-7 + 2 * np.expm1(tie)) * mean_of_magnitudes + 2.0**-9
    assert (np.abs(out - np.asarray(reference(v=v), np.float64)) <= bound).all()


@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_values_are_quantized_by_channel_and_block(rng, interpreted, dtype):
    v = rng.normal(size=(2, 200, 1, 64)) * rng.choice([1, 30], size=64)
    v[0, 130] *= 50  # of the second block
    v[1, 140:] = np.nan  # past the length
    v, lengths = jnp.asarray(v, jnp.bfloat16), jnp.array([200, 140], jnp.int32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
        codes, scale, block_scale = quantize.quantize_values_mosaic_gpu(v, dtype, 128, lengths)
    expected = quantize_values(v, dtype, 128, lengths)
    np.testing.assert_allclose(block_scale[..., 0], expected.block_scale, rtol=2.0**-22)
    np.testing.assert_allclose(block_scale[..., 0] * block_scale[..., 1], 1, rtol=2.0**-22)
    np.testing.assert_array_equal(scale, expected.scale)
    off = np.asarray(codes, np.float32) - np.asarray(
        interleaved(expected.codes.reshape(-1, 256)).reshape(expected.codes.shape), np.float32
    )
    # Scales are multiplied in another order: a quotient at a tie may fall to the next code, 32 away at most in e4m3.
    assert np.count_nonzero(off) < 0.01 * off.size
    assert np.abs(off).max() <= (1 if dtype == INT8 else 32)


def test_a_value_that_is_not_finite_shows(rng, interpreted):
    """In the scale of its block or in its code, though no sample has it."""
    v = jnp.asarray(rng.normal(size=(3, 256, 1, 64)), jnp.bfloat16)
    v = v.at[0, 7, 0, 5].set(jnp.inf).at[1, 9, 0, 6].set(jnp.nan)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
        codes, scale, block_scale = quantize.quantize_values_mosaic_gpu(v, E4M3, 128, None)
    assert np.isfinite(scale).all()
    finite = np.isfinite(block_scale[..., 0]).all(axis=(1, 2)) & ~np.isnan(codes.astype(jnp.float32)).any(
        axis=(1, 2, 3)
    )
    assert finite.tolist() == [False, False, True]
