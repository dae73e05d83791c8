"""The shape of a Llama-family decoder, dense or with experts, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_MODEL_TYPES = tuple(_ARCHITECTURES)
_MOE_TYPES = ("mixtral", "qwen3_moe")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the rotary frequencies: long wavelengths slow down by `factor`, short ones stay."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """The feed-forward layers of a mixture of experts.

    Attributes:
        count: experts of a layer.
        per_token: how many of them each token goes to.
        intermediate_size: width of one expert.
        normalised: whether the weights of a token's experts add up to one.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool = True

    def __post_init__(self) -> None:
        """Refuses more experts a token than there are."""
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"experts: per_token is {self.per_token}, of {self.count} experts")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Fixes the architecture of a Llama-family decoder.

    Field names are those of a Hugging Face `config.json`, except the features that each `model_type` implies there
    and that are explicit here: `qkv_bias`, `o_bias`, `mlp_bias`, `qk_norm`, `experts` (None where the feed-forward
    layers are dense; `intermediate_size` is the dense layers') and `windows`, which gives for each layer the number of
    tokens that a query sees (itself included), or None for all before it; empty: all in every layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses what no attention layer can be."""
        if self.model_type not in _MODEL_TYPES:
            raise NotImplementedError(f"model_type: got {self.model_type!r}, known are {', '.join(_MODEL_TYPES)}")
        if (self.experts is not None) != (self.model_type in _MOE_TYPES):
            raise ValueError(f"experts: got {self.experts} for {self.model_type}; {', '.join(_MOE_TYPES)} have experts")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"windows: got {len(self.windows)} entries for {self.num_hidden_layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: rotary embeddings need an even one, got {self.head_dim}")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return self.windows or (None,) * self.num_hidden_layers

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> DecoderConfig:
        """Reads a parsed `config.json` (either generation of its rotary fields).

        Raises:
            NotImplementedError: another model type, activation or rotary scaling.
            KeyError: a field that every model of the family states is missing.
        """
        model_type = hf.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise NotImplementedError(f"model_type: got {model_type!r}, known are {', '.join(_MODEL_TYPES)}")
        if hf.get("hidden_act", "silu") != "silu":
            raise NotImplementedError(f"hidden_act: got {hf['hidden_act']!r}, only 'silu' is known")
        theta, scaling = _rope_from_hf(hf)
        heads = hf["num_attention_heads"]
        bias = bool(hf.get("attention_bias", False))
        eos = hf.get("eos_token_id")
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            model_type=model_type,
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            rms_norm_eps=hf["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2" or bias,
            o_bias=bias and model_type in ("llama", "qwen3", "qwen3_moe"),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            experts=_experts_from_hf(hf),
            windows=_windows_from_hf(hf),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json` that `from_hf` reads back as this config."""
        shared = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim model_type max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings bos_token_id "
            "eos_token_id"
        )
        hf = {name: getattr(self, name) for name in shared.split()}
        hf |= {"architectures": [_ARCHITECTURES[self.model_type]], "hidden_act": "silu"}
        hf["rope_scaling"] = None
        if self.rope_scaling is not None:
            hf["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        if self.model_type in ("llama", "qwen3", "qwen3_moe"):
            hf["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            hf["mlp_bias"] = self.mlp_bias
        return hf | _experts_to_hf(self) | _windows_to_hf(self)


def _rope_from_hf(hf: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    rope = {
        "rope_theta": hf.get("rope_theta", 10000.0),
        **(hf.get("rope_scaling") or {}),
        **(hf.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return rope["rope_theta"], None
    if kind != "llama3":
        raise NotImplementedError(f"rope_scaling: got type {kind!r}, known are 'default' and 'llama3'")
    fields = {field.name: rope[field.name] for field in dataclasses.fields(Llama3Scaling)}
    return rope["rope_theta"], Llama3Scaling(**fields)


def _experts_from_hf(hf: dict[str, Any]) -> Experts | None:
    if hf["model_type"] == "mixtral":
        return Experts(hf["num_local_experts"], hf["num_experts_per_tok"], hf["intermediate_size"])
    if hf["model_type"] != "qwen3_moe":
        return None
    if hf.get("decoder_sparse_step", 1) != 1 or hf.get("mlp_only_layers"):
        raise NotImplementedError("decoder_sparse_step, mlp_only_layers: every layer has experts here, or none")
    count = hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"]
    normalised = bool(hf.get("norm_topk_prob", False))
    return Experts(count, hf["num_experts_per_tok"], hf["moe_intermediate_size"], normalised)


def _experts_to_hf(config: DecoderConfig) -> dict[str, Any]:
    if config.experts is None:
        return {}
    experts = config.experts
    if config.model_type == "mixtral":
        if not experts.normalised or experts.intermediate_size != config.intermediate_size:
            raise NotImplementedError(f"experts: a Mixtral's are normalised and of intermediate_size, got {experts}")
        return {"num_local_experts": experts.count, "num_experts_per_tok": experts.per_token}
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _windows_from_hf(hf: dict[str, Any]) -> tuple[int | None, ...]:
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window")
    if window is None or hf["model_type"] == "llama":
        return ()
    if hf["model_type"] in ("mistral", "mixtral"):
        return (window,) * layers
    if not hf.get("use_sliding_window", False):
        return ()
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", layers)
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise NotImplementedError(f"layer_types: got {sorted(unknown)}, known are full_attention and sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
    sizes = sorted({window for window in config.windows if window is not None})
    window = sizes[0] if sizes else None
    if len(sizes) > 1:
        raise NotImplementedError(f"windows: config.json holds one sliding_window for all layers, got {sizes}")
    if config.model_type in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if config.model_type == "llama":
        return {}
    kinds = ["full_attention" if size is None else "sliding_attention" for size in config.layer_windows]
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": kinds}
