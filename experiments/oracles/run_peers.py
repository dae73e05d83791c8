"""Other libraries' quantization of a Llama-family folder, on a CPU, for `python -m experiments.peers` to measure.

    python experiments/oracles/run_peers.py MODEL CALIBRATION.npy EVALUATION.npy FOLDER [PEER,PEER,...]

in an environment of its own: Python 3.11 with torch 2.13.0 (CPU), transformers, llmcompressor, gptqmodel, auto-round,
bitsandbytes and torchao (each row of the results bears the versions). Each peer writes FOLDER/PEER/: `peer.json` (bits
a weight with scales of 16 bits counted, flags, versions, seconds), and either the model with the float32 weights that
its codes stand for, or, where activations are quantized too, the float32 logits on the evaluation tokens.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np
import torch
from ist_gptq import ist_gptq
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

GROUP = 128
LOGITS = "logits.npy"
FORMATS = {"w4": (4, True), "w4-asym": (4, False), "w3": (3, True), "w3-asym": (3, False)}


def group_bits(bits, sym, group=GROUP):
    return bits + 16 / group + (0 if sym else bits / group)


def channel_bits(model):
    """8 bits and a float32 scale for each output channel."""
    layers = linears(model).values()
    return 8 + 32 * sum(layer.out_features for layer in layers) / sum(layer.weight.numel() for layer in layers)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def linears(model):
    """The layers that everyone quantizes: those of the blocks, not the head."""
    named = model.model.layers.named_modules(prefix="model.layers")
    return {name: module for name, module in named if isinstance(module, torch.nn.Linear)}


def run_ist(folder, calibration, bits, sym, **flags):
    model = load(folder)
    ist_gptq(model, calibration, bits=bits, sym=sym, groupsize=GROUP, **flags)
    return model, group_bits(bits, sym), {"damping": 0.01, "blocksize": 128, **flags}


def oneshot(folder, calibration, recipe):
    """llm-compressor's entry, and the model it leaves, which rounds as it runs."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model = load(folder)
    tokens = calibration.tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")
    sizes = {"num_calibration_samples": len(tokens), "max_seq_length": len(tokens[0]), "batch_size": 8}
    oneshot(model=model, dataset=data, recipe=recipe, processor=tokenizer, shuffle_calibration_samples=False, **sizes)
    return model


@torch.no_grad()
def dequantized(model):
    """Puts in place what the layers of compressed-tensors round their weights to."""
    from compressed_tensors.quantization import QuantizationStatus, fake_quantize

    for module in linears(model).values():
        if module.quantization_status < QuantizationStatus.COMPRESSED:
            parts = (module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights)
            module.weight.data = fake_quantize(module.weight, *parts).float()
    return model


def weight_args(bits, sym, **given):
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group", "group_size": GROUP, **given}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def run_llmcompressor_gptq(folder, calibration, bits, sym, **given):
    from llmcompressor.modifiers.gptq import GPTQModifier

    recipe = GPTQModifier(**weight_args(bits, sym, actorder="weight", **given), dampening_frac=0.01)
    model = dequantized(oneshot(folder, calibration, recipe))
    return model, group_bits(bits, sym), {"actorder": "weight", "dampening_frac": 0.01, "block_size": 128, **given}


def run_llmcompressor_awq(folder, calibration, bits, sym):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, *_: None  # 0.14.0.1 pins memory even where there is no accelerator
    recipe = [AWQModifier(), QuantizationModifier(**weight_args(bits, sym))]
    model = dequantized(oneshot(folder, calibration, recipe))
    return model, group_bits(bits, sym), {"duo_scaling": True, "n_grid": 20}


def run_llmcompressor_w8a8(folder, calibration, strength=None):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    rounding = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    smoothing = [] if strength is None else [SmoothQuantModifier(smoothing_strength=strength)]
    model = oneshot(folder, calibration, [*smoothing, rounding])
    return model, channel_bits(model), {"scheme": "W8A8 (channel, dynamic token)", "smoothing_strength": strength}


def run_gptqmodel(folder, calibration, bits, sym, **flags):
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6.0 asks for two and gives one where there are two cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    given = QuantizeConfig(bits=bits, group_size=GROUP, sym=sym, device="cpu", offload_to_disk=False, **flags)
    wrapped = GPTQModel.load(str(folder), given, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    wrapped.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        wrapped.save(scratch)
        saved = GPTQModel.load(scratch, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        packed = dict(saved.model.named_modules())
    model = load(folder)
    for name, module in linears(model).items():
        module.weight.data = packed[name].dequantize_weight().T.float().contiguous()
    return model, group_bits(bits, sym), {"damp_auto_increment": given.damp_auto_increment, **flags}


def run_autoround(folder, calibration, bits, sym):
    from auto_round import AutoRound

    model = load(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")
    flags = {"iters": 200, "nsamples": len(calibration), "seqlen": calibration.shape[1], "batch_size": 8, "seed": 42}
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    scheme = {"bits": bits, "group_size": GROUP, "sym": sym}
    rounder = AutoRound(model, tokenizer, **scheme, dataset=data, device_map="cpu", enable_torch_compile=False, **flags)
    model, _ = rounder.quantize()
    return model.float(), group_bits(bits, sym), flags


def run_bitsandbytes_nf4(folder, calibration, nested):
    import bitsandbytes.functional as bnb

    model = load(folder)
    for module in linears(model).values():
        packed, state = bnb.quantize_4bit(
            module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        module.weight.data = bnb.dequantize_4bit(packed, state).float()
    bits = 4 + 8 / 64 + 32 / 64 / 256 if nested else 4 + 32 / 64
    return model, bits, {"blocksize": 64, "compress_statistics": nested}


def run_bitsandbytes_int8(folder, calibration):
    from bitsandbytes.nn import Linear8bitLt

    model = load(folder)
    bits = channel_bits(model)
    for name, module in linears(model).items():
        parent, leaf = name.rsplit(".", 1)
        layer = Linear8bitLt(module.in_features, module.out_features, False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict({"weight": module.weight.data})
        setattr(model.get_submodule(parent), leaf, layer.to("cpu").eval())  # in training mode it multiplies floats
    return model, bits, {"threshold": 6.0, "has_fp16_weights": False}


def run_torchao(folder, calibration, name, bits=None, **flags):
    import torchao.quantization as ao

    model = load(folder)
    bits = channel_bits(model) if bits is None else bits
    ao.quantize_(model.model.layers, getattr(ao, name)(**flags))
    return model, bits, {"config": name, **{key: str(value) for key, value in flags.items()}}


def run_torchao_int4(folder, calibration):
    from torchao.quantization.granularity import PerGroup

    flags = {"weight_dtype": torch.int4, "granularity": PerGroup(GROUP)}
    return run_torchao(folder, calibration, "IntxWeightOnlyConfig", group_bits(4, True), **flags)


IST_BEST = {"actorder": True, "static_groups": True, "mse": True}
GPTQMODEL = {"desc_act": True, "act_group_aware": False, "damp_percent": 0.01}  # 0.05 is its default
GPTQMODEL_BEST = {**GPTQMODEL, "static_groups": True, "mse": 2.4}
LLM_COMPRESSOR = ["llmcompressor", "compressed-tensors", "torch"]
BY_FORMAT = {
    "ist-gptq": (run_ist, {}, ["torch"]),
    "ist-gptq-best": (run_ist, IST_BEST, ["torch"]),
    "ist-gptq-sequential": (run_ist, {**IST_BEST, "true_sequential": True}, ["torch"]),
    "ist-gptq-damped": (run_ist, {**IST_BEST, "damping": 0.2}, ["torch"]),
    "llmcompressor-gptq": (run_llmcompressor_gptq, {}, LLM_COMPRESSOR),
    "llmcompressor-gptq-mse": (run_llmcompressor_gptq, {"observer": "memoryless_mse"}, LLM_COMPRESSOR),
    "llmcompressor-awq": (run_llmcompressor_awq, {}, LLM_COMPRESSOR),
    "gptqmodel": (run_gptqmodel, GPTQMODEL, ["gptqmodel", "torch"]),
    "gptqmodel-best": (run_gptqmodel, GPTQMODEL_BEST, ["gptqmodel", "torch"]),
    "gptqmodel-gptaq": (run_gptqmodel, {**GPTQMODEL_BEST, "gptaq": {"alpha": 0.25}}, ["gptqmodel", "torch"]),
    "autoround": (run_autoround, {}, ["auto-round", "torch"]),
}
CALIBRATED = {
    f"{name}-{form}": (functools.partial(run, bits=bits, sym=sym, **flags), packages)
    for name, (run, flags, packages) in BY_FORMAT.items()
    for form, (bits, sym) in FORMATS.items()
} | {"llmcompressor-smoothquant-w8a8": (functools.partial(run_llmcompressor_w8a8, strength=0.8), LLM_COMPRESSOR)}
DATA_FREE = {
    "llmcompressor-w8a8": (run_llmcompressor_w8a8, LLM_COMPRESSOR),
    "torchao-w8a8": (
        functools.partial(run_torchao, name="Int8DynamicActivationInt8WeightConfig"),
        ["torchao", "torch"],
    ),
    "torchao-w4": (run_torchao_int4, ["torchao", "torch"]),
    "bitsandbytes-int8": (run_bitsandbytes_int8, ["bitsandbytes", "torch"]),
    "bitsandbytes-nf4": (functools.partial(run_bitsandbytes_nf4, nested=False), ["bitsandbytes", "torch"]),
    "bitsandbytes-nf4-nested": (functools.partial(run_bitsandbytes_nf4, nested=True), ["bitsandbytes", "torch"]),
    "torch-float": (lambda folder, calibration: (load(folder), 32.0, {}), ["torch"]),
}
PEERS = CALIBRATED | DATA_FREE
RUNNABLE = {name for name in PEERS if name.endswith(("w8a8", "int8", "float")) or name.startswith("torchao")}


@torch.no_grad()
def write_logits(model, tokens, path):
    shape = (*tokens.shape, model.config.vocab_size)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(tokens), 8):
        out[start : start + 8] = model(tokens[start : start + 8], use_cache=False).logits.float().numpy()
    out.flush()


def main(model_folder, calibration, evaluation, out, names=None):
    folder = pathlib.Path(model_folder)
    calibration, evaluation = (
        torch.from_numpy(np.load(path, allow_pickle=False)[:, :-1].astype(np.int64))
        for path in (calibration, evaluation)
    )
    for name in names.split(",") if names else PEERS:
        run, packages = PEERS[name]
        target = pathlib.Path(out) / name
        if (target / "peer.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        start = time.perf_counter()
        model, bits, flags = run(folder, calibration)
        seconds = time.perf_counter() - start
        if name in RUNNABLE:
            write_logits(model, evaluation, target / LOGITS)
        else:
            model = {key: value for key, value in model.state_dict().items() if not key.startswith("lm_head")}
            save(model, folder, target)
        versions = {package: importlib.metadata.version(package) for package in [*packages, "transformers"]}
        record = {"bits": bits, "calibrated": name in CALIBRATED, "flags": flags, "versions": versions}
        record["seconds"] = seconds
        (target / "peer.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {seconds:.1f} s", flush=True)


def save(state, folder, target):
    """The folder's config beside float32 weights under its own names."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = [name for shard in folder.glob("*.safetensors") for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    save_file({name: state[name].float().contiguous() for name in names}, target / "model.safetensors")
    shutil.copy(folder / "config.json", target)


if __name__ == "__main__":
    main(*sys.argv[1:])
