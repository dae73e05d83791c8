"""The recipes that the experiments compare, by name."""

from __future__ import annotations

import dataclasses

import jaxquant as jq


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to quantize a model.

    Attributes:
        config: the order given to `jq.quantize`, or None for the float model.
        summary: what it is, in a few words.
        calibrated: whether it needs calibration tokens.
    """

    config: jq.QuantConfig | None
    summary: str
    calibrated: bool = False


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
}


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
