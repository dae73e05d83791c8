"""The grouped kernel's body on a CPU, thread by thread: the walk over the tiles, the ring, the masks of the store.

What the interpreter lacks is supplied as for the dense int4 kernel; the inline PTX of the epilogue is replaced by its
meaning. The interpreter refuses reads out of bounds, so that x has a tile of rows that belong to nobody at its end.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import Config, interleave
from pallas_kernels.int4_matmul import pack
from tests.pallas_kernels.test_int4_interpreted import unpack_int4_bytes, unpack_words

kernel = importlib.import_module("pallas_kernels.grouped_matmul.mosaic_gpu")
tiles = importlib.import_module("pallas_kernels.grouped_matmul.tiles")
products = importlib.import_module("pallas_kernels.int4_matmul.products")


def silu_mul(sums, row_scale=None):
    """What `epilogue.silu_mul` emits, in jnp."""
    columns = sums.shape[1]
    halves = sums.reshape(4, 2, 8, columns)
    value = jax.nn.silu(halves[:, 0]) * halves[:, 1]
    if row_scale is not None:
        value = value * row_scale[None, None, :]
    return value.reshape(4, 8, 2, columns // 2).transpose(0, 2, 1, 3).reshape(64, columns // 2)


def write_table(group_sizes, table, *, rows, block_m):
    """What `tiles.write_table` emits, an expert at a time."""
    experts, low, tiles = group_sizes.shape[0], jnp.int32(0), jnp.int32(0)
    for e in range(experts + 2):
        table[0, e], table[1, e] = low, tiles
        size = group_sizes[e] if e < experts else rows - low
        tiles = tiles + jnp.where(size > 0, (low % 8 + size + block_m - 1) // block_m, 0)
        low = low + size


def store_rows(staging, out, first_row, low, high, first_column, *, columns, second_half):
    """What `epilogue.store_rows` emits, a row at a time."""
    for line in range(staging.shape[0]):
        values = staging[line]
        parts = [values] if second_half is None else values.reshape(4, 2, 8).swapaxes(0, 1).reshape(2, 32)
        for half, part in enumerate(parts):
            row = first_row + line + half * (second_half or 0)

            @pl.when((row >= low) & (row < high) & (first_column < columns))
            def _(row=row, part=part):
                out[row, pl.ds(first_column, part.shape[0])] = part


@pytest.fixture
def interpreted(monkeypatch, complete_interpreter):
    monkeypatch.setattr(products, "unpack_words", unpack_words)
    monkeypatch.setattr(products, "unpack_int4_bytes", unpack_int4_bytes)
    monkeypatch.setattr(kernel, "silu_mul", silu_mul)
    monkeypatch.setattr(kernel, "store_rows", store_rows)
    monkeypatch.setattr(kernel, "write_table", write_table)
    monkeypatch.setattr(tiles, "read_table", lambda table, kind, place: table[kind, place])

    def run(*operands, **options):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
            return kernel.grouped_matmul_mosaic_gpu(*operands, **options)

    return run


# One block walks all tiles, or three share them; experts without rows, of one row, of more rows than a tile.
@pytest.mark.parametrize(
    ("sizes", "blocks", "after", "gated", "widths"),
    [
        ((3, 0, 18, 1), 1, True, False, (16,)),
        ((0, 37, 2, 0), 3, False, True, (16, 32)),
        ((9, 0, 23), 2, False, False, (8, 16, 24)),
    ],
    ids=["after", "gated", "three widths"],
)
def test_interpreted_kernel_is_the_product(rng, interpreted, monkeypatch, sizes, blocks, after, gated, widths):
    monkeypatch.setattr(kernel, "HOPPER_SMS", blocks)
    monkeypatch.setattr(kernel, "widths", lambda rows, step: widths)
    block_m = widths[-1]
    cut = {"num_warpgroups": 2, "scale_after": after, "strip": 1}
    config = Config(block_m=block_m, block_k=128, num_stages=2, **cut)
    k, n, experts, rows = 256, 128, len(sizes), sum(sizes) + config.block_m
    codes = rng.integers(-8, 8, (experts, k, n)).astype(np.int8)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    x, scale = half(rows, k), half(experts, 2, n) / 16
    zero = jnp.asarray(rng.integers(-8, 8, (experts, 2, n)), jnp.bfloat16)
    row_scale = rng.uniform(size=rows)
    merge = (lambda a: interleave(a[..., : n // 2], a[..., n // 2 :])) if gated else lambda a: a
    out = interpreted(
        x,
        pack(merge(jnp.asarray(codes))),
        merge(scale),
        merge(zero),
        jnp.asarray(sizes),
        None,
        jnp.asarray(row_scale),
        activation="silu_mul" if gated else None,
        out_dtype=jnp.bfloat16,
        config=config,
    )
    shifted = codes.reshape(experts, 2, k // 2, n) - np.asarray(zero, np.float64)[:, :, None]
    weight = (shifted * np.asarray(scale, np.float64)[:, :, None]).reshape(experts, k, n)
    owned = np.einsum("tk,tkn->tn", np.asarray(x, np.float64)[: sum(sizes)], np.repeat(weight, sizes, axis=0))
    if gated:
        gate, up = owned[:, : n // 2], owned[:, n // 2 :]
        owned = gate / (1 + np.exp(-gate)) * up
    owned = owned * row_scale[: sum(sizes), None]
    # The result, and the weight if it is scaled before the product (once each in gate and up), have 8 significant bits.
    assert np.linalg.norm(np.asarray(out, np.float64)[: sum(sizes)] - owned) <= 2.0**-7 * np.linalg.norm(owned)
    assert not np.asarray(out, np.float64)[sum(sizes) :].any()
