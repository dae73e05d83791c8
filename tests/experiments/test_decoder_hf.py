"""Hugging Face folders: every tensor arrives bit for bit, and nothing else does."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.models import load_hf, save_hf

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "decoder"


def _same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("max_shard_bytes", [None, 8_000])
def test_save_then_load_is_exact(tmp_path, dtype, max_shard_bytes):
    config, params = load_hf(FIXTURES / "qwen2")
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    save_hf(tmp_path / "model", params, config, max_shard_bytes)
    shards = [load_file(file) for file in (tmp_path / "model").glob("*.safetensors")]
    assert (len(shards) == 1) == (max_shard_bytes is None)
    for shard in shards:
        assert max_shard_bytes is None or len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_shard_bytes
    again, restored = load_hf(tmp_path / "model")
    assert again == config
    assert _same(params, restored)


def test_kernels_are_transposed_and_named_as_flax_does():
    _, params = load_hf(FIXTURES / "llama")
    stored = load_file(FIXTURES / "llama" / "model.safetensors")
    kernel = params["layers_1"]["self_attn"]["k_proj"]["kernel"]
    assert kernel.shape == (32, 16)
    np.testing.assert_array_equal(kernel, stored["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], stored["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], stored["model.embed_tokens.weight"])
    assert set(params["layers_0"]) == {"input_layernorm", "mlp", "post_attention_layernorm", "self_attn"}


def _altered(tmp_path, family, alter):
    folder = tmp_path / family
    shutil.copytree(FIXTURES / family, folder)
    tensors = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_missing_surplus_and_misfit_tensors_are_listed(tmp_path):
    def alter(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(5, np.float32)
        tensors["lm_head.weight"] = np.zeros((64, 32), np.int8)

    with pytest.raises(ValueError, match="does not fit llama") as error:
        load_hf(_altered(tmp_path, "llama", alter))
    for name in ("layers.1.mlp.up_proj", "layers.7.mlp.up_proj", "model.norm.weight", "lm_head.weight (int8"):
        assert name in str(error.value)


def test_derived_tensors_are_passed_over(tmp_path):
    def alter(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    _, params = load_hf(_altered(tmp_path, "qwen2", alter))
    assert _same(params, load_hf(FIXTURES / "qwen2")[1])


def test_a_missing_shard_is_named(tmp_path):
    config, params = load_hf(FIXTURES / "qwen3")
    save_hf(tmp_path, params, config, max_shard_bytes=20_000)
    gone = next(tmp_path.glob("model-00002*"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        load_hf(tmp_path)


def test_the_index_names_every_tensor_and_its_file(tmp_path):
    config, params = load_hf(FIXTURES / "qwen3")
    save_hf(tmp_path, params, config, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in jax.tree.leaves(params))
