"""Which module of a Hugging Face checkpoint is which parameter: small tables, readable both ways.

A table is a tuple of `Module`s. To read another architecture, pass a table of your own, or add to one of these:
`(*LLAMA, Module("model.layers.{i}.extra", "layers_{i}/extra", "linear"))`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

Config = Mapping[str, Any]
Kind = Literal["linear", "embedding", "norm", "scales"]
# tensors that repeat what the config says
DERIVED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")


@dataclasses.dataclass(frozen=True)
class Module:
    """One line of a table.

    Attributes:
        hf: the module's name there; `{name}` stands for one part between dots, or a piece of it.
        path: our path, with the same placeholders.
        kind: `"linear"` (`weight` [out, in] is our `kernel` [in, out]; `bias`), `"embedding"` (`weight` is
            `embedding`), `"norm"` (`weight` is `scale`; `bias`) or `"scales"` (key and value scales of a cache).
        stack: a placeholder of `hf` over whose numbers we stack along a new first axis: lists of experts.
        parts: a fused module's parts: for each value of the placeholder `{part}` of `path`, how many outputs it takes.
        optional: whether a layer may lack it.

    >>> Module("model.layers.{i}.mlp.{x}_proj", "layers_{i}/mlp/{x}_proj", "linear").match("model.layers.3.mlp.up_proj")
    {'i': '3', 'x': 'up'}
    """

    hf: str
    path: str
    kind: Kind
    stack: str | None = None
    parts: Mapping[str, Callable[[Config], int]] | None = None
    optional: bool = False

    def match(self, module: str) -> dict[str, str] | None:
        """The placeholders' values if the line speaks of a Hugging Face module."""
        found = re.fullmatch(_pattern(self.hf, r"[^.]+?"), module)
        return None if found is None else found.groupdict()

    def match_path(self, path: str) -> dict[str, str] | None:
        """The placeholders' values if the line speaks of one of our module paths."""
        found = re.fullmatch(_pattern(self.path, r"[^/]+?"), path)
        return None if found is None else found.groupdict()


def _pattern(template: str, value: str) -> str:
    pieces = re.split(r"\{(\w+)\}", template)
    numbered = {"i": r"\d+", "e": r"\d+"}
    return "".join(
        re.escape(piece) if place % 2 == 0 else f"(?P<{piece}>{numbered.get(piece, value)})"
        for place, piece in enumerate(pieces)
    )


def heads(name: str) -> Callable[[Config], int]:
    """How many outputs the heads counted by a config field have together."""

    def outputs(config: Config) -> int:
        size = config.get("head_dim") or _number(config, "hidden_size") // _number(config, "num_attention_heads")
        return size * _number(config, name)

    return outputs


def field(name: str) -> Callable[[Config], int]:
    """The value of a config field."""
    return lambda config: _number(config, name)


def _number(config: Config, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name} is {value!r}; a positive number is needed")
    return value


_EMBEDDING = Module("model.embed_tokens", "embed_tokens", "embedding")
_ATTENTION = (
    Module("model.layers.{i}.self_attn.{x}_proj", "layers_{i}/self_attn/{x}_proj", "linear"),
    Module("model.layers.{i}.self_attn.{x}_norm", "layers_{i}/self_attn/{x}_norm", "norm"),
    Module("model.layers.{i}.self_attn", "layers_{i}/self_attn", "scales", optional=True),
    Module("model.layers.{i}.{x}_layernorm", "layers_{i}/{x}_layernorm", "norm"),
)
_TOP = (Module("model.norm", "norm", "norm"), Module("lm_head", "lm_head", "linear"))
_MLP = Module("model.layers.{i}.mlp.{x}_proj", "layers_{i}/mlp/{x}_proj", "linear")

LLAMA = (_EMBEDDING, *_ATTENTION, _MLP, *_TOP)
MIXTRAL = (
    _EMBEDDING,
    *_ATTENTION,
    Module("model.layers.{i}.block_sparse_moe.gate", "layers_{i}/moe/router", "linear"),
    Module("model.layers.{i}.block_sparse_moe.experts.{e}.{x}", "layers_{i}/moe/{x}", "linear", stack="e"),
    *_TOP,
)
QWEN3_MOE = (
    _EMBEDDING,
    *_ATTENTION,
    Module("model.layers.{i}.mlp.gate", "layers_{i}/moe/router", "linear"),
    Module("model.layers.{i}.mlp.experts.{e}.{x}_proj", "layers_{i}/moe/{x}_proj", "linear", stack="e"),
    *_TOP,
)
PHI3 = (
    _EMBEDDING,
    Module(
        "model.layers.{i}.self_attn.qkv_proj",
        "layers_{i}/self_attn/{part}",
        "linear",
        parts={
            "q_proj": heads("num_attention_heads"),
            "k_proj": heads("num_key_value_heads"),
            "v_proj": heads("num_key_value_heads"),
        },
    ),
    *_ATTENTION,
    Module(
        "model.layers.{i}.mlp.gate_up_proj",
        "layers_{i}/mlp/{part}",
        "linear",
        parts={"gate_proj": field("intermediate_size"), "up_proj": field("intermediate_size")},
    ),
    _MLP,
    *_TOP,
)
TABLES: dict[str, tuple[Module, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "phi3": PHI3,
}
_LEAVES = {
    "linear": {"weight": "kernel"},
    "embedding": {"weight": "embedding"},
    "norm": {"weight": "scale"},
    "scales": {},
}


def leaf_name(kind: Kind, suffix: str) -> str:
    """Our name of a float tensor of a module.

    >>> leaf_name("linear", "weight"), leaf_name("linear", "bias")
    ('kernel', 'bias')
    """
    return _LEAVES[kind].get(suffix, suffix)


def suffix_name(kind: Kind, leaf: str) -> str:
    """Undoes `leaf_name`."""
    return {ours: theirs for theirs, ours in _LEAVES[kind].items()}.get(leaf, leaf)


def table_of(config: Config, modules: tuple[Module, ...] | None) -> tuple[Module, ...]:
    """The caller's table, or that of the config's `model_type`.

    Raises:
        NotImplementedError: there is none for it.
    """
    if modules is not None:
        return modules
    model_type = config.get("model_type")
    if model_type not in TABLES:
        known = ", ".join(TABLES)
        raise NotImplementedError(f"model_type {model_type!r}: known are {known}; pass modules=, a table of your own")
    return TABLES[model_type]


def find_module(table: tuple[Module, ...], module: str) -> tuple[Module, dict[str, str]] | None:
    """The first line that speaks of a Hugging Face module, and its placeholders' values."""
    for line in table:
        if (values := line.match(module)) is not None:
            return line, values
    return None


def find_path(table: tuple[Module, ...], path: str) -> tuple[Module, dict[str, str]] | None:
    """The first line that speaks of one of our module paths, and its placeholders' values."""
    for line in table:
        values = line.match_path(path)
        if values is not None and (line.parts is None or values["part"] in line.parts):
            return line, values
    return None


def missing_modules(
    table: tuple[Module, ...], found: list[tuple[Module, dict[str, str]]], config: Config
) -> Iterator[str]:
    """Names the modules that the table and the other layers lead one to expect and that are not there.

    Args:
        table: the architecture's.
        found: the modules that are there.
        config: counts the layers and says whether the head is tied.

    Yields:
        Hugging Face names.
    """
    layers = config.get("num_hidden_layers")
    there = {line.hf.format(**values) for line, values in found}
    for line in table:
        tied = line.hf == "lm_head" and config.get("tie_word_embeddings", False)
        if "{" not in line.hf and not tied and not line.optional and line.hf not in there:
            yield line.hf
    others = {(line.hf, *sorted(rest(values))) for line, values in found if "i" in values and not line.optional}
    for template, *values in sorted(others):
        for layer in range(layers if type(layers) is int else 0):
            name = template.format(i=layer, **dict(values))
            if name not in there:
                yield name


def rest(values: dict[str, str]) -> list[tuple[str, str]]:
    """The placeholders other than the layer's number."""
    return [(name, value) for name, value in values.items() if name != "i"]
