"""Specs and configurations: what is accepted, and the words in which the rest is refused."""

import dataclasses

import pytest

from jaxquant.arrays._qtypes import QTYPES
from jaxquant.arrays._spec import (
    PRESETS,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantConfig,
    QuantSpec,
    Rule,
    TensorSpec,
)


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_format_makes_a_spec(qtype):
    spec = TensorSpec(qtype)
    assert spec.format.name == qtype
    assert spec.symmetric == (not qtype.startswith("uint"))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"qtype": "int1"}, ValueError, "unknown qtype 'int1'; accepted: int2"),
        ({"range": "max"}, ValueError, "range 'max' is not known; accepted: absmax, minmax"),
        ({"grid": "half"}, ValueError, "grid 'half' is not known; accepted: full, restricted, power, signed"),
        ({"granularity": PerGroup}, TypeError, "granularity must be one of"),
        ({"granularity": 128}, TypeError, "granularity must be one of .* got 128"),
        ({"scale_dtype": "float64"}, ValueError, "scale_dtype 'float64'; accepted: float32, bfloat16, float16"),
        ({"qtype": "uint4", "grid": "signed"}, ValueError, "needs a signed integer qtype, got 'uint4'"),
        ({"qtype": "nf4", "grid": "signed"}, ValueError, "needs a signed integer qtype, got 'nf4'"),
        ({"percentile": 0.0}, ValueError, r"percentile must lie in \(0, 100\], got 0.0"),
        ({"percentile": 100.5}, ValueError, "got 100.5"),
    ],
)
def test_a_bad_field_of_a_tensor_spec_is_named(fields, error, message):
    with pytest.raises(error, match=message):
        TensorSpec(**fields)


@pytest.mark.parametrize("size", [0, -1, 2.0, "128"])
def test_group_sizes_are_positive_ints(size):
    with pytest.raises(ValueError, match="PerGroup: size must be a positive int"):
        PerGroup(size)
    with pytest.raises(ValueError, match="PerBlock: shape must be two positive ints"):
        PerBlock((size, 128))


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (TensorSpec("int8", PerToken()), None, r"PerToken\(\) is for activations"),
        (TensorSpec("int8"), TensorSpec("int8", PerChannel()), r"an activation of PerChannel\(\) takes static=True"),
        (TensorSpec("int8"), TensorSpec("int8", PerBlock()), "activations take"),
        (TensorSpec("int8"), TensorSpec("int4", PerToken()), "activation qtype 'int4'; accepted: int8"),
        (TensorSpec("int8"), TensorSpec("int16", PerToken()), "activation qtype 'int16'; accepted: int8"),
        (TensorSpec("int8"), TensorSpec("nf4", PerToken()), "activation qtype 'nf4'; accepted: int8"),
        (TensorSpec("int8"), TensorSpec("float8_e4m3fn", PerToken()), "share no product"),
        (TensorSpec("float8_e4m3fn"), TensorSpec("int8", PerToken()), "share no product"),
        (TensorSpec("int16"), TensorSpec("int8", PerToken()), "share no integer product"),
        (TensorSpec("nf4"), TensorSpec("int8", PerToken()), "share no integer product"),
    ],
)
def test_sides_that_cannot_meet_in_a_product_are_refused(weight, activation, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(weight, activation)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("int4", "int8"),
        ("uint4", "int8"),
        ("int8", "uint8"),
        ("int4", "float8_e4m3fn"),
        ("float8_e4m3fn", "float8_e5m2"),
    ],
)
def test_sides_that_meet(weight, activation):
    spec = QuantSpec(TensorSpec(weight), TensorSpec(activation, PerToken()))
    assert spec.activation.qtype == activation


@pytest.mark.parametrize("sides", [("w4a16",), (PRESETS["w8a8"],), (TensorSpec(), "int8"), (None,)])
def test_a_quant_spec_is_made_of_tensor_specs(sides):
    with pytest.raises(TypeError, match="must be a TensorSpec"):
        QuantSpec(*sides)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_equal_hashable_values(name):
    config = QuantConfig.preset(name)
    assert config == QuantConfig.preset(name)
    assert len({config, QuantConfig.preset(name)}) == 1
    assert config.default == PRESETS[name]
    assert config.default.activation is None or "a8" in name or name == "fp8"


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(
        ValueError, match=r"unknown preset 'w4a16_asym' \(did you mean 'w4a16-asym'\?\); accepted: w8a16, "
    ):
        QuantConfig.preset("w4a16_asym")


def test_a_preset_takes_a_group_size_and_padding():
    config = QuantConfig.preset("w4a16", group_size=32, pad=True)
    assert config.default.weight == dataclasses.replace(PRESETS["w4a16"].weight, granularity=PerGroup(32), pad=True)
    with pytest.raises(ValueError, match="preset 'w8a16' has no groups, so group_size=32"):
        QuantConfig.preset("w8a16", group_size=32)


def test_specs_are_frozen():
    for value in (PerTensor(), PerGroup(64), TensorSpec(), PRESETS["w8a8"], Rule("a", None), QuantConfig()):
        field = dataclasses.fields(value)[0].name if dataclasses.fields(value) else "anything"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)


@pytest.mark.parametrize("axis", [0, 1, (-1, 0), (-2, -2), ()])
def test_rule_axes_count_from_the_end(axis):
    with pytest.raises(ValueError, match="axes count from the end"):
        Rule("kernel", None, axis=axis)


def test_rule_axes_are_sorted():
    assert Rule("kernel", None, axis=(-2, -3)).axes == (-3, -2)
    assert Rule("kernel", None, axis=-1).axes == (-1,)
    assert Rule("kernel", None).axes is None


def test_rules_match_whole_paths():
    rule = Rule(r"block_\d+/mlp/.*", None)
    assert rule.matches("block_12/mlp/up/kernel")
    assert not rule.matches("decoder/block_12/mlp/up/kernel")
    assert not rule.matches("block_x/mlp/up/kernel")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule("(", None), ValueError, r"Rule: pattern '\(' is no regular expression"),
        (
            lambda: Rule("kernel", "w4a16"),
            TypeError,
            r"Rule\('kernel'\): spec must be a QuantSpec or None, got 'w4a16'",
        ),
        (lambda: QuantConfig(skip=("[",)), ValueError, r"skip pattern '\[' is no regular expression"),
        (lambda: QuantConfig(rules=("kernel",)), TypeError, "rules holds 'kernel'; each must be a jaxquant.Rule"),
        (lambda: QuantConfig("w4a16"), TypeError, r"default must be a QuantSpec or None, got 'w4a16' .*preset\(name\)"),
    ],
)
def test_a_bad_rule_or_config_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
