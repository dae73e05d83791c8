"""Whether the libraries that own the formats compute with our exports what our model does: two programs in one.

    python -m experiments.oracles.check_exports write FOLDER     # in this project's environment
    python experiments/oracles/check_exports.py read FOLDER [RESULTS.json]   # in one with torch, transformers,
                                                     # compressed-tensors and gptqmodel (see make_interop_goldens.py)

`write` makes a small random Llama, quantizes it, exports each format, imports it again and saves the logits that our
decoder gives with the imported weights. `read` loads each folder with its library and prints the greatest difference
of the logits, relative to their spread; it fails above LIMIT. `ct-fp8-kv` carries the scales of a float8 key and
value cache, which the library may leave alone but not misread; the logits are those without a cache. What is left is
the libraries' own arithmetic. GPTQModel's layers compute in float16. A quantized activation near the edge between two
codes falls to one side or the other; with int8 the scale absmax / 127.5 puts the largest element exactly on that
edge, and the layers after spread the difference, so that `ct-w8a8` differs by as much as quantizing changes at all. A
static scale a little larger shows that nothing else does.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys

LOOSE = ("gptq", "gptq-order", "gptq-v2", "gptq-w8", "awq", "ct-w8a8-static", "ct-fp8", "ct-fp8-static")
LIMIT = {name: 2e-2 for name in LOOSE}
LIMIT["ct-w8a8"] = 0.2
DEFAULT_LIMIT = 2e-5
CACHE_SCALES = ("k_scale", "v_scale")


def write(folder):
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxquant as jq
    from experiments.models.config import DecoderConfig
    from experiments.models.decoder import Decoder
    from jaxquant.interop import load_huggingface, save_huggingface

    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = DecoderConfig(**sizes, **heads)
    model = Decoder(config)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16), model.init_params(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    token = jq.PerToken()
    group = {"group_size": 32}

    def preset(name, **given):
        config = jq.QuantConfig.preset(name, **given)
        weight = jq.TensorSpec(**{**vars(config.default.weight), "scale_dtype": "float16"})
        return jq.QuantConfig(jq.QuantSpec(weight, config.default.activation))

    int8, fp8 = jq.TensorSpec("int8", scale_dtype="float16"), jq.TensorSpec("float8_e4m3fn", scale_dtype="float16")
    static = jq.TensorSpec("int8", jq.PerTensor(), static=True)
    fp8_static = jq.TensorSpec("float8_e4m3fn", jq.PerTensor(), static=True)

    def fp8_weight(granularity):
        return jq.QuantConfig(jq.QuantSpec(jq.TensorSpec("float8_e4m3fn", granularity, scale_dtype="float16")))

    exports = {
        "float": ("float", None),
        "gptq": ("gptq", preset("w4a16", **group)),
        "gptq-order": ("gptq", preset("w4a16", **group)),
        "gptq-v2": ("gptq_v2", preset("w4a16-asym", **group)),
        "gptq-w8": (
            "gptq",
            jq.QuantConfig(jq.QuantSpec(jq.TensorSpec("int8", jq.PerGroup(32), scale_dtype="float16"))),
        ),
        "awq": ("awq", preset("w4a16-asym", **group)),
        "ct-w4": ("compressed-tensors", preset("w4a16", **group)),
        "ct-w4-asym": ("compressed-tensors", preset("w4a16-asym", **group)),
        "ct-w3": ("compressed-tensors", preset("w3a16", **group)),
        "ct-w8a8": ("compressed-tensors", jq.QuantConfig(jq.QuantSpec(int8, jq.TensorSpec("int8", token)))),
        "ct-w8a8-static": ("compressed-tensors", jq.QuantConfig(jq.QuantSpec(int8, static))),
        "ct-fp8": ("compressed-tensors", jq.QuantConfig(jq.QuantSpec(fp8, jq.TensorSpec("float8_e4m3fn", token)))),
        "ct-fp8-static": ("compressed-tensors", jq.QuantConfig(jq.QuantSpec(fp8, fp8_static))),
        "ct-fp8-tensor": ("compressed-tensors", fp8_weight(jq.PerTensor())),
        "ct-fp8-block": ("compressed-tensors", fp8_weight(jq.PerBlock((32, 32)))),
        "ct-fp8-kv": ("compressed-tensors", fp8_weight(jq.PerChannel())),
    }
    results = {}
    for name, (format, recipe) in exports.items():
        data = {"apply_fn": model.forward, "batches": [tokens]} if name.endswith("static") else {}
        quantized = params if recipe is None else jq.quantize(params, recipe, **data)
        change = {"gptq-order": _shuffled, "ct-w8a8-static": _widened}.get(name, lambda leaf: leaf)
        quantized = jax.tree.map(change, quantized, is_leaf=lambda leaf: isinstance(leaf, jq.QArray))
        if name.endswith("kv"):
            _add_cache_scales(quantized)
        hf = config.to_hf() | {"torch_dtype": "float16"}
        save_huggingface(folder / name, quantized, hf, format=format)
        _write_tokenizer(folder / name)
        imported, _ = load_huggingface(folder / name)
        for layer in range(sizes["num_hidden_layers"]):
            for scale in CACHE_SCALES:
                imported[f"layers_{layer}"]["self_attn"].pop(scale, None)
        imported = jax.tree.map(lambda leaf: leaf if leaf.dtype != np.float16 else leaf.astype(np.float32), imported)
        results[name] = np.asarray(jax.jit(jq.quantized(model.forward))(imported, jnp.asarray(tokens)))
    np.savez(folder / "logits.npz", tokens=tokens, **results)


def _write_tokenizer(folder):
    """One that GPTQModel can load, as it insists on one."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"t{n}": n for n in range(256)}, unk_token="t0")).save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "pad_token": "t0", "eos_token": "t1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _add_cache_scales(params):
    import numpy as np

    for layer in range(2):
        for number, scale in enumerate(CACHE_SCALES):
            params[f"layers_{layer}"]["self_attn"][scale] = np.full(1, (3 + 2 * layer + number) / 64, np.float16)


def _widened(leaf):
    """A QArray with its static activation scale a little larger."""
    import jaxquant as jq

    return dataclasses.replace(leaf, act_scale=leaf.act_scale * 1.01) if isinstance(leaf, jq.QArray) else leaf


def _shuffled(leaf):
    """A QArray with its inputs in another order, as act-order leaves them."""
    import numpy as np

    import jaxquant as jq

    if not isinstance(leaf, jq.QArray):
        return leaf
    rows, groups = leaf.trailing[0], leaf.scale.shape[0]
    g_idx = np.random.default_rng(rows).permutation(rows) // (rows // groups)
    return dataclasses.replace(leaf, perm=np.argsort(g_idx, kind="stable").astype(np.int32)[:, None])


def read(folder, results=None):
    import numpy as np
    import torch

    saved = np.load(folder / "logits.npz")
    tokens = torch.tensor(saved["tokens"]).long()
    rows = {}
    for name in sorted(set(saved.files) - {"tokens"}):
        model = _load(folder / name)
        with torch.inference_mode():
            logits = model(tokens, use_cache=False).logits.float().numpy()
        error = float(np.abs(logits - saved[name]).max() / saved[name].std())
        rows[name] = {"error": error, "limit": LIMIT.get(name, DEFAULT_LIMIT)}
        if name.endswith("kv"):
            rows[name]["scales"] = _cache_scales(model, folder / name)
        rows[name]["ok"] = error <= rows[name]["limit"] and rows[name].get("scales") != "differ"
        print(f"{name:14} {json.dumps(rows[name])}", flush=True)
    if results is not None:
        packages = ("torch", "transformers", "compressed-tensors", "gptqmodel")
        versions = {package: importlib.metadata.version(package) for package in packages}
        results.write_text(json.dumps({"versions": versions, "exports": rows}, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows.values()) else 1


def _cache_scales(model, folder):
    """What the library made of the cache scales in the files; transformers 5.24 leaves them to inference engines."""
    from safetensors.torch import load_file

    held = dict(model.named_parameters()) | dict(model.named_buffers())
    stored = load_file(folder / "model.safetensors")
    scales = {name: tensor.float() for name, tensor in stored.items() if name.endswith(CACHE_SCALES)}
    taken = [name for name in scales if name in held]
    if any((held[name].float() != scales[name]).any() for name in taken):
        return "differ"
    return "same" if scales and len(taken) == len(scales) else "not taken"


def _load(folder):
    import torch

    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if quantization.get("quant_method") in ("gptq", "awq"):
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.AWQ_TORCH if quantization["quant_method"] == "awq" else BACKEND.TORCH
        return GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    from transformers import AutoModelForCausalLM

    groups = quantization.get("config_groups", {})
    if any(not group["weights"]["symmetric"] for group in groups.values()):
        return _load_decompressed(folder, groups["group_0"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _load_decompressed(folder, group):
    """Decompresses layer by layer: transformers 5.24 makes room for unpacked zero points and so refuses packed ones."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    scheme, tensors = QuantizationScheme(**group), load_file(folder / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        names = [name for name in tensors if name.startswith(f"{module}.weight_")]
        stored = {name.removeprefix(f"{module}."): tensors.pop(name) for name in names}
        stored["weight_scale"] = stored["weight_scale"].float()
        tensors[f"{module}.weight"] = compressor.decompress(stored, scheme)["weight"]
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(tensors)
    return model.eval()


if __name__ == "__main__":
    program, *paths = sys.argv[1:]
    sys.exit({"write": write, "read": read}[program](*map(pathlib.Path, paths)))
