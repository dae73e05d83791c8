"""Makes the golden layers of tests/jaxquant/fixtures/interop with the libraries that own the formats.

Each run needs one of them, in an environment apart from this project's (they want torch):

    pip install torch==2.13.0 compressed-tensors==0.20.0 gptqmodel==7.7.0 bitsandbytes safetensors
    python experiments/oracles/make_interop_goldens.py compressed-tensors tests/jaxquant/fixtures/interop
    python experiments/oracles/make_interop_goldens.py gptqmodel tests/jaxquant/fixtures/interop
    python experiments/oracles/make_interop_goldens.py bitsandbytes tests/jaxquant/fixtures/interop
    pip install llmcompressor==0.14.0.1
    python experiments/oracles/make_interop_goldens.py llmcompressor tests/jaxquant/fixtures/interop
    pip install compressed-tensors==0.12.2   # the last with the loose packing and with g_idx
    python experiments/oracles/make_interop_goldens.py compressed-tensors-0.12 tests/jaxquant/fixtures/interop

A case is a linear layer: the tensors as the library stores them; `expected`, the weight [out, in] as it dequantizes
them; and in the JSON file what config.json would say of it. Of llm-compressor there are whole models: folders as it
saves them, and the weights that transformers makes of them in expected.safetensors.
"""

import importlib.metadata
import json
import pathlib
import sys
import tempfile

import torch
from safetensors.torch import save_file

OUT, IN, GROUP = 32, 32, 16
EXPECTED = "expected.safetensors"


def weight(seed, dtype=torch.float16, shape=(OUT, IN)):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.1).to(dtype)


def grid(w, bits, size, symmetric):
    """(scale, zero point of unsigned codes) [out, groups] by min and max."""
    blocks = w.float().reshape(w.shape[0], -1, size)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) * 2 / (2**bits - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round().clamp(1, 2**bits - 1)


def compressed_tensors_cases():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def qparams(w, args):
        kind = str(getattr(args.strategy, "value", args.strategy))
        if kind == "tensor":
            low, high = w.amin().reshape(1), w.amax().reshape(1)
        elif kind == "channel":
            low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        elif kind == "block":
            rows, columns = args.block_structure
            padded = torch.nn.functional.pad(w, (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
            tiles = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
            low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        else:
            tiles = w.reshape(w.shape[0], -1, args.group_size)
            low, high = tiles.amin(-1), tiles.amax(-1)
        return calculate_qparams(low, high, args)

    def case(form, weights, inputs=None, extra=(), w=None):
        w = weight(len(str(weights)) + weights["num_bits"]) if w is None else w
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
            format=form,
        )
        scale, zero_point = qparams(w, scheme.weights)
        state = {"weight": w, "weight_scale": scale.to(w.dtype), **dict(extra)}
        if not weights.get("symmetric", True):
            state["weight_zero_point"] = zero_point
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        opened = compressor.decompress(dict(stored), scheme)
        body = json.loads(scheme.model_dump_json())
        return {**stored, "expected": opened["weight"]}, {"config_groups": {"group_0": body}, "format": form}

    cases = {}
    for bits in (2, 3, 4, 5, 8):
        for symmetric in (True, False):
            weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
            cases[f"pack-w{bits}-{'sym' if symmetric else 'asym'}"] = case("pack-quantized", weights)
    channel = {"num_bits": 4, "symmetric": True, "strategy": "channel"}
    cases["pack-w4-channel-bf16"] = case("pack-quantized", channel, w=weight(1, torch.bfloat16))
    cases["pack-w3-ragged"] = case("pack-quantized", channel | {"num_bits": 3}, w=weight(2, shape=(19, 40)))
    asymmetric = channel | {"symmetric": False}
    cases["pack-w4-channel-asym-ragged"] = case("pack-quantized", asymmetric, w=weight(3, shape=(19, 40)))
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    cases["int8-dynamic"] = case("int-quantized", int8, token)
    static = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    given = {"input_scale": torch.tensor([0.03]).half(), "input_zero_point": torch.tensor([-5], dtype=torch.int8)}
    cases["int8-asym-static"] = case("int-quantized", int8 | {"symmetric": False}, static, given)
    cases["int8-tensor"] = case("int-quantized", int8 | {"strategy": "tensor"}, token)
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    cases["fp8-dynamic"] = case("float-quantized", fp8, token | {"type": "float"})
    static = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    given = {"input_scale": torch.tensor([0.03]).half()}
    cases["fp8-tensor-static"] = case("float-quantized", fp8 | {"strategy": "tensor"}, static, given)
    block = fp8 | {"strategy": "block", "block_structure": [16, 16]}
    group = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 16, "dynamic": True}
    cases["fp8-block"] = case("float-quantized", block, group)
    cases["fp8-block-ragged"] = case("float-quantized", block, group, w=weight(4, shape=(24, 40)))
    cases["nvfp4"] = nvfp4_case(BaseCompressor, QuantizationArgs, QuantizationScheme)
    cases["mxfp4"] = mxfp4_case(BaseCompressor, QuantizationArgs, QuantizationScheme)
    return cases, ["compressed-tensors", "torch"]


def nvfp4_case(compressors, args, schemes):
    w = weight(5)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    scheme = schemes(targets=["Linear"], weights=args(**weights), format="nvfp4-pack-quantized")
    overall = 448 * 6 / w.abs().max().float().reshape(1)
    scale = (w.float().reshape(OUT, -1, 16).abs().amax(-1) / 6 * overall).to(torch.float8_e4m3fn).float()
    state = {"weight": w, "weight_scale": scale, "weight_global_scale": overall}
    compressor = compressors.get_value_from_registry("nvfp4-pack-quantized")
    stored = compressor.compress(state, scheme)
    opened = compressor.decompress(dict(stored), scheme)
    body = json.loads(scheme.model_dump_json())
    return {**stored, "expected": opened["weight"]}, {"config_groups": {"group_0": body}, "format": scheme.format}


def mxfp4_case(compressors, args, schemes):
    w = weight(6)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = schemes(targets=["Linear"], weights=args(**weights), format="mxfp4-pack-quantized")
    scale = torch.exp2(torch.floor(torch.log2(w.float().reshape(OUT, -1, 32).abs().amax(-1))) - 2)
    compressor = compressors.get_value_from_registry("mxfp4-pack-quantized")
    stored = compressor.compress({"weight": w, "weight_scale": scale}, scheme)
    opened = compressor.decompress(dict(stored), scheme)
    body = json.loads(scheme.model_dump_json())
    return {**stored, "expected": opened["weight"]}, {"config_groups": {"group_0": body}, "format": scheme.format}


def old_compressed_tensors_cases():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor = BaseCompressor.load_from_registry("pack-quantized", config=None)
    cases = {}
    loose = ((3, True, None), (3, False, None), (5, True, None))
    for bits, symmetric, order in (*loose, (4, True, "group"), (4, False, "group")):
        weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
        weights["actorder"] = order
        args, w = QuantizationArgs(**weights), weight(10 + bits)
        scale, zero_point = grid(w, bits, GROUP, symmetric)
        state = {"scale": scale.half(), "zero_point": (zero_point - 2 ** (bits - 1)).to(torch.int8)}
        g_idx = None
        if order:
            shuffled = torch.randperm(IN, generator=torch.Generator().manual_seed(bits))
            g_idx = (shuffled // GROUP).to(torch.int32)
        stored = compressor.compress_weight(weight=w, quantization_args=args, g_idx=g_idx, **state)
        if symmetric:
            stored.pop("weight_zero_point", None)
        stored["weight_scale"] = state["scale"]
        if g_idx is not None:
            stored["weight_g_idx"] = g_idx
        codes = unpack_from_int32(stored["weight_packed"], bits, stored["weight_shape"])
        zeros = None if symmetric else unpack_from_int32(stored["weight_zero_point"], bits, state["scale"].shape, 0)
        expected = dequantize(codes, state["scale"], zeros, args, g_idx=g_idx)
        body = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json()), "input_activations": None}
        name = f"old-w{bits}-{'sym' if symmetric else 'asym'}{'-order' if order else ''}"
        config = {"config_groups": {"group_0": body}, "format": "pack-quantized"}
        cases[name] = ({**stored, "expected": expected}, config)
    return cases, ["compressed-tensors", "torch"]


def gptqmodel_cases():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases = {}
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for order in (False, True):
                linear = torch.nn.Linear(IN, OUT, bias=False)
                linear.weight.data = weight(20 + bits, torch.float32)
                scale, zero = grid(linear.weight.data, bits, GROUP, symmetric)
                scale = scale.half().float()
                g_idx = torch.arange(IN) // GROUP
                if order:
                    g_idx = g_idx[torch.randperm(IN, generator=torch.Generator().manual_seed(bits))]
                shape = {"in_features": IN, "out_features": OUT}
                layer = TorchLinear(bits=bits, group_size=GROUP, sym=symmetric, desc_act=order, **shape, bias=False)
                layer.pack(linear, scale, zero, g_idx.to(torch.int32))
                layer.post_init()
                expected = layer.dequantize_weight().T.contiguous().half()
                names = ("qweight", "qzeros", "scales", "g_idx")
                name = f"gptq-w{bits}-{'sym' if symmetric else 'asym'}{'-order' if order else ''}"
                stored = {key: getattr(layer, key).clone() for key in names}
                cases[f"{name}-v2"] = ({**stored, "expected": expected}, {"checkpoint_format": "gptq_v2"})
                if not order:
                    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=symmetric, desc_act=order)
                    convert_gptq_v2_to_v1_format_module(layer, config)
                    stored = {key: getattr(layer, key).clone() for key in names}
                    cases[f"{name}-v1"] = ({**stored, "expected": expected.clone()}, {"checkpoint_format": "gptq"})
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight(40)
    scale, zero = grid(linear.weight.data, 4, GROUP, symmetric=False)
    shape = {"in_features": IN, "out_features": OUT}
    layer = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, **shape, bias=False)
    layer.pack(linear, scale.half(), zero)
    stored = {key: getattr(layer, key).clone() for key in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(*stored.values(), 4, GROUP).T.contiguous()
    cases["awq-w4"] = ({**stored, "expected": expected}, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    for _, config in cases.values():
        config.setdefault("quant_method", "gptq")
    return cases, ["gptqmodel", "torch"]


def bitsandbytes_cases():
    import bitsandbytes.functional as bnb

    cases = {}
    for nested in (False, True):
        w = weight(50 + nested, shape=(16, 128))
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        stored = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
        cases[f"nf4{'-nested' if nested else ''}"] = ({**stored, "expected": bnb.dequantize_4bit(packed, state)}, {})
    w = weight(52)
    codes, channel, _ = bnb.int8_vectorwise_quant(w)
    stored = {"weight": codes, "SCB": channel}
    cases["int8"] = ({**stored, "expected": bnb.int8_vectorwise_dequant(codes, channel).float()}, {})
    return cases, ["bitsandbytes", "torch"]


def llmcompressor_models(folder):
    """A Llama of one layer, by GPTQ with act-order to 4 bits, and calibrated to static float8."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    tokens = torch.randint(0, 32, (8, 32)).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 32] * 8})
    int4 = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "actorder": "weight",
    }
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    given = {"ignore": ["lm_head"]}
    group = {"group_0": {"targets": ["Linear"], "weights": fp8, "input_activations": fp8 | {"dynamic": False}}}
    recipes = {
        "gptq-w4": GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": int4}}, **given),
        "fp8-static": QuantizationModifier(config_groups=group, **given),
    }
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(32)}, unk_token="t0"))
    processor = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0")
    with tempfile.TemporaryDirectory() as scratch:  # it wants a model that was loaded from somewhere
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).half().save_pretrained(scratch)
        processor.save_pretrained(scratch)
        for name, recipe in recipes.items():
            target = folder / f"llmcompressor-{name}"
            model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float16)
            options = {"num_calibration_samples": 8, "max_seq_length": 32, "processor": processor}
            oneshot(model=model, dataset=data, recipe=recipe, **options)
            model.save_pretrained(target, save_compressed=True)
            for extra in ("generation_config.json", "recipe.yaml"):
                (target / extra).unlink(missing_ok=True)
            opened = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float16)
            opened(torch.tensor(tokens))  # decompresses
            expected = {key: value.contiguous() for key, value in opened.state_dict().items() if "proj.weight" in key}
            save_file({key: value for key, value in expected.items() if key.endswith("weight")}, target / EXPECTED)


MAKERS = {
    "compressed-tensors": compressed_tensors_cases,
    "compressed-tensors-0.12": old_compressed_tensors_cases,
    "gptqmodel": gptqmodel_cases,
    "bitsandbytes": bitsandbytes_cases,
}


def main(maker, folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if maker == "llmcompressor":
        llmcompressor_models(folder)
        return
    cases, packages = MAKERS[maker]()
    tensors = {f"{case}/{key}": value.contiguous() for case, (held, _) in cases.items() for key, value in held.items()}
    save_file(tensors, folder / f"{maker}.safetensors")
    versions = {package: importlib.metadata.version(package) for package in packages}
    content = {"versions": versions, "cases": {case: config for case, (_, config) in cases.items()}}
    (folder / f"{maker}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
