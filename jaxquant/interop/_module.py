"""`Module`: one line of a table of names, and looking modules up in such a table."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

Config = Mapping[str, Any]
Kind = Literal["linear", "embedding", "norm", "scales"]

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}", re.ASCII)
_LEAVES = {
    "linear": {"weight": "kernel"},
    "embedding": {"weight": "embedding"},
    "norm": {"weight": "scale"},
    "scales": {},
}


@dataclasses.dataclass(frozen=True)
class Module:
    """One line of a table.

    Attributes:
        hf: the module's name there; `{name}` stands for one part between dots, or a piece of it.
        path: our path, with the same placeholders.
        kind: `"linear"` (`weight` [out, in] is our `kernel` [in, out]; `bias`), `"embedding"` (`weight` is
            `embedding`), `"norm"` (`weight` is `scale`; `bias`) or `"scales"` (key and value scales of a cache).
        stack: a placeholder of `hf` over whose numbers we stack along a new first axis: lists of experts.
        parts: a fused module's parts: for each value of the placeholder `{part}` of `path`, how many outputs it takes,
            as a product of numbers and fields of config.json: `"num_key_value_heads * head_dim"`.
        optional: whether a layer may lack it.

    Raises:
        ValueError: a field is not of that form, or `hf` and `path` have different placeholders.

    >>> Module("model.layers.{i}.mlp.{x}_proj", "layers_{i}/mlp/{x}_proj", "linear").match("model.layers.3.mlp.up_proj")
    {'i': '3', 'x': 'up'}
    """

    hf: str
    path: str
    kind: Kind
    stack: str | None = None
    parts: Mapping[str, str] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        texts = [self.hf, self.path, *(self.parts or {"": ""}), *(self.parts or {}).values()]
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.optional, bool):
            raise ValueError("hf, path and parts are text, optional is true or false")
        if self.kind not in Kind.__args__:
            raise ValueError(f"kind {self.kind!r}; accepted: {', '.join(Kind.__args__)}")
        for template in (self.hf, self.path):
            if {*"{}"} & {*_PLACEHOLDER.sub("", template)}:
                raise ValueError(f"{template}: braces go round the name of a placeholder")
        theirs, ours = (_PLACEHOLDER.findall(template) for template in (self.hf, self.path))
        expected = [name for name in theirs if name != self.stack] + ["part"] * bool(self.parts)
        if len({*theirs}) < len(theirs) or sorted(ours) != sorted(expected):
            raise ValueError(f"{self.path} has the placeholders {ours}, where {self.hf} asks for {expected}")
        if self.stack is not None and self.stack not in theirs:
            raise ValueError(f"stack {self.stack!r} is no placeholder of {self.hf}")

    def match(self, module: str) -> dict[str, str] | None:
        """The placeholders' values if the line speaks of a Hugging Face module."""
        found = re.fullmatch(_pattern(self.hf, r"[^.]+?", self.stack), module)
        return None if found is None else found.groupdict()

    def match_path(self, path: str) -> dict[str, str] | None:
        """The placeholders' values if the line speaks of one of our module paths."""
        found = re.fullmatch(_pattern(self.path, r"[^/]+?", self.stack), path)
        return None if found is None else found.groupdict()


def _pattern(template: str, value: str, stack: str | None) -> str:
    """The template as a regular expression: layers and what is stacked are numbers, other placeholders are values."""
    numbered = dict.fromkeys(("i", "e", stack), r"\d+")
    return "".join(
        re.escape(piece) if place % 2 == 0 else f"(?P<{piece}>{numbered.get(piece, value)})"
        for place, piece in enumerate(_PLACEHOLDER.split(template))
    )


def count_outputs(size: str, config: Config) -> int:
    """The value of a product of numbers and fields of a config.json.

    Args:
        size: factors separated by `*`; a `head_dim` that is not in the config is the hidden size over the heads.
        config: the config.json.

    Returns:
        The product.

    Raises:
        ValueError: a field is missing or no positive integer.

    >>> count_outputs("2 * intermediate_size", {"intermediate_size": 96})
    192
    """
    return math.prod(int(factor) if factor.isdecimal() else _number(config, factor) for factor in size.split(" * "))


def _number(config: Config, name: str) -> int:
    if name == "head_dim" and config.get(name) is None:
        return _number(config, "hidden_size") // _number(config, "num_attention_heads")
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name} is {value!r}; a positive number is needed")
    return value


def leaf_name(kind: Kind, suffix: str) -> str:
    """Our name of a float tensor of a module.

    >>> leaf_name("linear", "weight"), leaf_name("linear", "bias")
    ('kernel', 'bias')
    """
    return _LEAVES[kind].get(suffix, suffix)


def suffix_name(kind: Kind, leaf: str) -> str:
    """Undoes `leaf_name`."""
    return {ours: theirs for theirs, ours in _LEAVES[kind].items()}.get(leaf, leaf)


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


def rest(values: dict[str, str]) -> list[tuple[str, str]]:
    """The placeholders other than the layer's number."""
    return [(name, value) for name, value in values.items() if name != "i"]
