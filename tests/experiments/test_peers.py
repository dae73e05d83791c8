"""The comparison with other libraries: its measure, its interval, and the committed results."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import peers
from experiments.evaluation import evaluate
from experiments.models import Decoder, DecoderConfig, save_hf

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
CONFIG = DecoderConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=16, **SIZES)


def row(*draws, calibrated=True):
    found = {str(n): {"kl": float(np.mean(kl)), "seconds": 1.0, "sequences": list(kl)} for n, kl in enumerate(draws)}
    return {"side": "ours", "bits": 4.0, "calibrated": calibrated, "flags": {}, "versions": {}, "draws": found}


def test_meter_agrees_with_evaluate_for_weights_and_for_logits(rng, tmp_path):
    model = Decoder(CONFIG)
    params = jax.jit(model.init_params)(jax.random.key(int(rng.integers(1 << 30))))
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    tokens = rng.integers(0, 32, (11, 9)).astype(np.uint16)  # a ragged last batch
    record = {"bits": 4.0, "calibrated": False, "flags": {}, "versions": {}, "seconds": 1.0}
    for name in ("weights", "logits"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "peer.json").write_text(json.dumps(record))
    save_hf(tmp_path / "weights", moved, CONFIG)
    np.save(
        tmp_path / "logits" / "logits.npy", np.asarray(model.forward(moved, jnp.asarray(tokens[:, :-1], jnp.int32)))
    )
    meter = peers.Meter(model, params, tokens)
    expected = evaluate(model.forward, params, model.forward, moved, tokens).kl
    assert expected.min() > 1e-3
    for name in ("weights", "logits"):
        found = peers.measure_theirs(meter, model, tmp_path / name)["draw"]
        # five digits are kept; float32 sums over 32 logits in another order
        np.testing.assert_allclose(found["sequences"], expected, rtol=2e-4, atol=1e-6)
    assert max(map(abs, meter.kl(meter.run(model.forward, params)))) < 1e-6


def compare(ours, peer):
    return peers.ratio_of(peers.paired(ours, peer))


def test_ratio_and_interval(rng):
    kl = rng.uniform(1, 2, (3, 40))
    assert compare(row(*kl), row(*kl)) == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(compare(row(*(kl / 2)), row(*kl)), 0.5, rtol=1e-12)
    ratio, low, high = compare(*(row(rng.uniform(1, 2, 400)) for _ in range(2)))
    assert low < ratio < high
    # A uniform on [1, 2] spreads by 0.29, the mean of 400 such by 0.0144 and the ratio of two by 0.0136: an interval
    # 0.053 wide. A bootstrap of 400 values knows it to 1 / sqrt(800), 4 %: ten deviations either way.
    assert 0.6 * 0.053 < high - low < 1.4 * 0.053


def test_interval_tells_how_draws_differ(rng):
    kl = rng.uniform(1, 2, 40)
    ratio, low, high = compare(row(0.9 * kl, kl, 1.1 * kl), row(kl, kl, kl))
    np.testing.assert_allclose(ratio, 1, rtol=1e-12)
    # a mean of three draws of {0.9, 1, 1.1} is 0.9 or 1.1 with a chance of 1/27, beyond the 0.025 that is cut off
    np.testing.assert_allclose((low, high), (0.9, 1.1), rtol=1e-12)


def test_draws_that_both_have_count(rng):
    kl = rng.uniform(1, 2, (3, 10))
    np.testing.assert_array_equal(peers.paired(row(*kl), row(kl[0])), [kl[:1], kl[:1]])
    np.testing.assert_array_equal(peers.paired(row(*kl), row(kl[0], calibrated=False)), [kl, [kl[0]] * 3])
    np.testing.assert_array_equal(peers.paired(row(kl[0]), row(*kl)), [kl[:1], kl[:1]])


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "rows.json"
    for draw in (1, 0):
        given = row([0.5, 0.25]) | {"draw": {"kl": 0.375, "seconds": 2.0, "sequences": [0.5, 0.25]}}
        del given["draws"]
        peers.put_row(path, "ours", "a", draw, given)
    rows = peers.load_rows(path)
    assert list(rows["a"]["draws"]) == ["0", "1"]
    peers.write_rows(path, rows)
    assert peers.load_rows(path) == rows
    other = tmp_path / "other.json"
    peers.write_rows(other, {"a": row([1.0, 3.0]), "b": row([2.0, 2.0])})
    peers.main(["merge", "--json", str(path), "--others", str(other)])
    merged = peers.load_rows(path)
    assert [merged["a"]["draws"][draw]["kl"] for draw in "01"] == [2.0, 0.375]
    assert list(merged) == ["a", "b"]


def test_committed_results_answer_for_every_kind_of_peer():
    rows = peers.load_rows(peers.RESULTS)
    measured = {bar.peer for bar in peers.BARS if bar.ours in rows and bar.peer in rows}
    needed = {f"ist-gptq-best-{form}" for form in peers.FORMATS} | {
        "llmcompressor-gptq-w4",
        "llmcompressor-awq-w4-asym",
    }
    needed |= {"llmcompressor-smoothquant-w8a8", "torchao-w8a8", "bitsandbytes-int8", "bitsandbytes-nf4"}
    assert needed <= measured


COMMITTED = {path.stem: peers.load_rows(path) for path in (peers.RESULTS, peers.SMALL_RESULTS)}


@pytest.mark.parametrize(("results", "name"), [(results, name) for results, rows in COMMITTED.items() for name in rows])
def test_committed_rows_are_complete(results, name):
    length = np.load(peers.EMBEDDED_MODEL / "evaluation.npy").shape[1] - 1  # both models' sequences are of one length
    found = COMMITTED[results][name]
    assert found["side"] in ("ours", "peer")
    assert found["versions"]
    assert found["flags"]
    assert 3 < found["bits"] < 16
    for draw in found["draws"].values():
        assert len(draw["sequences"]) * length >= 100_000
        np.testing.assert_allclose(np.mean(draw["sequences"]), draw["kl"], rtol=1e-4)
