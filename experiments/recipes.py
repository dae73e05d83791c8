"""The recipes that the experiments compare, by name."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jaxquant as jq


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to quantize a model.

    Attributes:
        config: the order given to `jq.quantize`, or None for the float model.
        summary: what it is, in a few words.
        calibrated: whether it needs calibration tokens.
        sequential: as `jq.quantize` takes it.
        continued: how many continuations of each calibration sequence, by the float model, calibrate beside it.
        distilled: how many of them, the sequences themselves beside, train codes and scales afterwards; 0: none do.
    """

    config: jq.QuantConfig | None
    summary: str
    calibrated: bool = False
    sequential: bool | None = None
    continued: int = 0
    distilled: int = 0


SIGNED = {"grid": "signed", "range": "mse"}  # what gave GPTQ the least error when tried
RANGE = {"range": "mse"}


COMPENSATED = jq.chain(jq.compensate(strength=0.5, residual=0.5), jq.gptq())
DAMPED = jq.chain(jq.compensate(strength=0.5, residual=0.5), jq.gptq(damping=0.2))  # the best on held-out sequences
LEARNED = jq.chain(DAMPED, jq.learned_rounding())


def _calibrated(
    preset: str,
    algorithm: jq.WeightTransform,
    summary: str,
    weight: Mapping[str, str] = types.MappingProxyType({}),
    **fields: Any,
) -> Recipe:
    """A preset rounded by an algorithm, fields of its weight spec replaced; others of the recipe follow by name."""
    spec = jq.QuantConfig.preset(preset).default
    spec = dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, **weight))
    return Recipe(jq.QuantConfig(spec, algorithm=algorithm), summary, calibrated=True, **fields)


RECIPES: dict[str, Recipe] = {
    "float": Recipe(None, "the checkpoint's own weights"),
    "rtn-w8": Recipe(jq.QuantConfig.preset("w8a16"), "8-bit weights per channel, to nearest"),
    "rtn-w4": Recipe(jq.QuantConfig.preset("w4a16"), "4-bit weights, groups of 128, symmetric, to nearest"),
    "rtn-w4-asym": Recipe(jq.QuantConfig.preset("w4a16-asym"), "4-bit weights, groups of 128, zero points, to nearest"),
    "rtn-w3": Recipe(jq.QuantConfig.preset("w3a16"), "3-bit weights, groups of 128, symmetric, to nearest"),
    "rtn-w3-asym": Recipe(jq.QuantConfig.preset("w3a16-asym"), "3-bit weights, groups of 128, zero points, to nearest"),
    "w8a8": Recipe(jq.QuantConfig.preset("w8a8"), "int8 weights per channel, int8 activations per token, dynamic"),
    "w4a8": Recipe(jq.QuantConfig.preset("w4a8"), "4-bit weights, groups of 128, int8 activations per token, dynamic"),
    "fp8": Recipe(jq.QuantConfig.preset("fp8"), "e4m3 weights per channel, e4m3 activations per token, dynamic"),
    "nf4": Recipe(jq.QuantConfig.preset("nf4"), "NormalFloat4 weights, blocks of 64"),
    "mxfp4": Recipe(jq.QuantConfig.preset("mxfp4"), "OCP MXFP4 weights, blocks of 32"),
    "gptq-w4": _calibrated("w4a16", jq.gptq(), "4-bit weights, groups of 128, signed scales, GPTQ", SIGNED),
    "gptq-w4-asym": _calibrated("w4a16-asym", jq.gptq(), "4-bit weights, groups of 128, zero points, GPTQ", RANGE),
    "gptq-w3": _calibrated("w3a16", jq.gptq(), "3-bit weights, groups of 128, signed scales, GPTQ", SIGNED),
    "gptq-w3-asym": _calibrated("w3a16-asym", jq.gptq(), "3-bit weights, groups of 128, zero points, GPTQ", RANGE),
    "gptq-w4-sequential": _calibrated(
        "w4a16", jq.gptq(), "gptq-w4 on quantized layers' outputs", SIGNED, sequential=True
    ),
    "gptq-w4-compensated": _calibrated("w4a16", COMPENSATED, "the same, making up for what quantization did", SIGNED),
    "gptq-w4-asym-compensated": _calibrated("w4a16-asym", COMPENSATED, "the same with zero points", RANGE),
    "gptq-w3-compensated": _calibrated("w3a16", COMPENSATED, "the same at 3 bits, symmetric", SIGNED),
    "gptq-w3-asym-compensated": _calibrated("w3a16-asym", COMPENSATED, "the same at 3 bits with zero points", RANGE),
    "gptq-w4-damped": _calibrated("w4a16", DAMPED, "gptq-w4-compensated, its Hessian damped by a fifth", SIGNED),
    "gptq-w4-asym-damped": _calibrated("w4a16-asym", DAMPED, "the same with zero points", RANGE),
    "gptq-w3-damped": _calibrated("w3a16", DAMPED, "the same at 3 bits, symmetric", SIGNED),
    "gptq-w3-asym-damped": _calibrated("w3a16-asym", DAMPED, "the same at 3 bits with zero points", RANGE),
    "awq-w4": _calibrated("w4a16", jq.awq(), "4-bit weights, groups of 128, symmetric, AWQ"),
    "awq-w4-asym": _calibrated("w4a16-asym", jq.awq(), "4-bit weights, groups of 128, zero points, AWQ"),
    "awq-w3": _calibrated("w3a16", jq.awq(), "3-bit weights, groups of 128, symmetric, AWQ"),
    "awq-w3-asym": _calibrated("w3a16-asym", jq.awq(), "3-bit weights, groups of 128, zero points, AWQ"),
    "awq-gptq-w4": _calibrated("w4a16", jq.chain(jq.awq(), jq.gptq()), "AWQ's input scales, then GPTQ, 4 bits", SIGNED),
    "awq-gptq-w3": _calibrated("w3a16", jq.chain(jq.awq(), jq.gptq()), "AWQ's input scales, then GPTQ, 3 bits", SIGNED),
    "learned-w4": _calibrated("w4a16", LEARNED, "damped and compensated GPTQ, then learned rounding", SIGNED),
    "learned-w4-asym": _calibrated("w4a16-asym", LEARNED, "the same with zero points", RANGE),
    "learned-w3": _calibrated("w3a16", LEARNED, "the same at 3 bits", SIGNED),
    "learned-w3-asym": _calibrated("w3a16-asym", LEARNED, "the same at 3 bits with zero points", RANGE),
    "smoothquant-w8a8": _calibrated("w8a8", jq.smoothquant(), "w8a8 with activation outliers moved into weights"),
    "gptq-w4a8": _calibrated("w4a8", jq.gptq(), "w4a8 with GPTQ", SIGNED),
    "llm-int8": _calibrated("w8a8", jq.llm_int8(), "w8a8 with outlier channels in float"),
    "salient-w4": _calibrated("w4a16", jq.salient(), "4-bit weights, 1 % of the input channels in float"),
    "salient-w3": _calibrated("w3a16", jq.salient(), "3-bit weights, 1 % of the input channels in float"),
}


FORMS = {
    "w4": ("w4a16", SIGNED),
    "w4-asym": ("w4a16-asym", RANGE),
    "w3": ("w3a16", SIGNED),
    "w3-asym": ("w3a16-asym", RANGE),
}
WITH_TEXT = "gptq-{}-damped, the model's own continuations of the text beside"
DISTILLED = "gptq-{}-continued, then codes and scales trained towards the model's outputs"
for _form, (_preset, _weight) in FORMS.items():
    RECIPES[f"gptq-{_form}-continued"] = _calibrated(_preset, DAMPED, WITH_TEXT.format(_form), _weight, continued=2)
    RECIPES[f"distilled-{_form}"] = _calibrated(
        _preset, DAMPED, DISTILLED.format(_form), _weight, continued=2, distilled=20
    )


def get_recipes(names: str) -> dict[str, Recipe]:
    """Looks a comma-separated list of recipe names up.

    Args:
        names: for example `"float,rtn-w4"`.

    Returns:
        The recipes in the order named.

    Raises:
        ValueError: an unknown or repeated name; the message lists those there are.

    >>> list(get_recipes("float,rtn-w4"))
    ['float', 'rtn-w4']
    """
    listed = [name.strip() for name in names.split(",")]
    unknown = [name for name in listed if name not in RECIPES]
    if unknown or len(set(listed)) < len(listed):
        what = f"unknown recipes {unknown}" if unknown else f"recipes named twice in {names!r}"
        raise ValueError(f"{what}; there are: {', '.join(RECIPES)}")
    return {name: RECIPES[name] for name in listed}
