"""What to quantize and how: frozen, validated configurations.

`Granularity` says which elements share a scale, `TensorSpec` how one tensor is quantized, `QuantSpec` joins weight and
activation, `Rule` binds a spec to parameter paths, and `QuantConfig` is the whole order, with presets.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jaxquant.arrays._qtypes import QType, get_qtype

if TYPE_CHECKING:
    from jaxquant.algorithms._transform import WeightTransform

RangeMethod = Literal["absmax", "minmax", "moving_average", "percentile", "kl", "mse", "admm", "cosine"]
Grid = Literal["full", "restricted", "power", "signed"]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole matrix.

    The matrix begins at the first contracting axis: each index of the axes before it (layers of a stack, experts, the
    rows of an embedding that contracts its last axis) has a scale of its own, as a scan may slice them.
    """


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel of a weight: shared along its contracting axis.

    For a static activation, one for each input channel; the weight's rows are multiplied by it before they are rounded.
    """


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One scale for each row of an activation; for activations only."""


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale for each `size` neighbours along the contracting axis, in each output channel.

    Attributes:
        size: elements a group.
    """

    size: int = 128

    def __post_init__(self) -> None:
        """Checks the size."""
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"PerGroup: size must be a positive int, got {self.size!r}")


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for each block of the matrix (DeepSeek's 128 x 128 form).

    Attributes:
        shape: (elements along the contracting axis, elements along the last output axis behind it).
    """

    shape: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        """Checks the shape."""
        if len(self.shape) != 2 or not all(isinstance(size, int) and size > 0 for size in self.shape):
            raise ValueError(f"PerBlock: shape must be two positive ints, got {self.shape!r}")


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        qtype: the number format, one of `jaxquant.arrays._qtypes.QTYPES`; `"uint4"` and its like take a zero point.
        granularity: which elements share a scale.
        range: how the scale is found. `"absmax"` and `"minmax"` need the tensor only, `"mse"` searches shrunken ranges
            for the least |error|^2.4, `"percentile"` cuts the tails; the rest are for calibrated activations.
        grid: the symmetric integer grid of b bits. `"full"`: scale = 2 absmax / (2^b - 1), all levels used (GPTQ,
            llm-compressor). `"restricted"`: absmax / (2^(b-1) - 1). `"power"`: absmax / 2^(b-1). `"signed"`: the scale
            may be negative, so that the element of largest magnitude sits on -2^(b-1) exactly.
        scale_dtype: dtype the scale is stored in; codes are chosen for the rounded scale.
        static: for activations: the scale comes from calibration instead of from each input.
        percentile: the part of |w| kept by `range="percentile"`, in percent.
        pad: pads the contracting axis to whole groups with zeros, exactly undone on use.

    >>> TensorSpec("int4", PerGroup(64)).symmetric
    True
    """

    qtype: str = "int8"
    granularity: Granularity = PerChannel()
    range: RangeMethod = "absmax"
    grid: Grid = "full"
    scale_dtype: str = "float32"
    static: bool = False
    percentile: float = 99.9
    pad: bool = False

    def __post_init__(self) -> None:
        """Checks every field against the others."""
        qtype = get_qtype(self.qtype)
        accepted = RangeMethod.__args__
        if self.range not in accepted:
            raise ValueError(f"TensorSpec: range {self.range!r} is not known; accepted: {', '.join(accepted)}")
        if self.grid not in Grid.__args__:
            raise ValueError(f"TensorSpec: grid {self.grid!r} is not known; accepted: {', '.join(Grid.__args__)}")
        if not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"TensorSpec: granularity must be one of PerTensor() ... PerBlock(), got {self.granularity!r}"
            )
        if self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"TensorSpec: scale_dtype {self.scale_dtype!r}; accepted: float32, bfloat16, float16")
        if self.grid == "signed" and qtype.kind != "int":
            raise ValueError(f"TensorSpec: grid='signed' needs a signed integer qtype, got {self.qtype!r}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"TensorSpec: percentile must lie in (0, 100], got {self.percentile!r}")

    def __str__(self) -> str:
        """Format and granularity."""
        return f"{self.qtype} {self.granularity}"

    @property
    def format(self) -> QType:
        """The number format looked up."""
        return get_qtype(self.qtype)

    @property
    def symmetric(self) -> bool:
        """Whether zero is code zero, with no zero point."""
        return self.format.kind != "uint"


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a weight is quantized, and the activation that meets it.

    Attributes:
        weight: the weight's spec.
        activation: the activation's spec, or None to keep it in float.

    >>> QuantSpec(TensorSpec("int8"), TensorSpec("int8", PerToken())).activation.qtype
    'int8'
    """

    weight: TensorSpec
    activation: TensorSpec | None = None

    def __post_init__(self) -> None:
        """Checks that both sides can meet in one product."""
        for side, spec in (("weight", self.weight), ("activation", self.activation)):
            if not isinstance(spec, TensorSpec) and not (spec is None and side == "activation"):
                raise TypeError(f"QuantSpec: {side} must be a TensorSpec, got {spec!r}")
        if isinstance(self.weight.granularity, PerToken):
            raise ValueError("QuantSpec: PerToken() is for activations; a weight takes PerChannel() or PerGroup(size)")
        activation = self.activation
        if activation is None:
            return
        by_channel = isinstance(activation.granularity, PerChannel)
        if by_channel and not (activation.static and activation.symmetric):
            raise ValueError(
                "QuantSpec: an activation of PerChannel() takes static=True and a symmetric format, as its scales go"
                f" into the weight's rows; got static={activation.static}, {activation.qtype!r}"
            )
        if not by_channel and not isinstance(activation.granularity, PerTensor | PerToken | PerGroup):
            raise ValueError(
                "QuantSpec: activations take PerTensor(), PerToken(), PerGroup(size) or, where static, PerChannel(),"
                f" got {activation.granularity}: other scales cannot be divided out of a sum"
            )
        weight = self.weight.format
        if activation.format.packed or activation.format.kind == "table" or activation.format.bits > 8:
            raise ValueError(f"QuantSpec: activation qtype {activation.qtype!r}; accepted: int8, uint8 and the float8s")
        if activation.format.is_integer and (weight.kind == "table" or weight.bits > 8):
            raise ValueError(
                f"QuantSpec: weight {self.weight.qtype} and activation {activation.qtype} share no integer product;"
                " leave the activation in float, or take a weight of at most eight integer bits"
            )
        if not weight.packed and (activation.format.kind == "float") != (weight.kind == "float"):
            raise ValueError(
                f"QuantSpec: weight {self.weight.qtype} and activation {activation.qtype} share no product;"
                " take integers on both sides or float8 on both"
            )

    def __str__(self) -> str:
        """The weight's format, and the activation's."""
        return str(self.weight) if self.activation is None else f"{self.weight}, activation {self.activation}"


def _check_pattern(pattern: str, what: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what} {pattern!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class Rule:
    """Binds a spec to the parameters whose "/"-joined path matches.

    Attributes:
        pattern: a regular expression, matched whole (`re.fullmatch`).
        spec: how to quantize them, or None to leave them in float.
        axis: the contracting axis or axes, negative; None takes it from the traced program or from Flax's conventions.

    >>> Rule(r".*/attention/.*kernel", None).matches("block_0/attention/query/kernel")
    True
    """

    pattern: str
    spec: QuantSpec | None
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Compiles the pattern and normalises the axes."""
        _check_pattern(self.pattern, "Rule: pattern")
        if not isinstance(self.spec, QuantSpec | None):
            raise TypeError(
                f"Rule({self.pattern!r}): spec must be a QuantSpec or None, got {self.spec!r}"
                " (a preset's is PRESETS[name])"
            )
        if self.axis is not None:
            axes = (self.axis,) if isinstance(self.axis, int) else tuple(sorted(self.axis))
            if not axes or len(set(axes)) < len(axes) or any(axis >= 0 for axis in axes):
                raise ValueError(f"Rule: axes count from the end, so they are negative and distinct; got {self.axis!r}")
            object.__setattr__(self, "axis", axes)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The contracting axes in ascending order, or None."""
        return self.axis if isinstance(self.axis, tuple) or self.axis is None else (self.axis,)

    def matches(self, path: str) -> bool:
        """Whether the rule speaks of `path`."""
        return re.fullmatch(self.pattern, path) is not None


# What a user would be surprised to find quantized: lookups, norms, routers, adapters and the head. First match wins.
DEFAULT_SKIP = (
    r"(.*/)?(bias|b|scale|mean|var|count|gamma|beta)",
    r"(?i)(.*/)?[^/]*(embed|pos_?emb|tok_?emb|norm|ln_|router|lm_head|logits|lora)[^/]*(/.*)?",
    r"(.*/)?(ln|head|wte|wpe|shared_expert_gate)(/.*)?",
    r"(?!.*experts/)(.*/)?gate(/.*)?",  # a router; experts/gate are the experts' own projections
)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """The whole order: which parameters, how, and by which algorithm.

    A leaf is decided by the first that speaks of it: `rules`, then `skip`, then `default`, which takes every floating
    leaf of at least two dimensions.

    Attributes:
        default: the spec of whatever no rule and no skip pattern names, or None to leave it.
        rules: the caller's own rules; one that matches nothing is an error.
        skip: patterns of parameters left in float by default.
        algorithm: how weights are rounded; None is round-to-nearest.

    >>> QuantConfig.preset("w4a16").default.weight.qtype
    'int4'
    """

    default: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    skip: tuple[str, ...] = DEFAULT_SKIP
    algorithm: "WeightTransform | None" = None

    def __post_init__(self) -> None:
        """Freezes the rules and checks the patterns."""
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "skip", tuple(self.skip))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"QuantConfig: rules holds {rule!r}; each must be a jaxquant.Rule")
        if not isinstance(self.default, QuantSpec | None):
            raise TypeError(
                f"QuantConfig: default must be a QuantSpec or None, got {self.default!r}"
                " (a preset's whole configuration is QuantConfig.preset(name))"
            )
        for pattern in self.skip:
            _check_pattern(pattern, "QuantConfig: skip pattern")

    def __str__(self) -> str:
        """A line for each rule, then the default: pattern and format."""
        lines = [(rule.pattern, rule.spec) for rule in self.rules]
        lines += [] if self.default is None else [("default", self.default)]
        lines += [] if self.algorithm is None else [("algorithm", self.algorithm.name)]
        width = max((len(name) for name, _ in lines), default=0)
        return "\n".join(f"{name:<{width}}  {'float' if what is None else what}" for name, what in lines)

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        group_size: int | None = None,
        rules: Sequence[Rule] = (),
        algorithm: "WeightTransform | None" = None,
        pad: bool = False,
    ) -> "QuantConfig":
        """Makes the configuration of a well-known recipe.

        Args:
            name: one of `PRESETS`: `w8a16`, `w4a16`, `w4a16-asym`, `w4a16-channel`, `w3a16`, `w3a16-asym`, `w2a16`,
                `w8a8`, `w8a8-tensor`, `w4a8`, `w4a8-channel`, `fp8`, `nf4`, `mxfp4`.
            group_size: replaces the preset's group size.
            rules: the caller's rules, tried before the defaults.
            algorithm: how weights are rounded; None is round-to-nearest. Range and grid of the weights are those that
                won with it (`WeightTransform.prefers`); the grid only where it is signed and of fewer than 8 bits.
            pad: pad axes that are no whole number of groups.

        Returns:
            The configuration.

        Raises:
            ValueError: an unknown name, or a group size for a preset without groups.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown preset {name!r}{hint}; accepted: {', '.join(PRESETS)}")
        spec = PRESETS[name]
        weight = spec.weight
        if group_size is not None:
            if not isinstance(weight.granularity, PerGroup):
                raise ValueError(f"preset {name!r} has no groups, so group_size={group_size} cannot apply")
            weight = dataclasses.replace(weight, granularity=PerGroup(group_size))
        preferred = dict(algorithm.prefers) if algorithm is not None else {}
        if not (weight.format.kind == "int" and weight.format.bits < 8):
            preferred.pop("grid", None)
        if not weight.format.is_integer:
            preferred.clear()
        weight = dataclasses.replace(weight, pad=pad, **preferred)
        return cls(dataclasses.replace(spec, weight=weight), tuple(rules), algorithm=algorithm)


def _grouped(qtype: str, size: int = 128) -> TensorSpec:
    return TensorSpec(qtype, PerGroup(size), scale_dtype="bfloat16")


_INT8_TOKENS = TensorSpec("int8", PerToken())

PRESETS: dict[str, QuantSpec] = {
    "w8a16": QuantSpec(TensorSpec("int8")),
    "w4a16": QuantSpec(_grouped("int4")),
    "w4a16-asym": QuantSpec(_grouped("uint4")),
    "w4a16-channel": QuantSpec(TensorSpec("int4")),
    "w3a16": QuantSpec(_grouped("int3")),
    "w3a16-asym": QuantSpec(_grouped("uint3")),
    "w2a16": QuantSpec(_grouped("int2", 64)),
    "w8a8": QuantSpec(TensorSpec("int8"), _INT8_TOKENS),
    "w8a8-tensor": QuantSpec(TensorSpec("int8", PerTensor()), TensorSpec("int8", PerTensor())),
    "w4a8": QuantSpec(_grouped("int4"), _INT8_TOKENS),
    "w4a8-channel": QuantSpec(TensorSpec("int4"), _INT8_TOKENS),
    "fp8": QuantSpec(TensorSpec("float8_e4m3fn"), TensorSpec("float8_e4m3fn", PerToken())),
    "nf4": QuantSpec(TensorSpec("nf4", PerGroup(64), scale_dtype="bfloat16")),
    "mxfp4": QuantSpec(TensorSpec("mxfp4", PerGroup(32), scale_dtype="bfloat16")),
}
