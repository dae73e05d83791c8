"""Layers packed by the formats' own libraries: decoded as those decode them, and written back bit for bit."""

import json
import pathlib

import numpy as np
import pytest

from jaxquant.arrays._qarray import QArray, dequantize_array
from jaxquant.interop import (
    bitsandbytes,
    compressed_tensors,
    compressed_tensors_write,
    hf_awq,
    hf_gptq,
    load_huggingface,
    save_huggingface,
)
from jaxquant.interop._safetensors import read_header
from jaxquant.parameters._tree import named_leaves

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "interop"
CASES = {
    f"{file.stem}:{case}": (file, case, config)
    for file in sorted(FIXTURES.glob("*.json"))
    for case, config in json.loads(file.read_text())["cases"].items()
}


def golden(name):
    file, case, config = CASES[name]
    stored = read_header(file.with_suffix(".safetensors"))
    tensors = {key.split("/")[1]: tensor.read() for key, tensor in stored.items() if key.split("/")[0] == case}
    return tensors, tensors.pop("expected"), config


def decode(name, tensors, dtype, config):
    if name.startswith("compressed-tensors"):
        (scheme,) = compressed_tensors.parse_config(config)
        return compressed_tensors.decode_linear(tensors, scheme, dtype, "layer")
    if name.startswith("bitsandbytes"):
        return bitsandbytes.decode_linear(tensors, dtype, "layer")
    if config["quant_method"] == "awq":
        return hf_awq.decode_linear(tensors, dtype, "layer")
    return hf_gptq.decode_linear(tensors, hf_gptq.GPTQFormat.from_json(config), dtype, "layer")


def encode(name, q, config):
    if name.startswith("compressed-tensors"):
        return compressed_tensors_write.encode_linear(q, "layer")[0]
    if config["quant_method"] == "awq":
        return hf_awq.encode_linear(q, "layer")
    return hf_gptq.encode_linear(q, hf_gptq.GPTQFormat.from_json(config), "layer")


def test_the_goldens_cover_what_they_should():
    assert len(CASES) == 55
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*")) < 300_000


@pytest.mark.parametrize("name", CASES)
def test_the_weight_is_what_the_library_says(name):
    tensors, expected, config = golden(name)
    weight = np.asarray(dequantize_array(decode(name, tensors, expected.dtype, config))).T
    if name == "bitsandbytes:int8":  # it multiplies by the channel's maximum before dividing by 127: two roundings
        np.testing.assert_allclose(weight, expected, rtol=2 * np.finfo(np.float32).eps)
    else:
        np.testing.assert_array_equal(weight, expected)


READ_ONLY = ("bitsandbytes", "compressed-tensors:nvfp4", "compressed-tensors:mxfp4")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(READ_ONLY)])
def test_what_was_read_is_written_back_bit_for_bit(name):
    tensors, expected, config = golden(name)
    written = encode(name, decode(name, tensors, expected.dtype, config), config)
    loose = name.startswith("compressed-tensors-0.12:old-w") and "-w4-" not in name
    if loose:  # the packing of old releases is read, and written densely: the same values, other words
        again = decode(name, written, expected.dtype, config)
        np.testing.assert_array_equal(np.asarray(dequantize_array(again)).T, expected)
        assert written["weight_packed"].shape[1] < tensors["weight_packed"].shape[1]
        return
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype
        assert written[key].shape == tensor.shape
        assert written[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gptqmodel:gptq-w4-sym")])
def test_symmetric_layers_need_no_zero_points(name):
    tensors, expected, config = golden(name)
    q = decode(name, tensors, expected.dtype, config)
    assert q.qtype == "int4"
    assert q.zero_point is None
    assert (q.perm is not None) == ("order" in name)


@pytest.mark.parametrize("name", ["gptq-w4", "fp8-static"])
def test_models_of_llm_compressor(tmp_path, name):
    folder = FIXTURES / f"llmcompressor-{name}"
    expected = read_header(folder / "expected.safetensors")
    params, config = load_huggingface(folder)
    kernels = {path: leaf for path, leaf in named_leaves(params) if isinstance(leaf, QArray)}
    assert len(kernels) == len(expected) == 7
    for path, q in kernels.items():
        theirs = expected[f"model.{path.replace('layers_', 'layers.').replace('/', '.').replace('kernel', 'weight')}"]
        np.testing.assert_array_equal(np.asarray(dequantize_array(q)).T, theirs.read(), err_msg=path)
        assert (q.act_scale is not None) == (name == "fp8-static")
    save_huggingface(tmp_path, params, config, format="compressed-tensors")
    stored, written = (read_header(path / "model.safetensors") for path in (folder, tmp_path))
    assert stored.keys() == written.keys()
    assert all(stored[key].read().tobytes() == written[key].read().tobytes() for key in stored)


def test_activations_of_a_scheme():
    tensors, expected, config = golden("compressed-tensors:int8-asym-static")
    q = decode("compressed-tensors", tensors, expected.dtype, config)
    assert q.activation.qtype == "uint8"
    assert q.activation.static
    assert q.act_scale.item() == tensors["input_scale"].item()
    assert q.act_zero_point.item() == tensors["input_zero_point"].item() + 128
    tensors, expected, config = golden("compressed-tensors:fp8-block")
    q = decode("compressed-tensors", tensors, expected.dtype, config)
    assert q.activation.granularity.size == 16
    assert q.scale.shape == (2, 2)


def test_four_bit_activations_stay_in_float():
    tensors, expected, config = golden("compressed-tensors:nvfp4")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4, "type": "float", "dynamic": "local"}
    tensors["input_global_scale"] = np.ones(1, np.float32)
    q = decode("compressed-tensors", tensors, expected.dtype, config)
    assert q.activation is None
    np.testing.assert_array_equal(np.asarray(dequantize_array(q)).T, expected)


def test_a_zero_point_of_zero_needs_version_2():
    tensors, expected, config = golden("gptqmodel:gptq-w4-asym-v2")
    q = decode("gptqmodel", tensors, expected.dtype, config)
    q.zero_point[0, 0] = 0
    with pytest.raises(ValueError, match="write gptq_v2"):
        hf_gptq.encode_linear(q, hf_gptq.GPTQFormat(1), "layer")
    written = hf_gptq.encode_linear(q, hf_gptq.GPTQFormat(2), "layer")
    again = hf_gptq.decode_linear(written, hf_gptq.GPTQFormat(2), expected.dtype, "layer")
    np.testing.assert_array_equal(again.zero_point, q.zero_point)


def test_version_1_undoes_its_writers_borrow():
    """A writer takes 0x11111111 from the word of zero points 0, 5, 0, 0, 9, 15, 1, 0; the borrows must come back."""
    zeros = [0, 5, 0, 0, 9, 15, 1, 0]
    word = (sum(zero << 4 * place for place, zero in enumerate(zeros)) - 0x11111111) % 2**32
    tensors = {
        "qweight": np.zeros((1, 8), np.int32),
        "qzeros": np.array([[word]], np.uint32).view(np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    q = hf_gptq.decode_linear(tensors, hf_gptq.GPTQFormat(1), np.float16, "layer")
    assert q.zero_point.tolist() == [zeros]
