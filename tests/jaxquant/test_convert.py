"""Conversions: from and to every form, in slices, interrupted and resumed, in bounded memory; and the command."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx

import jaxquant._slices
import jaxquant._sources
import jaxquant.conversion
import jaxquant.storage._journal
from jaxquant import PerTensor, QArray, QuantConfig, QuantSpec, Rule, TensorSpec, load, quantize, save
from jaxquant.__main__ import main
from jaxquant._sources import open_source
from jaxquant.algorithms.gptq import gptq
from jaxquant.calibration._resume import Finished
from jaxquant.conversion import convert, export
from jaxquant.inspection import diff, inspect
from jaxquant.interop import load_huggingface, read_table, save_huggingface
from jaxquant.interop._safetensors import Pending, write_file
from jaxquant.storage._manifest import read_manifest
from jaxquant.storage._values import decode_value

D, H, LAYERS = 64, 96, 3
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": True, "dtype": "float32"}
W4 = QuantConfig.preset("w4a16", group_size=32)
ROOT = str(pathlib.Path(__file__).parents[2])


def random_params(rng, dtype=np.float32):
    def array(*shape):
        return rng.normal(size=shape).astype(dtype)

    params = {"embed_tokens": {"embedding": array(16, D)}, "norm": {"scale": array(D)}}
    for layer in range(LAYERS):
        mlp = {"up_proj": {"kernel": array(D, H), "bias": array(H)}, "down_proj": {"kernel": array(H, D)}}
        params[f"layers_{layer}"] = {"mlp": mlp, "input_layernorm": {"scale": array(D)}}
    return params


def test_a_float_folder_quantized_on_the_way(tmp_path, rng, assert_same):
    params, seen = random_params(rng), []
    save_huggingface(tmp_path / "hf", params, CONFIG, format="float")
    convert(tmp_path / "hf", tmp_path / "out", W4, progress=lambda *row: seen.append(row))
    assert_same(load(tmp_path / "out"), quantize(params, W4))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.config == W4
    assert manifest.huggingface == CONFIG
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert seen[-1][:2] == (total, total)
    assert [row[0] for row in seen] == sorted(row[0] for row in seen)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


@pytest.mark.parametrize("preset", ["w3a16-asym", "w8a8-tensor"])
def test_slices_give_the_same_codes(tmp_path, rng, monkeypatch, preset, assert_same):
    config = QuantConfig.preset(preset, group_size=32 if preset.startswith("w3") else None)
    params = random_params(rng)
    save(tmp_path / "float", params)
    monkeypatch.setattr(jaxquant._slices, "SLICE_BYTES", D * H * 4 // 5)
    convert(tmp_path / "float", tmp_path / "out", config)
    assert_same(load(tmp_path / "out"), quantize(params, config))


def test_rules_are_of_the_whole_model(tmp_path, rng, assert_same):
    params = random_params(rng)
    save(tmp_path / "float", params)
    rules = (Rule(r"layers_0/.*", None), Rule(r".*/down_proj/kernel", QuantConfig.preset("w8a16").default))
    config = QuantConfig.preset("w4a16", group_size=32, rules=rules)
    convert(tmp_path / "float", tmp_path / "out", config)
    assert_same(load(tmp_path / "out"), quantize(params, config))
    with pytest.raises(ValueError, match="matches no parameter"):
        convert(tmp_path / "float", tmp_path / "none", QuantConfig(rules=(Rule("layer_9/.*", None),)))
    assert not (tmp_path / "none").exists()


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_our_checkpoints_keep_their_types(tmp_path, assert_same):
    state = nnx.state(Model(nnx.Rngs(0)))
    save(tmp_path / "float", (state, {1: None}))
    convert(tmp_path / "float", tmp_path / "out", W4)
    restored = load(tmp_path / "out")
    assert isinstance(restored[0]["layers"][1]["kernel"].get_raw_value(), QArray)
    assert jnp.issubdtype(restored[0]["dropout"]["rngs"]["key"].dtype, jax.dtypes.prng_key)
    assert jax.tree.structure(restored) == jax.tree.structure(quantize((state, {1: None}), W4))
    convert(tmp_path / "out", tmp_path / "again", W4)
    again = load(tmp_path / "again")[0]["layers"][0]["kernel"].get_raw_value()
    assert_same(again, restored[0]["layers"][0]["kernel"].get_raw_value())


def test_orbax_checkpoints_of_linen_and_nnx(tmp_path, rng, assert_same):
    params = random_params(rng)
    tree = {"params": params, "step": np.int32(3), "none": None, "list": [np.ones(2, np.float32), {}]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", tree)
    convert(tmp_path / "linen", tmp_path / "out", W4)
    restored = load(tmp_path / "out")
    assert_same(restored["params"], quantize(params, W4))
    assert restored["step"] == 3
    assert restored["none"] is None
    assert restored["list"][1] == {}

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", state)
    convert(tmp_path / "nnx", tmp_path / "out2", QuantConfig(rules=(Rule("layers/1/kernel", W4.default),)))
    layers = load(tmp_path / "out2")["layers"]
    kernel = state["layers"][1]["kernel"].get_value()
    assert_same(layers["1"]["kernel"], quantize({"kernel": kernel}, W4)["kernel"])
    assert_same(layers["0"]["kernel"], state["layers"][0]["kernel"].get_value())
    compared = {row.path: row for row in diff(tmp_path / "nnx", tmp_path / "out2")}
    assert not any(row.note for row in compared.values()), "the paths are the source's"
    assert [path for path, row in compared.items() if row.sqnr < np.inf] == ["layers/1/kernel"]


def test_only_arrays_alone_in_a_box_are_taken_out(tmp_path, assert_same):
    array = np.arange(3, dtype=np.float32)
    tree = {
        "attention": {"value": {"kernel": array}, "key": {"value": array + 1}},
        "table": {"key": array, "value": array},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    convert(tmp_path / "orbax", tmp_path / "out")
    assert_same(load(tmp_path / "out"), tree | {"attention": {"value": {"kernel": array}, "key": array + 1}})
    paths = {leaf.path for leaf in inspect(tmp_path / "orbax").leaves}
    assert paths == {"attention/value/kernel", "attention/key", "table/key", "table/value"}


@pytest.mark.parametrize("kind", ["orbax", "ours"])
def test_small_leaves_are_read_together_in_order_and_alone_out_of_it(tmp_path, monkeypatch, rng, kind):
    """Opening an orbax folder of n leaves takes time in proportion to n: once a leaf would be its square."""
    tree = {f"{n:02}": rng.normal(size=(n + 1, 4)).astype(np.float32) for n in range(40)}
    if kind == "ours":
        save(tmp_path / "src", tree)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "src", tree)
    opened = []
    original = ocp.Checkpointer.restore
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *a, **k: opened.append(0) or original(*a, **k))
    monkeypatch.setattr(jaxquant._sources, "AHEAD_BYTES", 16 * 820 // 4)  # a quarter of all
    source = open_source(tmp_path / "src")
    for leaf in source.leaves:
        np.testing.assert_array_equal(leaf.read(), tree[leaf.path])
    assert 4 <= len(opened) <= 6
    for leaf in reversed(source.leaves):
        np.testing.assert_array_equal(leaf.read(), tree[leaf.path])


def test_steps_of_a_manager_are_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave({"w": np.ones(3, np.float32)}))
        manager.wait_until_finished()
    with pytest.raises(ValueError, match="holds the steps 7: name one"):
        convert(tmp_path / "run", tmp_path / "out")
    convert(tmp_path / "run" / "7", tmp_path / "out")
    np.testing.assert_array_equal(load(tmp_path / "out")["w"], np.ones(3))


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_import_and_export_of_quantized_folders(tmp_path, rng, monkeypatch, format, assert_same):
    monkeypatch.setattr(jaxquant.interop.huggingface_write, "FILE_BYTES", 10_000)  # several files
    params = quantize(random_params(rng, np.float16), QuantConfig.preset("w4a16-asym", group_size=32))
    for layer in range(LAYERS):  # version 1 of GPTQ has no zero point of 0
        for name in ("up_proj", "down_proj"):
            kernel = params[f"layers_{layer}"]["mlp"][name]["kernel"]
            clipped = jnp.maximum(kernel.zero_point, jnp.uint8(1))
            params[f"layers_{layer}"]["mlp"][name]["kernel"] = jax.tree.map(
                lambda leaf, old=kernel, new=clipped: new if leaf is old.zero_point else leaf, kernel
            )
    config = CONFIG | {"dtype": "float16"}
    save_huggingface(tmp_path / "hf", params, config, format=format)
    convert(tmp_path / "hf", tmp_path / "ours", W4)
    assert_same(load(tmp_path / "ours"), params)
    export(tmp_path / "ours", tmp_path / "back", format=format)
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert len(files) > 4
    assert files == sorted(path.name for path in (tmp_path / "back").iterdir())
    for file in files:
        if file.endswith(".safetensors"):
            theirs, ours = (safetensors.numpy.load_file(tmp_path / side / file) for side in ("hf", "back"))
            assert theirs.keys() == ours.keys()
            assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)
    assert_same(load_huggingface(tmp_path / "back")[0], params)


def test_export_needs_to_know_the_model(tmp_path, rng):
    save(tmp_path / "ours", quantize(random_params(rng), W4))
    with pytest.raises(ValueError, match="give one"):
        export(tmp_path / "ours", tmp_path / "hf", format="gptq")
    export(tmp_path / "ours", tmp_path / "hf", format="gptq", huggingface=CONFIG)
    assert inspect(tmp_path / "hf").leaves[0].path == inspect(tmp_path / "ours").leaves[0].path
    with pytest.raises(FileExistsError, match="name a new folder"):
        export(tmp_path / "ours", tmp_path / "hf", format="gptq", huggingface=CONFIG)


TOKENIZER = {
    "tokenizer.json": b"{}",
    "tokenizer.model": b"\x00\xff",
    "tokenizer_config.json": b'{"a": 1}',
    "vocab.txt": b"a",
    "merges.txt": b"b",
    "chat_template.jinja": b"{{ x }}",
    "generation_config.json": b'{"eos_token_id": 1}',
    "special_tokens_map.json": b"{}",
}


def test_the_tokenizer_goes_with_the_model(tmp_path, rng, assert_same):
    params = random_params(rng)
    save_huggingface(tmp_path / "hf", params, CONFIG, format="float")
    for name, content in (TOKENIZER | {"tokenizer.py": b"code", "notes": b""}).items():
        (tmp_path / "hf" / name).write_bytes(content)
    convert(tmp_path / "hf", tmp_path / "ours", W4)
    assert_same(load(tmp_path / "ours"), quantize(params, W4))
    convert(tmp_path / "ours", tmp_path / "again")
    convert(tmp_path / "hf", tmp_path / "again", W4, overwrite=True)
    export(tmp_path / "again", tmp_path / "gptq", format="gptq")
    export(tmp_path / "hf", tmp_path / "float", format="float")
    for folder in ("gptq", "float"):
        held = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert {name: held[name] for name in TOKENIZER} == TOKENIZER
        assert held.keys() - TOKENIZER.keys() == {"config.json", "model.safetensors"}
    save(tmp_path / "bare", params)
    convert(tmp_path / "bare", tmp_path / "again", overwrite=True)
    assert not (tmp_path / "again" / "huggingface").exists()
    with (tmp_path / "hf" / "vocab.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"vocab\.json: 1099511627776 bytes; at most"):
        convert(tmp_path / "hf", tmp_path / "big")
    assert not (tmp_path / "big").exists()


KILLED = """
    import os, sys
    import jaxquant.storage._journal
    import jaxquant.conversion
    from jaxquant import QuantConfig

    jaxquant.storage._journal.FLUSH_BYTES = 1
    left = int(sys.argv[3])

    def die_at_last(done, total, path):
        global left
        left -= 1
        if left == 0:
            os._exit(9)

    config = QuantConfig.preset("w4a16", group_size=32)
    jaxquant.conversion.convert(sys.argv[1], sys.argv[2], config, progress=die_at_last)
"""


def test_a_killed_conversion_leaves_nothing_and_goes_on(tmp_path, rng, monkeypatch, assert_same, run_python):
    params = random_params(rng)
    save_huggingface(tmp_path / "hf", params, CONFIG, format="float")
    assert run_python(KILLED, tmp_path / "hf", tmp_path / "out", 7).returncode == 9
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "out")
    read = []
    original = jaxquant.conversion.read_leaf
    monkeypatch.setattr(jaxquant.conversion, "read_leaf", lambda *a, **k: read.append(a[1]) or original(*a, **k))
    convert(tmp_path / "hf", tmp_path / "out", W4)
    again = len(read) - (len(open_source(tmp_path / "hf").leaves) - 6)
    assert again in (0, 1), "of the six that were done, only the last, still being written, may be read again"
    assert_same(load(tmp_path / "out"), quantize(params, W4))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_a_journal_of_something_else_or_cut_short_is_not_trusted(tmp_path, rng, monkeypatch, assert_same):
    params = random_params(rng)
    save(tmp_path / "float", params)
    monkeypatch.setattr(jaxquant.storage._journal, "FLUSH_BYTES", 1)

    def stop_at(count):
        def progress(done, total, path):
            nonlocal count
            count -= 1
            if count == 0:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "float", tmp_path / "out", QuantConfig.preset("w8a16"), progress=stop_at(5))
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "float", tmp_path / "out", W4, progress=stop_at(5))
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    convert(tmp_path / "float", tmp_path / "out", W4)
    assert_same(load(tmp_path / "out"), quantize(params, W4))


def test_two_conversions_to_one_place_do_not_meet(tmp_path, rng, monkeypatch, assert_same):
    params = random_params(rng)
    save(tmp_path / "float", params)
    monkeypatch.setattr(jaxquant.storage._journal, "FLUSH_BYTES", 1)

    def begin_another(done, total, path):
        with pytest.raises(FileExistsError, match="another conversion"):
            convert(tmp_path / "float", tmp_path / "out", W4)

    convert(tmp_path / "float", tmp_path / "out", W4, progress=begin_another)
    assert_same(load(tmp_path / "out"), quantize(params, W4))


def test_the_command_interrupted_by_its_user(tmp_path, rng, monkeypatch, capsys, assert_same):
    params = random_params(rng)
    save(tmp_path / "float", params)

    def interrupted(self, number, node):
        raise KeyboardInterrupt

    command = ["convert", str(tmp_path / "float"), str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(jaxquant.storage._journal.Journal, "add", interrupted)
        assert main(command) == 130
    assert "goes on when the same command is given again" in capsys.readouterr().err
    assert main(command) == 0
    assert_same(load(tmp_path / "out"), params)


@pytest.mark.parametrize("slice_bytes", [D, 1 << 21])
@pytest.mark.parametrize(
    ("config", "what"),
    [
        (QuantConfig(default=QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerTensor(), static=True))), "a static"),
        (QuantConfig.preset("w8a16", algorithm=gptq()), "algorithm 'gptq'"),
    ],
)
def test_what_needs_data_is_refused_without_before_a_leaf_is_read(
    tmp_path, rng, monkeypatch, slice_bytes, config, what
):
    """A weight large enough for slices was made without its static scale."""
    monkeypatch.setattr(jaxquant._slices, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(jaxquant.conversion, "read_leaf", None)
    save(tmp_path / "float", random_params(rng))
    with pytest.raises(ValueError, match=f"kernel: {what}.* needs calibration; give convert"):
        convert(tmp_path / "float", tmp_path / "out", config)
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


@pytest.mark.parametrize("missing", ["config", "apply_fn", "batches"])
def test_calibration_without_one_of_its_parts(tmp_path, missing):
    given = {"config": W4, "apply_fn": apply_mlp, "batches": [np.ones((1, 4), np.int32)]}
    del given[missing]
    with pytest.raises(ValueError, match="apply_fn, batches and config go together"):
        convert(tmp_path / "float", tmp_path / "out", **given)


def test_a_recipe_for_what_is_quantized_already_is_not_on_record(tmp_path, rng, assert_same):
    """The checkpoint said afterwards that it was quantized to int8, and held the int4 that it had before."""
    params = quantize(random_params(rng), W4)
    save(tmp_path / "int4", params, config=W4)
    convert(tmp_path / "int4", tmp_path / "out", QuantConfig.preset("w8a16"))
    assert_same(load(tmp_path / "out"), params)
    assert read_manifest(tmp_path / "out").config == W4


def test_overwriting(tmp_path, rng, assert_same):
    params = random_params(rng)
    save(tmp_path / "float", params)
    save(tmp_path / "out", {"old": np.ones(2)})
    with pytest.raises(FileExistsError, match="overwrite"):
        convert(tmp_path / "float", tmp_path / "out")
    convert(tmp_path / "float", tmp_path / "out", overwrite=True)
    assert_same(load(tmp_path / "out"), params)


MEASURED = """
    import resource, sys
    import numpy as np
    import jaxquant.storage._journal
    from jaxquant import QuantConfig, load, quantize, save
    from jaxquant.conversion import convert

    jaxquant.storage._journal.FLUSH_BYTES = 1 << 24

    def peak():
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

    config = QuantConfig.preset("w4a16")
    save(sys.argv[2] + "-warm", {"w": np.ones((8, 8), np.float32)})  # so that what is loaded once counts as base
    quantize({"kernel": np.ones((4096, 2048), np.float32)}, config)
    base = peak()
    convert(sys.argv[1], sys.argv[2], config)
    print(peak() - base)
"""


def test_memory_is_bounded_by_a_leaf(tmp_path, run_python):
    """Four leaves of 64 MB: above the base stay two leaves and the buffers, however many leaves there are."""
    rows, columns, count = 4096, 4096, 4
    block = np.zeros((columns, rows), np.float32)
    block[:, ::128] = 1.0
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(count)]
    small = {"model.embed_tokens.weight": np.ones((8, 8), np.float32), "model.norm.weight": np.ones(8, np.float32)}
    layout = {name: Pending(block.dtype, block.shape) for name in names}
    layout |= {name: Pending(tensor.dtype, tensor.shape) for name, tensor in small.items()}
    (tmp_path / "hf").mkdir()
    tensors = [*((name, block) for name in names), *small.items()]
    write_file(tmp_path / "hf" / "model.safetensors", layout, tensors)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": count}))
    done = run_python(MEASURED, tmp_path / "hf", tmp_path / "out")
    done.check_returncode()
    assert int(done.stdout) < 2 * block.nbytes + 2 * 2**24 + 2 * jaxquant._slices.SLICE_BYTES
    assert load(tmp_path / "out")["layers_3"]["mlp"]["up_proj"]["kernel"].shape == (rows, columns)


def test_inspect_tells_formats_groups_and_bytes(tmp_path, rng, capsys):
    params = quantize(random_params(rng), QuantConfig.preset("w4a8", group_size=32))
    save(tmp_path / "ours", params, config=W4)
    rows = {leaf.path: leaf for leaf in inspect(tmp_path / "ours").leaves}
    kernel = rows["layers_0/mlp/up_proj/kernel"]
    assert (kernel.format, kernel.group, kernel.activation, kernel.layout) == ("int4", 32, "int8", "plain")
    assert kernel.shape == (D, H)
    assert kernel.nbytes == D * H // 2 + 2 * D // 32 * H
    assert (rows["norm/scale"].format, rows["norm/scale"].bits) == ("float32", 32)
    assert main(["inspect", str(tmp_path / "ours"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["about"]["library_version"]
    assert decode_value(printed["about"]["config"], "") == W4
    assert len(printed["leaves"]) == len(rows)
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    assert "6 quantized at 4.500 bits" in capsys.readouterr().out
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"w": np.ones((3, 4), np.float16)})
    assert inspect(tmp_path / "orbax").leaves[0].nbytes == 24


def test_diff_is_the_sqnr_of_each_leaf(tmp_path, rng, capsys):
    params = random_params(rng)
    save(tmp_path / "a", params)
    save(tmp_path / "b", quantize(params, W4))
    rows = {row.path: row for row in diff(tmp_path / "a", tmp_path / "b")}
    assert rows["norm/scale"].sqnr == np.inf
    kernel = params["layers_1"]["mlp"]["up_proj"]["kernel"].astype(np.float64)
    values = np.asarray(jaxquant.dequantize(quantize({"kernel": kernel.astype(np.float32)}, W4))["kernel"], np.float64)
    sqnr = 10 * np.log10(np.sum(kernel**2) / np.sum((kernel - values) ** 2))
    assert rows["layers_1/mlp/up_proj/kernel"].sqnr == pytest.approx(sqnr, abs=1e-3)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert all(json.loads(line) for line in capsys.readouterr().out.splitlines())
    save(tmp_path / "c", {"norm": {"scale": np.ones(3, np.float32)}, "more": np.ones(1, np.float32)})
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    printed = capsys.readouterr().out
    assert "norm/scale  shapes [64] and [3]" in printed
    assert f"more  only in {tmp_path / 'c'}" in printed


def test_the_command_converts_and_exports(tmp_path, rng, assert_same):
    params = random_params(rng)
    save_huggingface(tmp_path / "hf", params, CONFIG, format="float")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"layers_0/.*": None, ".*/down_proj/kernel": "w4a16-channel"}))
    command = ["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--recipe", "w8a16", "--rules", str(rules)]
    assert main(command) == 0
    formats = {leaf.path: leaf.format for leaf in inspect(tmp_path / "out").leaves}
    assert formats["layers_0/mlp/up_proj/kernel"] == "float32"
    assert formats["layers_1/mlp/up_proj/kernel"] == "int8"
    assert formats["layers_1/mlp/down_proj/kernel"] == "int4"
    out = ["export", str(tmp_path / "out"), str(tmp_path / "ct"), "--format", "compressed-tensors"]
    assert main(out) == 0
    assert_same(load_huggingface(tmp_path / "ct")[0], load(tmp_path / "out"))


def test_a_table_of_names_in_a_file(tmp_path, rng, capsys, assert_same):
    """Names of the user's own: fused projections, experts, and lines before those of a known architecture."""
    table = {
        "base": "llama",
        "modules": [
            {"hf": "model.layers.{i}.mlp.fused", "path": "layers_{i}/mlp/{part}", "kind": "linear",
             "parts": {"gate_proj": "2 * inner", "up_proj": "inner"}},
            {"hf": "model.layers.{i}.experts.{e}.w", "path": "layers_{i}/experts/w", "kind": "linear", "stack": "e"},
        ],
    }  # fmt: skip
    (tmp_path / "names.json").write_text(json.dumps(table))
    config = CONFIG | {"model_type": "mine", "inner": 8, "num_hidden_layers": 1}
    params = {"embed_tokens": {"embedding": rng.normal(size=(16, D))}, "norm": {"scale": rng.normal(size=D)}}
    sizes = {"mlp/gate_proj": (D, 16), "mlp/up_proj": (D, 8), "mlp/down_proj": (8, D)}
    mlp = {name[4:]: {"kernel": rng.normal(size=shape)} for name, shape in sizes.items()}
    params["layers_0"] = {"mlp": mlp, "experts": {"w": {"kernel": rng.normal(size=(3, D, 8))}}}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    names = ["--names", str(tmp_path / "names.json")]
    save_huggingface(tmp_path / "hf", params, config, format="float", modules=read_table(tmp_path / "names.json"))
    stored = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert stored["model.layers.0.mlp.fused.weight"].shape == (24, D)
    assert stored["model.layers.0.experts.2.w.weight"].shape == (8, D)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours"), *names]) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'ours'}: 6 parameters, 0 quantized; {sum(t.nbytes for t in stored.values()):,} bytes\n"
    )
    assert_same(load(tmp_path / "ours"), params)
    assert main(["diff", str(tmp_path / "hf"), str(tmp_path / "ours"), *names]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--format", "float", *names]) == 0
    assert_same(load_huggingface(tmp_path / "back", modules=read_table(tmp_path / "names.json"))[0], params)


def test_a_quantized_checkpoint_as_float(tmp_path, rng, monkeypatch, assert_same):
    monkeypatch.setattr(jaxquant._slices, "SLICE_BYTES", D * H)
    params = quantize(random_params(rng), QuantConfig.preset("w4a16-asym", group_size=32))
    save(tmp_path / "ours", params)
    export(tmp_path / "ours", tmp_path / "float", format="float", huggingface=CONFIG)
    assert_same(load_huggingface(tmp_path / "float")[0], jax.tree.map(np.asarray, jaxquant.dequantize(params)))
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert all(row.sqnr == np.inf for row in diff(tmp_path / "ours", tmp_path / "float"))


def apply_mlp(params, tokens):
    x = jnp.take(params["embed_tokens"]["embedding"], tokens, axis=0)
    for layer in range(LAYERS):
        mlp = params[f"layers_{layer}"]["mlp"]
        hidden = x @ mlp["up_proj"]["kernel"] + mlp["up_proj"]["bias"][None, None]
        x = x + jax.nn.relu(hidden) @ mlp["down_proj"]["kernel"]
    return x


def test_the_command_calibrates(tmp_path, rng, monkeypatch):
    params = random_params(rng)
    save_huggingface(tmp_path / "hf", params, CONFIG, format="float")
    np.save(tmp_path / "tokens.npy", rng.integers(0, 16, (4, 20)))
    module = types.ModuleType("mine")
    module.make = lambda config: apply_mlp if config == CONFIG else None
    monkeypatch.setitem(sys.modules, "mine", module)
    command = ["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--recipe", "w8a16"]
    calibration = ["--calibrate", str(tmp_path / "tokens.npy"), "--model", "mine:make", "--algorithm", "smoothquant"]
    assert main([*command, *calibration]) == 0
    assert read_manifest(tmp_path / "out").algorithm == "smoothquant"
    assert read_manifest(tmp_path / "out").huggingface == CONFIG
    rounded = quantize(params, QuantConfig.preset("w8a16"))
    kernel = load(tmp_path / "out")["layers_1"]["mlp"]["up_proj"]["kernel"]
    assert kernel.qtype == "int8"
    assert (np.asarray(kernel.qvalue) != np.asarray(rounded["layers_1"]["mlp"]["up_proj"]["kernel"].qvalue)).any()


def test_a_killed_calibration_goes_on(tmp_path, rng, monkeypatch, assert_same):
    params = random_params(rng)
    save(tmp_path / "float", params)
    config = QuantConfig.preset("w8a16", algorithm=gptq())
    tokens = rng.integers(0, 16, (2, 1, 20))
    put, finished = Finished.put, []

    def die_at_third(self, name, *given):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(name)
        put(self, name, *given)

    def run(batches):
        convert(tmp_path / "float", tmp_path / "out", config, apply_fn=apply_mlp, batches=iter(batches), overwrite=True)

    monkeypatch.setattr(Finished, "put", die_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(tokens)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Finished, "put", lambda self, name, *given: finished.append(name) or put(self, name, *given))
    run(tokens)
    kernels = {f"layers_{layer}/mlp/{name}_proj/kernel" for layer in range(LAYERS) for name in ("up", "down")}
    assert sorted(finished) == sorted(kernels), "each was quantized once"
    whole = quantize(params, config, apply_fn=apply_mlp, batches=tokens)
    assert_same(load(tmp_path / "out"), whole)
    assert {path.name for path in tmp_path.iterdir()} == {"float", "out"}

    finished.clear()
    monkeypatch.setattr(Finished, "put", die_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(tokens)
    with pytest.raises(KeyboardInterrupt):
        run(tokens[::-1])
    (held,) = (tmp_path / ".out.calibrated").iterdir()
    assert {path.name for path in held.iterdir()} == {"run.json"}, "other tokens, so nothing is taken over"


def test_the_model_may_lie_in_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    save("model", {"w": np.ones((4, 4), np.float32)})
    pathlib.Path("model_beside.py").write_text("def make(config):\n    raise ValueError('found')\n")
    command = ["convert", "model", "out", "--recipe", "w8a16", "--calibrate", "t.npy", "--model", "model_beside:make"]
    assert main(command) == 2
    assert capsys.readouterr().err == "jaxquant: found\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "absent"], "no such folder"),
        (["convert", "absent", "out"], "no such folder"),
        (["convert", ".", "out"], "neither a jaxquant nor an orbax checkpoint"),
        (["convert", "model", "out", "--rules", "rules.json"], "accepted: null, w8a16"),
        (["convert", "model", "out", "--rules", "listed.json"], "'w' asks for ['w8a16']; accepted: null, w8a16"),
        (["convert", "model", "out", "--rules", "none.json"], "none.json: no rule quantizes anything; give --recipe"),
        (["convert", "model", "out", "--rules", "left.json"], "left.json: no rule quantizes anything"),
        (["convert", "hf", "out"], "pass --names, a table of your own"),
        (
            ["convert", "hf", "out", "--names", "rules.json"],
            'rules.json: {"base": model_type or null, "modules": [...]}',
        ),
        (
            ["inspect", "hf", "--names", "lines.json"],
            "lines.json: modules[0] {'hf': 'a', 'path': 'b', 'kind': 'conv'}: kind",
        ),
        (["convert", "model", "out", "--model", "a:b"], "go together"),
        (
            ["convert", "model", "out", "--recipe", "nf4", "--model", "os:none", "--calibrate", "t.npy"],
            "has no 'none'",
        ),
        (["convert", "model", "out", "--recipe", "nf4", "--model", "absent_:b", "--calibrate", "t.npy"], "absent_"),
        (["convert", "model", "model"], "model: exists; pass --overwrite to replace it"),
        (["export", "model", "out", "--format", "gptq"], "config.json of its model"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    save("model", {"w": np.ones((4, 4), np.float32)})
    pathlib.Path("rules.json").write_text('{"w": "w5"}')
    pathlib.Path("listed.json").write_text('{"w": ["w8a16"]}')
    pathlib.Path("none.json").write_text("{}")
    pathlib.Path("left.json").write_text('{"w": null}')
    pathlib.Path("lines.json").write_text('{"modules": [{"hf": "a", "path": "b", "kind": "conv"}]}')
    save_huggingface(
        "hf", {"norm": {"scale": np.ones(2, np.float32)}}, CONFIG | {"model_type": "llama"}, format="float"
    )
    pathlib.Path("hf/config.json").write_text('{"model_type": "mine"}')
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not os.path.exists("out")


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "jaxquant", "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=900
    )
    assert "convert" in done.stdout
