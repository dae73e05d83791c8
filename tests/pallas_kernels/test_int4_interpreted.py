"""The kernel's body on a CPU, block by block, thread by thread: barriers that never complete show as a hang here.

The inline PTX that unpacks codes is replaced by the layout's own inverse.
"""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_matmul import Config, pack, unpack
from pallas_kernels.int4_matmul.formats import FORMATS, values_of
from pallas_kernels.int4_matmul.operand import MAGIC

kernel = importlib.import_module("pallas_kernels.int4_matmul.mosaic_gpu")
products = importlib.import_module("pallas_kernels.int4_matmul.products")


def unpack_words(tiles, offset, scale, *, first_word, depth, dtype, qtype):
    """What `operand.unpack_words` emits, in jnp."""
    codes = unpack(jnp.stack([tile[...] for tile in tiles])[None], qtype=qtype)
    first = first_word * 64 // FORMATS[qtype].bits
    weights = values_of(codes, qtype)[first : first + depth].astype(dtype)
    if offset is not None:
        hidden = (MAGIC[jnp.dtype(dtype).name] + FORMATS[qtype].offset + weights.astype(jnp.float32)).astype(dtype)
        weights = hidden - offset.astype(dtype)[None, :]
    if scale is not None:
        weights = weights * scale.astype(dtype)[None, :]
    return weights.T


def unpack_int4_bytes(tiles, *, dtype):
    """What `operand.unpack_int4_bytes` emits, in jnp."""
    codes = unpack(jnp.stack([tile[...] for tile in tiles])[None], x_bytes=1).T
    return 16 * codes if dtype == jnp.int8 else codes.astype(jnp.float32).astype(dtype)


@pytest.fixture
def interpreted(monkeypatch, complete_interpreter):
    monkeypatch.setattr(products, "unpack_words", unpack_words)
    monkeypatch.setattr(products, "unpack_int4_bytes", unpack_int4_bytes)

    def run(*operands, **options):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
            return kernel.int4_matmul_mosaic_gpu(*operands, **options)

    return run


CONFIG = Config(block_m=8, block_k=128, num_stages=2, num_warpgroups=1, split_k=1, scale_after=True)


# Several tiles a block, steps that no count of blocks divides, more steps than stages and fewer.
@pytest.mark.parametrize(
    ("m", "k", "n", "group", "clusters", "changes"),
    [
        (8, 384, 256, 128, 1, {"num_warpgroups": 2, "num_stages": 4}),
        (32, 384, 128, 64, 1, {"block_m": 16, "scale_after": False, "num_stages": 3}),
        (16, 896, 192, 64, 2, {"block_m": 16, "split_k": 4}),
        (16, 128, 128, 32, 1, {"block_m": 16, "split_k": 2}),
        (32, 384, 256, 128, 1, {"block_m": 16, "multicast": 2}),
        (8, 640, 192, 128, 1, {"k_warpgroups": 3, "num_stages": 3}),
        (
            16,
            640,
            256,
            64,
            2,
            {"block_m": 16, "split_k": 2, "k_warpgroups": 2, "num_stages": 4},
        ),
        (8, 256, 256, 128, 1, {"num_warpgroups": 2, "k_warpgroups": 2}),
    ],
    ids=["after", "before", "split", "idle", "multicast", "k3", "k2-split", "k2-two"],
)
def test_interpreted_kernel_is_the_product(rng, interpreted, monkeypatch, m, k, n, group, clusters, changes):
    monkeypatch.setattr(kernel, "num_clusters", lambda cluster, blocks_per_sm: clusters)
    codes = rng.integers(-8, 8, (k, n)).astype(np.int8)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    x, scale, bias = half(m, k), half(k // group, n), half(n)
    zero = jnp.asarray(rng.integers(-8, 8, (k // group, n)), jnp.bfloat16)
    config = dataclasses.replace(CONFIG, **changes)
    (out,) = interpreted(x, ((pack(jnp.asarray(codes)), scale, zero, bias),), config=config)
    shifted = codes.reshape(k // group, group, n) - np.asarray(zero, np.float64)[:, None]
    weight = (shifted * np.asarray(scale, np.float64)[:, None]).reshape(k, n)
    exact = np.asarray(x, np.float64) @ weight + np.asarray(bias, np.float64)
    # The result, and the weight if it is scaled before the product, are rounded to 8 significant bits.
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) <= 2.0**-8 * np.linalg.norm(exact)


# Tiles of several weights in one launch: a block, and a cluster that shares x, goes from one weight to the next.
@pytest.mark.parametrize("changes", [{}, {"split_k": 2}, {"multicast": 2}], ids=["alone", "split", "shared"])
def test_interpreted_kernel_takes_several_weights(rng, interpreted, monkeypatch, changes):
    monkeypatch.setattr(kernel, "num_clusters", lambda cluster, blocks_per_sm: 2)
    m, k, group = 16, 256, 128
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    x, weights, exact = half(m, k), [], []
    for n in (192, 64, 128):
        codes, scale, bias = rng.integers(-8, 8, (k, n)).astype(np.int8), half(k // group, n), half(n)
        weights.append((pack(jnp.asarray(codes)), scale, None, bias))
        weight = codes * np.repeat(np.asarray(scale, np.float64), group, axis=0)
        exact.append(np.asarray(x, np.float64) @ weight + np.asarray(bias, np.float64))
    config = dataclasses.replace(CONFIG, **({"block_m": 16} | changes))
    outs = interpreted(x, tuple(weights), config=config)
    for out, right in zip(outs, exact, strict=True):  # rounded to 8 significant bits
        assert np.linalg.norm(np.asarray(out, np.float64) - right) <= 2.0**-8 * np.linalg.norm(right)


# Codes of activations: sums of groups and of all inputs, several tiles a block, split and shared clusters.
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "groups", "changes"),
    [
        ("int8", "bfloat16", 3, {"num_warpgroups": 2}),
        ("int8", "float32", 1, {"block_k": 256, "split_k": 2}),
        ("float8_e4m3fn", "float32", 6, {"multicast": 2}),
        ("float8_e4m3fn", "float16", 1, {"num_stages": 3}),
    ],
)
def test_interpreted_kernel_takes_codes_of_activations(
    rng, interpreted, monkeypatch, dtype, out_dtype, groups, changes
):
    monkeypatch.setattr(kernel, "num_clusters", lambda cluster, blocks_per_sm: 2)
    m, k, n = 32, 384, 256
    codes = rng.integers(-8, 8, (k, n)).astype(np.int8)
    x = jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8)
    x = x if dtype == "int8" else (x.astype(jnp.float32) / 16).astype(dtype)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    scale, bias, x_scale = half(groups, n), half(n), jnp.asarray(rng.uniform(0.5, 2, m), jnp.float32)
    weight = (pack(jnp.asarray(codes), x_bytes=1), scale, None, bias)
    config = dataclasses.replace(CONFIG, **({"block_m": 16} | changes))
    (out,) = interpreted(x, (weight,), x_scale, out_dtype=out_dtype, config=config)
    wide = codes * np.repeat(np.asarray(scale, np.float64), k // groups, axis=0)
    exact = np.asarray(x, np.float64) @ wide * np.asarray(x_scale, np.float64)[:, None] + np.asarray(bias, np.float64)
    assert out.dtype == out_dtype
    # Rounded to the result's significant bits; sums of int8 codes are exact, those of fp8 float32's.
    bound = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}[out_dtype]
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) <= bound * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("qtype", "groups", "changes"),
    [("int8", 1, {"split_k": 2}), ("float8_e4m3fn", 2, {}), ("int2", 4, {"scale_after": False})],
)
def test_interpreted_kernel_takes_other_formats(rng, interpreted, monkeypatch, qtype, groups, changes):
    monkeypatch.setattr(kernel, "num_clusters", lambda cluster, blocks_per_sm: 2)
    m, k, n = 8, 256, 128
    low, high = {"int8": (-128, 128), "int2": (-2, 2), "float8_e4m3fn": (-16, 17)}[qtype]
    codes = jnp.asarray(rng.integers(low, high, (k, n)), jnp.int32)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    x, scale = half(m, k), half(groups, n)
    config = dataclasses.replace(CONFIG, **changes)
    (out,) = interpreted(x, ((pack(codes, qtype=qtype), scale, None, None),), qtype=qtype, config=config)
    wide = np.asarray(values_of(codes, qtype), np.float64) * np.repeat(np.asarray(scale, np.float64), k // groups, 0)
    exact = np.asarray(x, np.float64) @ wide
    # The result, and a weight that is scaled before the product, are rounded to 8 significant bits.
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) <= 2.0**-8 * np.linalg.norm(exact)
