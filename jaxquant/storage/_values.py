"""Static values of a checkpoint as JSON: numbers, text, dtypes, partition specs and the specs of quantization."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays import _spec

VALUES = (
    _spec.PerTensor,
    _spec.PerChannel,
    _spec.PerToken,
    _spec.PerGroup,
    _spec.PerBlock,
    _spec.TensorSpec,
    _spec.QuantSpec,
    _spec.Rule,
    _spec.QuantConfig,
)
SEQUENCES = {"list": list, "tuple": tuple}


def encode_value(value: Any, path: str) -> Any:
    """Writes a static value: a number, text, tuple, list, dict with text keys, dtype, PartitionSpec or spec.

    Args:
        value: the value.
        path: the parameter it belongs to, for the error.

    Returns:
        JSON values; whatever JSON has no word for is an object of one key.

    Raises:
        TypeError: a value of another type, such as a mesh or a function.

    >>> encode_value((1, None, jnp.dtype("bfloat16")), "w")
    {'tuple': [1, None, {'dtype': 'bfloat16'}]}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode_value(part, path) for part in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: encode_value(part, path) for key, part in value.items()}}
    if isinstance(value, jnp.dtype):
        return {"dtype": value.name}
    if isinstance(value, jax.sharding.PartitionSpec):
        return {"PartitionSpec": [encode_value(part, path) for part in value]}
    if isinstance(value, VALUES):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {type(value).__name__: {name: encode_value(part, path) for name, part in fields.items()}}
    raise TypeError(
        f"save: {path}: a checkpoint cannot hold the static value {value!r} of type {type(value).__qualname__};"
        " remove it first (unbox partitioned parameters, or set their mesh to None)"
    )


def decode_value(value: Any, path: str) -> Any:
    """Undoes `encode_value`.

    Args:
        value: JSON values.
        path: the parameter it belongs to, for the error.

    Returns:
        The value.

    Raises:
        ValueError: an unknown kind or field.

    >>> decode_value({"PerGroup": {"size": 64}}, "w")
    PerGroup(size=64)
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError(f"{path}: a bare list {str(value)[:80]!r} where a value was expected")
        return value
    ((kind, body),) = value.items()
    if kind == "float":
        return float(body)
    if kind in ("tuple", "list"):
        return SEQUENCES[kind](decode_value(part, path) for part in body)
    if kind == "dict":
        return {key: decode_value(part, path) for key, part in body.items()}
    if kind == "dtype":
        return jnp.dtype(body)
    if kind == "PartitionSpec":
        return jax.sharding.PartitionSpec(*(decode_value(part, path) for part in body))
    for known in VALUES:
        if kind == known.__name__:
            return make(known, {name: decode_value(part, path) for name, part in body.items()}, path)
    raise ValueError(f"{path}: a value of unknown kind {kind!r}")


def make(cls: type, fields: dict[str, Any], path: str) -> Any:
    """Makes a dataclass of a checkpoint's fields; raises ValueError for fields that this version does not know."""
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{path}: {cls.__name__} has no field {names}; the checkpoint is of another version")
    return cls(**fields)
