"""Which module of a Hugging Face checkpoint is which parameter: small tables, readable both ways.

A table is a tuple of `Module`s. To read another architecture, pass a table of your own, or add to one of these:
`(*LLAMA, Module("model.layers.{i}.extra", "layers_{i}/extra", "linear"))`; in a file, see `read_table`.
"""

import pathlib
import re
from collections.abc import Iterator

from jaxquant.interop._module import Config, Module, rest
from jaxquant.storage._json import read_json

# tensors that repeat what the config says
DERIVED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")


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
            "q_proj": "num_attention_heads * head_dim",
            "k_proj": "num_key_value_heads * head_dim",
            "v_proj": "num_key_value_heads * head_dim",
        },
    ),
    *_ATTENTION,
    Module(
        "model.layers.{i}.mlp.gate_up_proj",
        "layers_{i}/mlp/{part}",
        "linear",
        parts={"gate_proj": "intermediate_size", "up_proj": "intermediate_size"},
    ),
    _MLP,
    *_TOP,
)
TABLES: dict[str, tuple[Module, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "phi3": PHI3,
}
TIED = {"gemma", "gemma2", "gemma3_text"}  # whose head is the embedding unless their config.json says otherwise


def is_tied(config: Config) -> bool:
    """Whether the head is the embedding.

    >>> is_tied({"model_type": "gemma2"}), is_tied({"model_type": "llama"})
    (True, False)
    """
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED))


def table_of(config: Config, modules: tuple[Module, ...] | None) -> tuple[Module, ...]:
    """The caller's table, or that of the config's `model_type`.

    Raises:
        NotImplementedError: there is none for it.
    """
    if modules is not None:
        return modules
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TABLES:
        known = ", ".join(TABLES)
        raise NotImplementedError(f"model_type {model_type!r}: known are {known}; pass modules=, a table of your own")
    return TABLES[model_type]


def read_table(file: pathlib.Path) -> tuple[Module, ...]:
    """Reads a table from a JSON file.

    The file holds `{"base": "llama", "modules": [{"hf": ..., "path": ..., "kind": ...}, ...]}`: lines with the fields
    of `Module`. They come before those of `base`, the table of a known `model_type`, and in place of those with the
    same `hf`; without a base they stand alone.

    Args:
        file: the file.

    Returns:
        The table.

    Raises:
        ValueError: it is no such file; the message names the line.
    """
    content = read_json(file)
    base, lines = content.get("base"), content.get("modules")
    if content.keys() - {"base", "modules"} or not isinstance(lines, list):
        raise ValueError(f'{file}: {{"base": model_type or null, "modules": [...]}} is needed, got {sorted(content)}')
    if base is not None and (not isinstance(base, str) or base not in TABLES):
        raise ValueError(f"{file}: base {base!r}; accepted: null, {', '.join(TABLES)}")
    table = []
    for number, line in enumerate(lines):
        try:
            table.append(Module(**line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: modules[{number}] {str(line)[:120]}: {error}") from error
    replaced = {line.hf for line in table}
    return (*table, *(line for line in (TABLES[base] if base is not None else ()) if line.hf not in replaced))


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
        tied = line.hf == "lm_head" and is_tied(config)
        if "{" not in line.hf and not tied and not line.optional and line.hf not in there:
            yield line.hf
    others = {(line.hf, *sorted(rest(values))) for line, values in found if "i" in values and not line.optional}
    for template, *values in sorted(others):
        for layer in range(layers if type(layers) is int else 0):
            name = template.format(i=layer, **dict(values))
            if name not in there:
                yield name
