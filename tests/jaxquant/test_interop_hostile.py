"""Files that lie: every reader answers with a named error, or with what the file really holds; never with a crash."""

import ast
import json
import pathlib
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant
from jaxquant._sources import open_source, read_leaf
from jaxquant.arrays._qarray import dequantize_array
from jaxquant.interop import (
    _safetensors,
    bitsandbytes,
    compressed_tensors,
    hf_awq,
    hf_gptq,
    load_huggingface,
    save_huggingface,
)
from jaxquant.interop._safetensors import Pending, open_folder, read_header, write_file
from jaxquant.storage._json import read_json

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "interop"
NAMED = (ValueError, NotImplementedError, FileNotFoundError)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes_and_the_reverse(tmp_path, rng):
    tensors = {
        f"t{n}": rng.normal(size=(n, 3)).astype(dtype) for n, dtype in enumerate(("f2", "f4", "f8", "i1", "u2", "i8"))
    }
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = read_header(tmp_path / "theirs.safetensors")
    layout = {name: Pending(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(tmp_path / "ours.safetensors", layout, tensors.items())
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name].read(), tensor)
        np.testing.assert_array_equal(theirs[name], tensor)
        assert theirs[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("F32", [2], 0, 8)}, b"1234", "truncated"),
        ({"a": entry("F32", [2], 0, 8)}, b"123456789", "too long"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), "b begins at byte"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12), "b begins at byte"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4), "b begins at byte"),
        ({"a": entry("F32", [2], 8, 0)}, bytes(8), "takes 8 bytes"),
        ({"a": entry("F32", [2], 0, 4)}, bytes(4), "takes 8 bytes"),
        ({"a": entry("F32", [-2], 0, 8)}, bytes(8), "no lists of sizes"),
        ({"a": entry("F32", [True, 2], 0, 8)}, bytes(8), "no lists of sizes"),
        ({"a": entry("F32", [2.0], 0, 8)}, bytes(8), "no lists of sizes"),
        ({"a": entry("F32", [2**62, 2**62], 0, 8)}, bytes(8), "takes 8507"),
        ({"a": entry("F32", [2**70], 0, 8)}, bytes(8), "no lists of sizes"),
        ({"a": entry("F32", [1] * 100, 0, 4)}, bytes(4), "100 dimensions"),
        ({"a": entry("Q4", [2], 0, 8)}, bytes(8), "dtype 'Q4'; accepted: BOOL"),
        ({"a": entry(["F32"], [2], 0, 8)}, bytes(8), "dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "needs exactly dtype"),
        ({"a": 3}, b"", "needs exactly dtype"),
        ([1, 2], b"", "JSON object was expected"),
        (b"[" * 200_000, b"", "no readable JSON"),
        (b'{"a": 1, "a": 2}', b"", "appears twice"),
        (b'{"a": NaN', b"", "no readable JSON"),
        (b"\xff\xfe{}", b"", "no readable JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "no readable JSON"),
    ],
)
def test_malformed_headers(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        read_header(raw_file(tmp_path / "f.safetensors", header, data))


@pytest.mark.parametrize("length", [9, 2**20, 2**40, 2**63, 2**64 - 1])
def test_header_lengths_beyond_the_file(tmp_path, length):
    (tmp_path / "f").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="truncated"):
        read_header(tmp_path / "f")


def test_files_shorter_than_a_header(tmp_path):
    for size in range(8):
        (tmp_path / "f").write_bytes(bytes(size))
        with pytest.raises(ValueError, match="truncated"):
            read_header(tmp_path / "f")


def test_large_headers_and_json_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_safetensors, "HEADER_LIMIT", 64)
    with pytest.raises(ValueError, match="at most 64"):
        read_header(raw_file(tmp_path / "f", b" " * 65))
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(10**9)  # sparse: reading it would take a gigabyte
    with pytest.raises(ValueError, match="at most 32000000"):
        read_json(tmp_path / "big.json")


OUTSIDE = (
    *("../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "sub/f.safetensors", "x.bin", "", 3),
    *(None, "a\x00.safetensors", ".hidden.safetensors", "C:\\x.safetensors", "~/x.safetensors"),
)


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, file):
    (tmp_path / "model").mkdir()
    raw_file(tmp_path / "secret.safetensors", {})
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="no plain"):
        open_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing, though"),
        ({"weight_map": {"a": "f.safetensors", "b": "f.safetensors"}}, r"misplaces \['b'\]"),
        ({"weight_map": {"b": "f.safetensors"}}, r"misplaces \['b'\] and does not list \['a'\]"),
        ({"weight_map": {"a": "f.safetensors", "b": "g.safetensors"}}, "two files: a"),
    ],
)
def test_malformed_indexes(tmp_path, index, message):
    raw_file(tmp_path / "f.safetensors", {"a": entry("F32", [1], 0, 4)}, bytes(4))
    raw_file(tmp_path / "g.safetensors", {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}, bytes(8))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_folder(tmp_path)


@settings(max_examples=150)
@given(st.data())
def test_flipped_bytes_of_a_real_file(tmp_path_factory, data):
    """Headers with bytes changed, cut or repeated: a named error, or tensors that lie inside the file."""
    content = bytearray((FIXTURES / "bitsandbytes.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([None, header, len(content) - 1, data.draw(st.integers(0, len(content)))]))
    file = tmp_path_factory.getbasetemp() / "flipped"
    file.write_bytes(bytes(content[:cut]))
    try:
        tensors = read_header(file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017 (an error is one of two right outcomes)
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) < len(content)
    for tensor in tensors.values():
        assert tensor.read().nbytes == tensor.nbytes


ARRAYS = st.builds(
    lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 255, (*shape, 8), np.uint8).view(dtype)[..., 0],
    st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 33]), min_size=0, max_size=3),
    st.sampled_from(["i4", "f2", "f4", "i1", "u1", "i8"]),
    st.integers(0, 99),
)
SCHEME = compressed_tensors.Scheme(("Linear",), {"num_bits": 4, "type": "int", "group_size": 16}, None)
READERS = {
    "gptq": lambda tensors: hf_gptq.decode_linear(tensors, hf_gptq.GPTQFormat(1), np.float16, "layer"),
    "awq": lambda tensors: hf_awq.decode_linear(tensors, np.float16, "layer"),
    "compressed-tensors": lambda tensors: compressed_tensors.decode_linear(tensors, SCHEME, np.float16, "layer"),
    "bitsandbytes": lambda tensors: bitsandbytes.decode_linear(tensors, np.float16, "layer"),
}
SUFFIXES = {
    "gptq": hf_gptq.SUFFIXES,
    "awq": hf_awq.SUFFIXES,
    "compressed-tensors": compressed_tensors.SUFFIXES,
    "bitsandbytes": bitsandbytes.SUFFIXES,
}


@pytest.mark.parametrize("format", READERS)
@settings(max_examples=60)
@given(st.data())
def test_layers_of_wrong_tensors(format, data):
    tensors = data.draw(st.dictionaries(st.sampled_from([*SUFFIXES[format], "other"]), ARRAYS))
    with np.errstate(all="ignore"):
        try:
            q = READERS[format](tensors)
        except NAMED as error:
            assert "layer" in str(error)  # noqa: PT017
            return
    assert q.qvalue.nbytes <= 2 * sum(tensor.nbytes for tensor in tensors.values())


def valid_layers():
    zeros = np.zeros((2, 2), np.int32)
    gptq = {"qweight": np.zeros((4, 16), np.int32), "qzeros": zeros, "scales": np.ones((2, 16), np.float16)}
    gptq["g_idx"] = (np.arange(32) // 16).astype(np.int32)
    awq = {"qweight": np.zeros((32, 2), np.int32), "qzeros": zeros, "scales": np.ones((2, 16), np.float16)}
    packed = {"weight_packed": np.zeros((16, 4), np.int32), "weight_shape": np.array([16, 32])}
    packed |= {"weight_scale": np.ones((16, 2), np.float16), "weight_g_idx": gptq["g_idx"]}
    return {"gptq": gptq, "awq": awq, "compressed-tensors": packed}


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("gptq", {"g_idx": np.full(32, 7, np.int32)}, "groups 7 to 7, there are 2"),
        ("gptq", {"g_idx": np.full(32, -1, np.int32)}, "groups -1 to -1"),
        ("gptq", {"g_idx": np.zeros(32, np.int32)}, "unequal sizes"),
        ("gptq", {"g_idx": np.zeros(33, np.int32)}, r"layer.g_idx: \[33\] of int32, where \[32\]"),
        ("gptq", {"scales": np.full((2, 16), np.nan, np.float16)}, "layer.scales: holds NaN"),
        ("gptq", {"scales": np.ones((2, 17), np.float16)}, "layer.qzeros"),
        ("gptq", {"scales": np.ones((2, 16), np.int32)}, "of int32, where .* of float16 or bfloat16"),
        ("gptq", {"qzeros": np.zeros((3, 2), np.int32)}, "layer.qzeros"),
        ("gptq", {"qweight": np.zeros((4, 15), np.int32)}, "layer.qweight"),
        ("gptq", {"qzeros": None}, "no tensor 'qzeros'; there are g_idx"),
        ("gptq", {"weight": np.zeros(3)}, "unknown tensors weight beside"),
        ("awq", {"qzeros": np.zeros((2, 3), np.int32)}, "layer.qzeros"),
        ("awq", {"qweight": np.zeros((33, 2), np.int32)}, "2 groups do not divide 33"),
        ("awq", {"scales": np.full((2, 16), np.inf, np.float16)}, "holds NaN or Inf"),
        ("compressed-tensors", {"weight_shape": np.array([2**40, 2**40])}, "layer.weight_packed"),
        ("compressed-tensors", {"weight_shape": np.array([16, -32])}, "layer"),
        ("compressed-tensors", {"weight_shape": np.array([16, 64])}, r"\[16, 4\] for 64 inputs of 4 bits"),
        ("compressed-tensors", {"weight_scale": np.ones((16, 5), np.float16)}, "a grid"),
        ("compressed-tensors", {"weight_zero_point": np.zeros((5, 2), np.int32)}, "layer"),
        ("compressed-tensors", {"weight_packed": None, "weight": np.full((16, 32), 9, np.int8)}, "do not fit 4 bits"),
        ("compressed-tensors", {"weight_packed": None}, "no tensor 'weight'"),
    ],
)
def test_layers_that_are_nearly_right(format, change, message):
    tensors = {key: value for key, value in (valid_layers()[format] | change).items() if value is not None}
    if "weight" in tensors:
        tensors.pop("weight_shape", None)
    with pytest.raises(NAMED, match=message):
        READERS[format](tensors)


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_the_layers_that_are_right(format):
    """So that the errors above come from the changes."""
    q = READERS[format](valid_layers()[format])
    assert q.shape == (32, 16)
    assert np.isfinite(np.asarray(dequantize_array(q))).all()


BOMB = r"(\w+|\.)+(.*.*)+!"  # `re` would be busy with it for ever


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "exl2"}, "quant_method 'exl2'; gptq, awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "pack_dtype": "int64"}, "pack_dtype"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 3}, "of 3 bits"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 3}}, "config_groups.g is malformed"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["re:("], "weights": {}}}},
            "config_groups.g is malformed",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": [f"re:{BOMB}"], "weights": {}}}},
            "no target of quantization_config speaks of it",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {}}, "transform_config": {"x": 1}},
            "transform_config",
        ),
        (None, "no quantization_config"),
    ],
)
def test_quantization_configs(tmp_path, config, message):
    tensors = {f"model.layers.0.mlp.up_proj.{key}": value for key, value in valid_layers()["gptq"].items()}
    tensors |= {"model.embed_tokens.weight": np.ones((4, 32), np.float16), "model.norm.weight": np.ones(32, np.float16)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    base = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(base | ({"quantization_config": config} if config else {})))
    with pytest.raises(NAMED, match=message):
        load_huggingface(tmp_path)


def test_a_config_of_a_million_layers_makes_no_list_of_them(tmp_path):
    tensors = {f"model.layers.0.mlp.{x}_proj.weight": np.ones((4, 4), np.float32) for x in ("up", "down")}
    tensors |= {"model.embed_tokens.weight": np.ones((4, 4), np.float32), "model.norm.weight": np.ones(4, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 10**6, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.1\.") as caught:
        load_huggingface(tmp_path)
    assert len(str(caught.value)) < 100_000


@pytest.fixture(scope="module")
def whole_folders(tmp_path_factory):
    """A float folder in two files, a quantized one, and a checkpoint of ours."""
    base, tensors = tmp_path_factory.mktemp("whole"), {}
    for name in ("model.embed_tokens", "model.norm", "model.layers.0.mlp.up_proj"):
        tensors[f"{name}.weight"] = np.ones((8, 8) if "norm" not in name else 8, np.float32)
    config = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}
    (base / "float").mkdir()
    (base / "float" / "config.json").write_text(json.dumps(config))
    weight_map = {name: f"f{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in weight_map.items():
        safetensors.numpy.save_file({name: tensors[name]}, base / "float" / file)
    (base / "float" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    params = load_huggingface(base / "float")[0]
    recipe = jaxquant.TensorSpec("int4", jaxquant.PerGroup(8))
    rules = (jaxquant.Rule("layers_0/.*", jaxquant.QuantSpec(recipe)),)
    quantized = jaxquant.quantize(params, jaxquant.QuantConfig(rules=rules))
    save_huggingface(base / "quantized", quantized, config, format="compressed-tensors")
    jaxquant.save(base / "ours", quantized)
    return base


@pytest.mark.parametrize(
    "file",
    ["float/config.json", "float/model.safetensors.index.json", "quantized/config.json", "ours/manifest.json"],
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_of_json_files(whole_folders, file, data):
    """A named error, or parameters no larger than the folder: whatever the bytes of its JSON have become."""
    path = whole_folders / file
    content = path.read_bytes()
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"9", b"-", b'"', b"null", b"[", b"1e9", b"}", b"\x00", b"\xff", b"../"])
        )
        changed[place : place + data.draw(st.integers(0, 4))] = piece
    path.write_bytes(bytes(changed))
    try:
        source = open_source(path.parent)
        for number in range(len(source.leaves)):
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(read_leaf(source, number))) < 10_000
    except NAMED as error:
        assert str(error)  # noqa: PT017
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("huge", ["1e999", "-Infinity", "NaN"])
@pytest.mark.parametrize("file", ["float/config.json", "ours/manifest.json"])
def test_numbers_that_are_not_finite_are_named_errors(whole_folders, file, huge):
    path = whole_folders / file
    content = path.read_text()
    changed = json.loads(content)
    sizes = next(iter(changed["shards"].values())) if "shards" in changed else changed
    sizes["x"] = ["HUGE", 0]
    path.write_text(json.dumps(changed).replace('"HUGE"', huge))
    try:
        with pytest.raises(ValueError, match=path.name):
            open_source(path.parent)
    finally:
        path.write_text(content)


def test_nothing_is_pickled():
    """Neither package imports a module that makes objects of bytes, and no array is loaded with pickle allowed."""
    for file in (pathlib.Path(jaxquant.__file__).parent).rglob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch"}, file
        assert "allow_pickle=True" not in file.read_text(), file
