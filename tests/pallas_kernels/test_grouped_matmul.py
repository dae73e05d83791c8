import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import Config, default_config, grouped_matmul, interleave, separate, supports, tiles
from pallas_kernels.grouped_matmul.config import tile_bound
from pallas_kernels.int4_matmul import int4_matmul, pack, unpack
from pallas_kernels.int8_matmul import pack as pack_8_bit

# The weight and the result are each rounded once to x's 8 significant bits: half an eps of its own size each.
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SIZES = {
    "ragged": (5, 1, 0, 9, 2),
    "one expert": (0, 0, 17, 0, 0),
    "none": (0, 0, 0, 0, 0),
    "fewer than rows": (3, 0, 4, 0, 1),
}


def problem(rng, sizes, k, n, groups, *, dtype="bfloat16", extra=0):
    """Fresh random int4 operands, and the exact product of each row in float64."""
    experts, rows = len(sizes), sum(sizes) + extra
    codes = rng.integers(-8, 8, (experts, k, n)).astype(np.int8)
    cast = lambda a: np.asarray(jnp.asarray(a, jnp.dtype(dtype)))  # noqa: E731
    scale, x = cast(rng.normal(size=(experts, groups, n)) * 0.05), cast(rng.normal(size=(rows, k)))
    zero = rng.integers(-8, 8, (experts, groups, n)).astype(np.float32)
    weight = (codes.reshape(experts, groups, k // groups, n) - zero[:, :, None]) * scale.astype(np.float64)[:, :, None]
    expert = np.repeat(np.arange(experts), sizes)
    exact = np.zeros((rows, n))
    for row, e in enumerate(expert):
        exact[row] = x[row].astype(np.float64) @ weight[e].reshape(k, n)
    operands = {"x": x, "qweight": pack(jnp.asarray(codes)), "scale": scale, "zero_point": zero}
    return {name: jnp.asarray(a) for name, a in operands.items()} | {"group_sizes": jnp.asarray(sizes)}, exact


def norm_error(out, exact):
    out = np.asarray(out, np.float64)
    assert out.shape == exact.shape
    return np.linalg.norm(out - exact) / max(np.linalg.norm(exact), 1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_matches_float64(rng, sizes, dtype):
    operands, exact = problem(rng, sizes, 192, 100, 3, dtype=dtype, extra=4)
    out = jax.jit(grouped_matmul)(**operands)
    assert norm_error(out, exact) <= EPS[dtype]
    assert not np.asarray(out[sum(sizes) :], np.float32).any()


def test_gate_and_up_and_the_routing_weight(rng):
    sizes, f = (4, 0, 3), 48
    operands, exact = problem(rng, sizes, 128, 2 * f, 1)
    weight = rng.uniform(size=7)
    merged = {name: interleave(operands[name][..., :f], operands[name][..., f:]) for name in ("scale", "zero_point")}
    codes = unpack(operands["qweight"])[..., :128, : 2 * f]
    merged["qweight"] = pack(interleave(codes[..., :f], codes[..., f:]))
    out = grouped_matmul(**operands | merged, activation="silu_mul", row_scale=jnp.asarray(weight, jnp.float32))
    gate, up = exact[:, :f], exact[:, f:]
    expected = gate / (1 + np.exp(-gate)) * up * weight[:, None]
    # An error of half an eps of the weight moves gate and up; silu's slope is at most 1.1.
    assert norm_error(out, expected) <= 3 * EPS["bfloat16"]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("groups", [1, 2])
def test_int4_weights_and_8_bit_rows(rng, dtype, groups):
    sizes, k, n = (2, 0, 6), 256, 72
    codes, scale = rng.integers(-8, 8, (3, k, n)), rng.normal(size=(3, groups, n)).astype(np.float32)
    rows = jnp.asarray(np.round(rng.normal(size=(8, k)) * 30)).astype(dtype)
    x_scale = jnp.asarray(rng.uniform(size=(8, 1)), jnp.float32)
    qweight = pack(jnp.asarray(codes, jnp.int8), x_bytes=1)
    out = grouped_matmul(rows, qweight, jnp.asarray(scale), x_scale=x_scale, group_sizes=jnp.asarray(sizes))
    weight = codes * np.repeat(scale.astype(np.float64), k // groups, axis=1)
    values = np.asarray(rows, np.float64) * np.asarray(x_scale, np.float64)
    exact = np.einsum("tk,tkn->tn", values, np.repeat(weight, sizes, axis=0))
    assert norm_error(out, exact) <= EPS["bfloat16"]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("quantized", "groups"), [(True, 1), (False, 1), (True, 2)])
def test_8_bit_weights(rng, dtype, quantized, groups):
    sizes, k, n = (2, 0, 6), 200 if groups == 1 else 256, 72
    limit = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    codes = jnp.asarray(rng.integers(-limit, limit + 1, (3, k, n)), jnp.float32).astype(dtype)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (3, groups, n)) / limit, jnp.float32)
    x = jnp.asarray(rng.normal(size=(8, k)), jnp.bfloat16)
    rows, x_scale = jnp.asarray(np.round(rng.normal(size=(8, k)) * 30)).astype(dtype), None
    if quantized:
        x_scale = jnp.asarray(rng.uniform(size=(8, 1)), jnp.float32)
    out = grouped_matmul(
        rows if quantized else x, pack_8_bit(codes), scale, x_scale=x_scale, group_sizes=jnp.asarray(sizes)
    )
    spread = np.repeat(np.asarray(scale, np.float64), k // groups, axis=1)
    weight = np.repeat(np.asarray(codes, np.float64) * spread, sizes, axis=0)
    values = np.asarray(rows, np.float64) * np.asarray(x_scale, np.float64) if quantized else np.asarray(x, np.float64)
    exact = np.einsum("tk,tkn->tn", values, weight)
    # Codes of x are rounded once: to 1/254 of the largest magnitude (about 3 here), or to 4 bits.
    bound = EPS["bfloat16"] + (0 if quantized else {"int8": 3 / 254, "float8_e4m3fn": 2.0**-4}[dtype])
    assert norm_error(out, exact) <= bound


def test_gradients_are_those_of_the_dense_products(rng):
    operands, _ = problem(rng, (2, 3), 64, 64, 1)
    cotangent = jnp.asarray(rng.normal(size=(5, 64)), jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: grouped_matmul(**operands | {"x": x}), operands["x"])
    identity = jnp.eye(64, dtype=jnp.bfloat16)
    weights = [
        int4_matmul(identity, *(operands[name][e] for name in ("qweight", "scale", "zero_point"))) for e in range(2)
    ]
    weight = np.repeat(np.asarray(jnp.stack(weights), np.float64), (2, 3), axis=0)
    expected = np.einsum("tn,tkn->tk", np.asarray(cotangent, np.float64), weight)
    assert norm_error(vjp(cotangent)[0], expected) <= 2 * EPS["bfloat16"]


def test_vmap_is_the_loop(rng):
    operands, _ = problem(rng, (2, 3), 64, 64, 1)
    sizes = jnp.asarray([[2, 3], [5, 0], [0, 4]])
    mapped = jax.vmap(lambda sizes: grouped_matmul(**operands | {"group_sizes": sizes}))(sizes)
    looped = jnp.stack([grouped_matmul(**operands | {"group_sizes": s}) for s in sizes])
    np.testing.assert_array_equal(mapped, looped)


def test_separate_undoes_interleave(rng):
    gate, up = rng.normal(size=(2, 3, 24))
    for merged, part in zip(separate(interleave(jnp.asarray(gate), jnp.asarray(up))), (gate, up), strict=True):
        np.testing.assert_array_equal(merged, np.asarray(part, np.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((5, 192), jnp.bfloat16)}, ValueError, "qweight has shape"),
        ({"x": jnp.ones((5, 64), jnp.float32)}, TypeError, "x is float32"),
        ({"scale": jnp.ones((2, 3, 64), jnp.bfloat16)}, ValueError, "3 groups"),
        ({"zero_point": jnp.ones((2, 1, 32))}, ValueError, "zero_point has shape"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, ValueError, "group_sizes has shape"),
        ({"group_sizes": jnp.ones(2)}, TypeError, "group_sizes are float32"),
        ({"row_scale": jnp.ones((5, 1))}, ValueError, "row_scale has shape"),
        ({"activation": "gelu"}, ValueError, "activation='gelu'"),
        ({"implementation": "triton"}, ValueError, "implementation='triton'"),
    ],
)
def test_misfits_are_named(rng, change, error, message):
    operands, _ = problem(rng, (2, 3), 64, 64, 1)
    with pytest.raises(error, match=message):
        grouped_matmul(**operands | change)


@pytest.mark.parametrize("rows", [1, 7, 8, 64, 300, 4096])
@pytest.mark.parametrize("experts", [1, 8, 128])
@pytest.mark.parametrize(("k", "groups", "zero"), [(4096, 32, False), (2048, 1, True), (7168, 224, True)])
def test_default_config_is_supported(rows, experts, k, groups, zero):
    config = default_config(rows, experts, k, 1024, groups, has_zero_point=zero)
    assert supports(k, groups, jnp.bfloat16, jnp.int32, config=config, has_zero_point=zero) is None


def test_tile_bound_is_never_exceeded(rng):
    for _ in range(50):
        experts, block_m = int(rng.integers(1, 20)), int(rng.choice([8, 16, 64]))
        sizes = rng.integers(0, rng.choice([2, 10, 100]), experts)
        ends = np.cumsum(sizes)
        first = (ends - sizes) // 8 * 8
        taken = np.where(sizes > 0, -(-(ends - first) // block_m), 0).sum()
        assert taken <= tile_bound(int(sizes.sum()), experts, block_m)


def test_tiles_cover_every_row_of_its_expert_once(rng, monkeypatch):
    monkeypatch.setattr(tiles, "read_table", lambda table, kind, place: table[kind, place])

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def all_tiles(table, most, n_tiles, config):
        found, column = jax.vmap(lambda i: tiles.find_tile(table, i, n_tiles, config))(jnp.arange(most * n_tiles))
        return found, column, tiles.count_tiles(table) * n_tiles

    for _ in range(4):
        experts, n_tiles = int(rng.integers(1, 12)), int(rng.integers(1, 4))
        config = Config(block_m=int(rng.choice([16, 64])), block_k=128, num_stages=2, num_warpgroups=1, strip=2)
        sizes = rng.integers(0, rng.choice([2, 10, 300]), experts)
        rows = int(sizes.sum() + rng.integers(0, 40))
        most = tile_bound(rows, experts, config.block_m)
        table = table_of(sizes, rows, config.block_m)
        found, columns, count = all_tiles(table, most, n_tiles, config)
        owners = np.repeat(np.arange(experts + 1), [*sizes, rows - sizes.sum()])
        seen = np.zeros((rows, n_tiles), int)
        for i in range(int(count)):
            tile = tiles.RowTile(*(int(field[i]) for field in found))
            low, high = (int(row) for row in tiles.rows_of(table, tile.expert))
            inside = np.arange(max(8 * tile.first, low), min(8 * tile.first + config.block_m, high))
            assert len(inside)
            assert (owners[inside] == tile.expert).all()
            seen[inside, int(columns[i])] += 1
        assert (seen == 1).all()


def table_of(sizes, rows, block_m):
    """What `write_table` writes: rows and tiles before each expert, and of those that belong to nobody."""
    table = np.zeros((2, len(sizes) + 2), np.int32)
    for e, size in enumerate([*sizes, rows - sizes.sum()]):
        taken = -(-(table[0, e] % 8 + size) // block_m) if size else 0
        table[:, e + 1] = table[:, e] + (size, taken)
    return jnp.asarray(table)
