"""Whole Hugging Face folders: names, shards, fused and stacked modules, round trips through every format."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxquant.arrays._qarray import QArray, dequantize_array
from jaxquant.arrays._qtypes import get_qtype
from jaxquant.arrays._spec import PerTensor, PerToken, TensorSpec
from jaxquant.interop import (
    Module,
    from_qwix,
    load_huggingface,
    plan_huggingface,
    read_table,
    save_huggingface,
    to_qwix,
)
from jaxquant.interop._linear import make_linear
from jaxquant.interop._words import from_storage, to_storage
from jaxquant.interop.names import LLAMA, MIXTRAL, PHI3

D, H, LAYERS, VOCABULARY = 64, 96, 2, 48
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": D,
    "intermediate_size": H,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "float16",
}


def random_kernel(rng, inputs, outputs, qtype="int4", size=32, dtype=np.float16, order=False, **given):
    format = get_qtype(qtype)
    codes = rng.integers(0, 2**format.bits, (inputs, outputs), np.uint8)
    groups = inputs // size if size else 1
    scale = rng.uniform(0.01, 0.1, (groups, outputs)).astype(dtype)
    zero_point = rng.integers(1, 2**format.bits, scale.shape, np.uint8) if format.kind == "uint" else None
    if order:
        given["perm"] = np.argsort(rng.permutation(inputs) // (inputs // groups), kind="stable").astype(np.int32)
    shape = (inputs, outputs)
    return make_linear("kernel", to_storage(codes, format), scale, zero_point, qtype, shape, dtype, **given)


def random_float(rng, *shape, dtype=np.float16):
    return rng.normal(size=shape).astype(dtype)


def random_llama(rng, kernel=random_kernel, **given):
    def layer():
        attention = {name: {"kernel": kernel(rng, D, D // (1 + (name[0] in "kv")), **given)} for name in ATTENTION}
        attention["q_proj"]["bias"] = random_float(rng, D)
        return {
            "self_attn": attention,
            "mlp": {
                "gate_proj": {"kernel": kernel(rng, D, H, **given)},
                "up_proj": {"kernel": kernel(rng, D, H, **given)},
                "down_proj": {"kernel": kernel(rng, H, D, **given)},
            },
            "input_layernorm": {"scale": random_float(rng, D)},
            "post_attention_layernorm": {"scale": random_float(rng, D)},
        }

    return {
        "embed_tokens": {"embedding": random_float(rng, VOCABULARY, D)},
        **{f"layers_{i}": layer() for i in range(LAYERS)},
        "norm": {"scale": random_float(rng, D)},
        "lm_head": {"kernel": random_float(rng, D, VOCABULARY)},
    }


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


STATIC = {"act_scale": np.full(1, 0.02, np.float16), "activation": TensorSpec("int8", PerTensor(), static=True)}
FORMATS = {
    "gptq": {"order": True},
    "gptq-w3": {"qtype": "uint3"},
    "gptq_v2": {"qtype": "uint2"},
    "gptq_v2-w8": {"qtype": "int8"},
    "awq": {"qtype": "uint4"},
    "compressed-tensors": {"qtype": "int4", "order": True},
    "compressed-tensors-asym": {"qtype": "uint4"},
    "compressed-tensors-w5": {"qtype": "uint5"},
    "compressed-tensors-w8a8": {"qtype": "int8", "size": None, "activation": TensorSpec("int8", PerToken())},
    "compressed-tensors-static": {"qtype": "int8", "size": None, **STATIC},
    "compressed-tensors-w4a8": {"qtype": "int4", "activation": TensorSpec("int8", PerToken())},
}


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_through_a_folder(tmp_path, rng, name, assert_same):
    params = random_llama(rng, **FORMATS[name])
    format = next(f for f in ("gptq_v2", "gptq", "awq", "compressed-tensors") if name.startswith(f))
    save_huggingface(tmp_path / "model", params, CONFIG, format=format)
    restored, config = load_huggingface(tmp_path / "model")
    assert config == CONFIG
    assert_same(restored, params)
    written = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == format.removesuffix("_v2")
    assert "lm_head" in (written.get("ignore") or written.get("modules_to_not_convert") or ["lm_head"])


def test_the_files_are_what_the_library_reads(tmp_path, rng):
    params = random_llama(rng)
    save_huggingface(tmp_path, params, CONFIG, format="gptq")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["kernel"].T)
    kernel = params["layers_1"]["mlp"]["down_proj"]["kernel"]
    nibbles = tensors["model.layers.1.mlp.down_proj.qweight"].view(np.uint32)[:, None] >> np.arange(0, 32, 4)[:, None]
    codes = from_storage(kernel.qvalue, kernel.format, H)
    np.testing.assert_array_equal((nibbles & 15).reshape(H, D), codes)
    assert (tensors["model.layers.0.self_attn.k_proj.qzeros"] == 0x77777777).all()
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == np.float16


def test_float_folders_in_shards_and_dtypes(tmp_path, rng, assert_same):
    params = random_llama(rng, lambda rng, *shape: random_float(rng, *shape, dtype=ml_dtypes.bfloat16))
    save_huggingface(tmp_path, params, CONFIG, format="float")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    restored, _ = load_huggingface(tmp_path)
    assert_same(restored, params)
    plan = plan_huggingface(tmp_path)
    assert sum(leaf.nbytes for leaf in plan.leaves) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_tied_heads_and_derived_tensors_are_dropped(tmp_path, rng, assert_same):
    config = CONFIG | {"tie_word_embeddings": True}
    params = random_llama(rng)
    save_huggingface(tmp_path, params, config, format="gptq")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    restored, _ = load_huggingface(tmp_path)
    assert_same(restored, {key: value for key, value in params.items() if key != "lm_head"})


def test_scales_of_a_key_value_cache(tmp_path, rng, assert_same):
    activation = TensorSpec("float8_e4m3fn", PerTensor(), static=True)

    def fp8(rng, inputs, outputs):
        codes = rng.normal(size=(inputs, outputs)).astype(ml_dtypes.float8_e4m3fn)
        given = {"act_scale": np.full(1, 0.5, np.float16), "activation": activation}
        return make_linear(
            "w", codes, np.full((1, 1), 0.25, np.float16), None, "float8_e4m3fn", codes.shape, np.float16, **given
        )

    params = random_llama(rng, fp8)
    for i in range(LAYERS):
        params[f"layers_{i}"]["self_attn"] |= {name: random_float(rng, 1) for name in ("k_scale", "v_scale")}
    save_huggingface(tmp_path, params, CONFIG, format="compressed-tensors")
    assert_same(load_huggingface(tmp_path)[0], params)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (written["strategy"], written["type"], written["dynamic"]) == ("tensor", "float", False)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert "model.layers.0.self_attn.k_scale" in file.keys()  # noqa: SIM118 (no mapping)


def test_layers_quantized_differently_are_groups_apart(tmp_path, rng, assert_same):
    params = random_llama(rng)
    params["layers_1"]["mlp"]["down_proj"]["kernel"] = random_kernel(rng, H, D, "uint8", size=None)
    save_huggingface(tmp_path, params, CONFIG, format="compressed-tensors")
    assert_same(load_huggingface(tmp_path)[0], params)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    with pytest.raises(ValueError, match="one number of bits for all"):
        save_huggingface(tmp_path / "gptq", params, CONFIG, format="gptq")
    assert not (tmp_path / "gptq").exists()


def split_tree(rng, quantized):
    """A Phi-3 with its fused kernels, as one module and as our parts."""
    params = random_llama(rng, random_kernel if quantized else lambda rng, *shape: random_float(rng, *shape))
    for layer in range(LAYERS):
        del params[f"layers_{layer}"]["self_attn"]["q_proj"]["bias"]
    return params


@pytest.mark.parametrize("quantized", [False, True])
def test_fused_projections_are_parts_here(tmp_path, rng, quantized, assert_same):
    params, config = split_tree(rng, quantized), CONFIG | {"model_type": "phi3"}
    save_huggingface(tmp_path, params, config, format="gptq" if quantized else "float")
    names = set(safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    assert f"model.layers.0.self_attn.qkv_proj.{'qweight' if quantized else 'weight'}" in names
    assert not any("k_proj" in name for name in names if "qkv" not in name)
    assert_same(load_huggingface(tmp_path)[0], params)


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_are_stacked_here(tmp_path, rng, quantized, assert_same):
    experts = 3
    params, config = random_llama(rng), CONFIG | {"model_type": "mixtral"}
    for layer in range(LAYERS):
        del params[f"layers_{layer}"]["mlp"]
        moe = {"router": {"kernel": random_float(rng, D, experts)}}
        for name, (inputs, outputs) in {"w1": (D, H), "w2": (H, D), "w3": (D, H)}.items():
            kernels = [random_kernel(rng, inputs, outputs) for _ in range(experts)]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *kernels)
            moe[name] = {"kernel": stacked if quantized else random_float(rng, experts, inputs, outputs)}
        params[f"layers_{layer}"]["moe"] = moe
    save_huggingface(tmp_path, params, config, format="gptq")
    restored, _ = load_huggingface(tmp_path)
    assert_same(restored, params)
    if quantized:
        assert restored["layers_0"]["moe"]["w1"]["kernel"].shape == (experts, D, H)


@pytest.mark.parametrize(("model_type", "norms"), [("gemma", ()), ("gemma2", (1,)), ("gemma3_text", (1, 2))])
def test_the_head_of_gemma_is_the_embedding_unless_said_otherwise(tmp_path, rng, model_type, norms, assert_same):
    """Gemma's config.json leaves `tie_word_embeddings` out, and its later models have more norms."""
    params = random_llama(rng)
    head = params.pop("lm_head")
    for layer in range(LAYERS):
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm") * (1 in norms):
            params[f"layers_{layer}"][name] = {"scale": random_float(rng, D)}
        for name in ("q_norm", "k_norm") * (2 in norms):
            params[f"layers_{layer}"]["self_attn"][name] = {"scale": random_float(rng, D // 4)}
    config = CONFIG | {"model_type": model_type}
    save_huggingface(tmp_path / "tied", params, config, format="gptq")
    assert_same(load_huggingface(tmp_path / "tied")[0], params)
    untied = config | {"tie_word_embeddings": False}
    save_huggingface(tmp_path / "untied", params | {"lm_head": head}, untied, format="gptq")
    assert_same(load_huggingface(tmp_path / "untied")[0], params | {"lm_head": head})
    (tmp_path / "tied" / "config.json").write_bytes((tmp_path / "untied" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing \['lm_head'\]"):
        load_huggingface(tmp_path / "tied")


def test_a_table_of_the_users_own(tmp_path, rng, assert_same):
    table = (*LLAMA, Module("model.layers.{i}.adapter.{x}", "layers_{i}/{x}_adapter", "linear"))
    params = random_llama(rng)
    for layer in range(LAYERS):
        params[f"layers_{layer}"]["down_adapter"] = {"kernel": random_float(rng, D, 8)}
    config = CONFIG | {"model_type": "mine"}
    with pytest.raises(NotImplementedError, match="modules=, a table of your own"):
        save_huggingface(tmp_path, params, config, format="gptq")
    save_huggingface(tmp_path, params, config, format="gptq", modules=table)
    assert_same(load_huggingface(tmp_path, modules=table)[0], params)


def test_tables_are_one_to_one():
    for table in (LLAMA, MIXTRAL, PHI3):
        for line in table:
            values = {"i": "3", "e": "1", "x": "up", "part": "q_proj"}
            assert line.match(line.hf.format(**values)) is not None
            if line.parts is None:
                assert line.match_path(line.path.format(**values)) is not None


def test_missing_and_surplus_modules_are_listed(tmp_path, rng):
    params = random_llama(rng)
    del params["layers_1"]["mlp"]["up_proj"], params["norm"]
    save_huggingface(tmp_path, params, CONFIG, format="gptq")
    with pytest.raises(ValueError, match=r"missing \['model.norm', 'model.layers.1.mlp.up_proj'\], surplus \[\]"):
        load_huggingface(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors |= {"model.layers.0.mlp.extra.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus \['model.layers.0.mlp.extra.weight'\]"):
        load_huggingface(tmp_path)


def test_lines_of_a_file_replace_those_of_its_base(tmp_path, rng, assert_same):
    params = random_llama(rng)
    del params["lm_head"]
    save_huggingface(tmp_path, params, CONFIG, format="gptq")
    with pytest.raises(ValueError, match="has tie_word_embeddings: true"):
        load_huggingface(tmp_path)
    head = {"hf": "lm_head", "path": "head", "kind": "linear", "optional": True}
    (tmp_path / "names.json").write_text(json.dumps({"base": "llama", "modules": [head]}))
    table = read_table(tmp_path / "names.json")
    assert [line.path for line in table if line.hf == "lm_head"] == ["head"]
    assert_same(load_huggingface(tmp_path, modules=table)[0], params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "conv"}, "kind 'conv'; accepted: linear, embedding, norm, scales"),
        ({"path": "b/{j}"}, r"b/{j} has the placeholders \['j'\], where a.{i} asks for \['i'\]"),
        ({"hf": "a.{i}.{i}"}, "asks for"),
        ({"stack": "e"}, "stack 'e' is no placeholder of a.{i}"),
        ({"parts": {"q": "x"}}, r"where a.{i} asks for \['i', 'part'\]"),
        ({"parts": {"q": 3}, "path": "b/{i}/{part}"}, "are text"),
        ({"optional": 1}, "true or false"),
        ({"path": None}, "are text"),
        ({"hf": "a.{i}.{1}", "path": "b/{i}/{1}"}, "braces go round the name of a placeholder"),
        ({"path": "b/{i}}"}, "braces go round"),
    ],
)
def test_lines_of_a_table_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Module(**{"hf": "a.{i}", "path": "b/{i}", "kind": "linear"} | fields)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("norm/scale/deeper", "norm/scale(/deeper/kernel)?: the table of names has"),
        ("layers_0/mlp/up_proj", "layers_0/mlp/up_proj/kernel: the table of names sends 2 tensors there"),
    ],
)
def test_a_table_that_sends_two_modules_to_one_place(tmp_path, rng, order, path, message):
    save_huggingface(tmp_path, random_llama(rng), CONFIG, format="gptq")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    other = "z.other.weight" if order > 0 else "a.other.weight"
    safetensors.numpy.save_file(tensors | {other: np.ones((3, 3), np.float32)}, tmp_path / "model.safetensors")
    table = (*LLAMA, Module(other.removesuffix(".weight"), path, "linear"))
    with pytest.raises(ValueError, match=message):
        load_huggingface(tmp_path, modules=table)


def test_what_is_stacked_is_numbered_by_whatever_name(tmp_path, rng, assert_same):
    """A placeholder that is stacked does not match a name: `gate` beside the experts is no expert."""
    experts = Module("mlp.{expert}", "experts", "linear", stack="expert")
    table = (experts, Module("mlp.gate", "router", "linear"))
    params = {"experts": {"kernel": random_float(rng, 3, D, 4)}, "router": {"kernel": random_float(rng, D, 3)}}
    save_huggingface(tmp_path, params, {}, format="float", modules=table)
    assert_same(load_huggingface(tmp_path, modules=table)[0], params)


def test_sizes_of_parts_that_the_config_does_not_give(tmp_path, rng, assert_same):
    line = Module("model.fused", "{part}", "linear", parts={"a": "inner * 2", "b": "outer"})
    params = {"a": {"kernel": random_float(rng, D, 4)}, "b": {"kernel": random_float(rng, D, 3)}}
    save_huggingface(tmp_path, params, {"inner": 2, "outer": 3}, format="float", modules=(line,))
    assert_same(load_huggingface(tmp_path, modules=(line,))[0], params)
    for wrong in ({"inner": 2}, {"inner": 2, "outer": "3"}, {"inner": -2, "outer": 3}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="a positive number is needed"):
            load_huggingface(tmp_path, modules=(line,))


@pytest.mark.parametrize(
    ("change", "format", "message"),
    [
        ({"pre_scale": np.ones((D, 1), np.float32)}, "gptq", r"mlp.gate_proj: .*pre_scale; fold"),
        ({"layout": "int4-fragments"}, "gptq", "unpack it to the plain layout"),
        ({"qtype": "nf4"}, "gptq", "qtype nf4; accepted: int2 uint2"),
        ({"qtype": "nf4"}, "compressed-tensors", "qtype nf4; accepted: int2"),
        ({"perm": np.arange(D, dtype=np.int32)[::-1].reshape(-1, 1)}, "awq", "AWQ has no input order"),
        ({}, "float", "dequantize the parameters first"),
        ({}, "gguf", "accepted: float, gptq"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, rng, change, format, message):
    params = random_llama(rng)
    params["layers_0"]["mlp"]["gate_proj"]["kernel"] = dataclasses.replace(random_kernel(rng, D, H), **change)
    with pytest.raises(ValueError, match=message):
        save_huggingface(tmp_path / "out", params, CONFIG, format=format)
    assert not (tmp_path / "out").exists()


def test_an_unknown_parameter_is_named(tmp_path, rng):
    with pytest.raises(ValueError, match="layers_0/foo: the table"):
        save_huggingface(tmp_path, random_llama(rng) | {"layers_0": {"foo": np.ones(2)}}, CONFIG, format="gptq")


@dataclasses.dataclass
class QwixArray:
    """The fields of qwix.QArray."""

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: object = None

    def values(self):
        """Its documented meaning, in float64."""
        rows = self.qvalue.shape[0] // self.scale.shape[0]
        grids = [
            np.repeat(np.asarray(g).astype(np.float64), rows, 0) for g in (self.scale, self.zero_point) if g is not None
        ]
        codes = np.asarray(self.qvalue).astype(np.float64)
        return (codes - (grids[1] if len(grids) > 1 else 0)) * grids[0]


@pytest.mark.parametrize("qtype", ["int2", "int3", "int4", "int8", "uint4", "uint8"])
def test_qwix_both_ways(rng, qtype, assert_same):
    kernel = jax.tree.map(jnp.asarray, random_kernel(rng, D, H, qtype, dtype=np.float32))
    theirs = to_qwix(kernel, QwixArray)
    assert not jnp.dtype(theirs.qvalue.dtype).name.startswith("uint")
    np.testing.assert_allclose(theirs.values(), np.asarray(dequantize_array(kernel)), rtol=1e-6)
    back = from_qwix(theirs, dtype=jnp.float32)
    assert isinstance(back, QArray)
    assert_same(back, kernel)


def test_qwix_has_no_place_for_an_input_order(rng):
    with pytest.raises(ValueError, match="has perm, for which qwix has no place"):
        to_qwix(random_kernel(rng, D, H, order=True), QwixArray)
