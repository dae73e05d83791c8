"""Reads checkpoints in the compressed-tensors format of llm-compressor and vLLM.

A linear layer [N outputs, K inputs] is kept in one of these forms; which, is told by its tensors:

- pack-quantized: `weight_packed` int32 [N, K b / 32], codes offset by 2^(b-1) and packed along K, low bits first;
  `weight_shape` [2]; `weight_scale` [N, G]; asymmetric: `weight_zero_point` int32 [N b / 32, G], offset and packed
  along N; act-order: `weight_g_idx` [K]. Releases up to 0.12 left the bits over in each word empty where b does not
  divide 32.
- int-quantized and float-quantized: `weight` int8 or float8_e4m3fn [N, K], `weight_scale` per channel, tensor, group or
  block, `weight_zero_point` int8.
- nvfp4-pack-quantized: `weight_packed` uint8 [N, K / 2] of E2M1, `weight_scale` float8 [N, K / 16] over
  `weight_global_scale`; mxfp4-pack-quantized: `weight_scale` uint8 exponents [N, K / 32]. Read only, and without
  their four-bit activations, which stay in float.

`input_scale` and `input_zero_point` are those of static activations. The weight is `scale * (code - zero point)`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import get_qtype
from jaxquant.arrays._spec import PerGroup, PerTensor, PerToken, TensorSpec
from jaxquant.interop._linear import FLOATS, Tensors, check_finite, check_surplus, expect, input_order, make_linear
from jaxquant.interop._patterns import compile_pattern
from jaxquant.interop._words import fit, to_storage, unpack_words, words_to_storage

SUFFIXES = (
    *("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("weight", "input_scale", "input_zero_point", "input_global_scale"),
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one group of layers is quantized.

    Attributes:
        targets: names or class names of the layers.
        patterns: whether a name fits, for each `re:` target.
        weights: the weight's arguments as in config.json.
        inputs: the activation's, or None.
    """

    targets: tuple[str, ...]
    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    patterns: tuple[Callable[[str], bool], ...] = ()

    def names(self, module: str) -> bool:
        """Whether a target speaks of the module by name or pattern."""
        return module in self.targets or any(matches(module) for matches in self.patterns)


def parse_config(config: dict[str, Any]) -> tuple[Scheme, ...]:
    """Reads the groups of a `quantization_config`.

    Args:
        config: the JSON object.

    Returns:
        Its schemes.

    Raises:
        ValueError: a group is malformed.
        NotImplementedError: sparsity or transforms, which change what the weights mean.
    """
    for name in ("sparsity_config", "transform_config"):
        if config.get(name):
            raise NotImplementedError(f"quantization_config: {name} {str(config[name])[:100]} is not read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("quantization_config: no config_groups")
    schemes = []
    for name, group in groups.items():
        try:
            targets = tuple(map(str, group["targets"]))
            patterns = tuple(compile_pattern(target[3:]) for target in targets if target.startswith("re:"))
            schemes.append(Scheme(targets, dict(group["weights"]), group.get("input_activations"), patterns))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"quantization_config: config_groups.{name} is malformed: {error!r}") from error
    return tuple(schemes)


def scheme_of(schemes: tuple[Scheme, ...], module: str) -> Scheme:
    """The scheme of a module: the first that names it, else the first for linear layers.

    Raises:
        ValueError: none speaks of it.
    """
    by_class = [scheme for scheme in schemes if "Linear" in scheme.targets]
    for scheme in (*(scheme for scheme in schemes if scheme.names(module)), *by_class):
        return scheme
    raise ValueError(f"{module}: quantized, but no target of quantization_config speaks of it")


def decode_linear(tensors: Tensors, scheme: Scheme, dtype: np.dtype, where: str) -> QArray:
    """Makes a kernel of a layer's tensors, bit for bit.

    Args:
        tensors: the layer's.
        scheme: how it is quantized.
        dtype: the logical dtype.
        where: the layer's name, for errors.

    Returns:
        A QArray [K, N].

    Raises:
        ValueError: tensors are missing or do not fit each other or the scheme.
        NotImplementedError: a form that is not read.
    """
    check_surplus(where, tensors, set(SUFFIXES))
    if "weight_packed" in tensors and tensors["weight_packed"].dtype == np.uint8:
        return _decode_fp4(tensors, dtype, where)
    activation = _activation(scheme.inputs, where)
    given: dict[str, Any] = {"activation": activation}
    if activation is not None and activation.static:
        given["act_scale"] = expect(where, tensors, "input_scale", FLOATS, (1,))
        if not activation.symmetric:
            given["act_zero_point"] = _offset(expect(where, tensors, "input_zero_point", "int8", (1,)), 8, where)
    if "weight_packed" not in tensors:
        if expect(where, tensors, "weight", "int8 float8_e4m3fn", (None, None)).dtype == np.int8:
            return _decode_int(tensors, scheme, dtype, where, given)
        return _decode_float(tensors, scheme, dtype, where, given)
    return _decode_packed(tensors, scheme, dtype, where, given)


def _decode_packed(tensors: Tensors, scheme: Scheme, dtype: np.dtype, where: str, given: dict[str, Any]) -> QArray:
    shape = expect(where, tensors, "weight_shape", "int64 int32", (2,))
    outputs, inputs = map(int, shape)
    bits = _bits(scheme, where)
    packed = expect(where, tensors, "weight_packed", "int32", (outputs, None))
    scale = _scale(tensors, where)
    if scale.shape[1] not in (1, outputs) or inputs % scale.shape[0]:
        raise ValueError(f"{where}.weight_scale: a grid {list(scale.shape)} for a [{inputs}, {outputs}] kernel")
    dense = packed.shape[1] == -(-inputs * bits // 32)
    if not dense and packed.shape[1] != -(-inputs // (32 // bits)):
        raise ValueError(f"{where}.weight_packed: {list(packed.shape)} for {inputs} inputs of {bits} bits")
    zero_point = None
    if "weight_zero_point" in tensors:
        length = -(-scale.shape[1] * bits // 32) if dense else -(-scale.shape[1] // (32 // bits))
        words = expect(where, tensors, "weight_zero_point", "int32", (length, scale.shape[0]))
        zero_point = (unpack_words if dense else _unpack_loose)(words, bits, scale.shape[1], 0).T
    qtype = get_qtype(f"{'int' if zero_point is None else 'uint'}{bits}")
    perm = _order(tensors, inputs, scale.shape[0], where)
    if dense and perm is None:
        qvalue = words_to_storage(packed, qtype, inputs, 1)
    else:
        codes = (unpack_words if dense else _unpack_loose)(packed, bits, inputs, 1).T
        qvalue = to_storage(codes if perm is None else codes[perm], qtype)
    return make_linear(where, qvalue, scale, zero_point, qtype.name, (inputs, outputs), dtype, perm=perm, **given)


def _decode_int(tensors: Tensors, scheme: Scheme, dtype: np.dtype, where: str, given: dict[str, Any]) -> QArray:
    bits, weight, scale = _bits(scheme, where), tensors["weight"], _scale(tensors, where)
    codes = _offset(weight.T, bits, where)
    zero_point = None
    if "weight_zero_point" in tensors:
        held = _as_grid(expect_grid(tensors, "weight_zero_point", "int8", where))
        zero_point = _offset(held, bits, where)
    qtype = get_qtype(f"{'int' if zero_point is None else 'uint'}{bits}")
    codes, scale, zero_point = _to_grid(codes, scale, zero_point, scheme, where)
    perm = _order(tensors, weight.shape[1], scale.shape[0], where)
    qvalue = to_storage(codes if perm is None else codes[perm], qtype)
    given |= {"perm": perm, "padded": len(codes)}
    return make_linear(where, qvalue, scale, zero_point, qtype.name, weight.shape[::-1], dtype, **given)


def _decode_float(tensors: Tensors, scheme: Scheme, dtype: np.dtype, where: str, given: dict[str, Any]) -> QArray:
    weight, scale = tensors["weight"], _scale(tensors, where)
    bits = weight.view(np.uint8)
    if (bits & 0x7F == 0x7F).any():
        raise ValueError(f"{where}.weight: holds NaN")
    codes, scale, _ = _to_grid(bits.T, scale, None, scheme, where)
    qvalue = np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn)
    given |= {"padded": len(codes)}
    return make_linear(where, qvalue, scale, None, "float8_e4m3fn", weight.shape[::-1], dtype, **given)


def _decode_fp4(tensors: Tensors, dtype: np.dtype, where: str) -> QArray:
    """nvfp4 and mxfp4: two E2M1 codes a byte, the first in the low nibble, as a QArray keeps them."""
    packed = expect(where, tensors, "weight_packed", "uint8", (None, None))
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    if "weight_global_scale" in tensors:
        blocks = expect(where, tensors, "weight_scale", "float8_e4m3fn", (outputs, inputs // 16)).astype(np.float32)
        scale = blocks / expect(where, tensors, "weight_global_scale", "float32", (1,))
    else:
        exponents = expect(where, tensors, "weight_scale", "uint8", (outputs, inputs // 32))
        if (exponents == 255).any():
            raise ValueError(f"{where}.weight_scale: holds 255, which means NaN")
        scale = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    scale = np.ascontiguousarray(check_finite(where, "weight_scale", scale).T)
    qvalue = fit(np.ascontiguousarray(packed.T), -(-inputs // 8) * 4, 0)
    return make_linear(where, qvalue, scale, None, "mxfp4", (inputs, outputs), dtype)


def _bits(scheme: Scheme, where: str) -> int:
    bits, kind = scheme.weights.get("num_bits"), scheme.weights.get("type", "int")
    if type(bits) is not int or not 2 <= bits <= 8 or kind != "int":
        raise ValueError(f"{where}: integer codes, but the scheme says num_bits {bits!r}, type {kind!r}")
    return bits


def _offset(signed: np.ndarray, bits: int, where: str) -> np.ndarray:
    """Unsigned codes of signed ones, which must fit the bits."""
    half = 2 ** (bits - 1)
    if bits < 8 and ((signed < -half) | (signed >= half)).any():
        raise ValueError(f"{where}: codes from {signed.min()} to {signed.max()} do not fit {bits} bits")
    return signed.view(np.uint8) + np.uint8(half)


def expect_grid(tensors: Tensors, name: str, dtypes: str, where: str) -> np.ndarray:
    """Takes a tensor of scales or zero points: [N, G], or one element."""
    rank = (None,) if name in tensors and tensors[name].ndim == 1 else (None, None)
    return expect(where, tensors, name, dtypes, rank)


def _as_grid(held: np.ndarray) -> np.ndarray:
    """[N, G] or [N] or [1] as a grid [G, N]."""
    return np.ascontiguousarray(held.reshape(-1, 1).T if held.ndim == 1 else held.T)


def _scale(tensors: Tensors, where: str) -> np.ndarray:
    return check_finite(where, "weight_scale", _as_grid(expect_grid(tensors, "weight_scale", FLOATS, where)))


def _order(tensors: Tensors, inputs: int, groups: int, where: str) -> np.ndarray | None:
    if "weight_g_idx" not in tensors:
        return None
    g_idx = expect(where, tensors, "weight_g_idx", "int32 int64", (inputs,))
    return None if (g_idx == -1).all() else input_order(where, g_idx, groups)  # -1 everywhere: made, never filled


def _unpack_loose(words: np.ndarray, bits: int, count: int, axis: int) -> np.ndarray:
    """Takes codes out of words that hold floor(32 / bits) each, as releases up to 0.12 packed them."""
    last = np.moveaxis(words, axis, -1)[..., None].view(np.uint32)
    codes = last >> np.arange(0, 32 // bits * bits, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    flat = codes.astype(np.uint8).reshape(*codes.shape[:-2], -1)[..., :count]
    return np.moveaxis(flat, -1, axis)


def _to_grid(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, scheme: Scheme, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Makes scales of blocks a grid: pads K to whole blocks, and repeats over N where blocks do not divide it."""
    inputs, outputs = codes.shape
    rows, columns = scale.shape
    if rows == 1 and columns in (1, outputs):
        return codes, scale, zero_point
    block = scheme.weights.get("block_structure") or (1, scheme.weights.get("group_size") or -(-inputs // rows))
    fits = len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if not fits or (rows, columns) != (-(-inputs // block[1]), -(-outputs // block[0])):
        raise ValueError(f"{where}.weight_scale: a grid {[rows, columns]} for [{inputs}, {outputs}] in blocks {block}")
    codes = fit(codes, rows * block[1], 0)
    if outputs % columns or outputs // columns != block[0]:
        scale = np.repeat(scale, block[0], 1)[:, :outputs]
        zero_point = None if zero_point is None else np.repeat(zero_point, block[0], 1)[:, :outputs]
    return codes, scale, zero_point


def _activation(inputs: dict[str, Any] | None, where: str) -> TensorSpec | None:
    if inputs is None:
        return None
    kind, strategy, dynamic = inputs.get("type", "int"), inputs.get("strategy"), inputs.get("dynamic")
    symmetric = inputs.get("symmetric", True)
    granularities = {"token": PerToken(), "tensor": PerTensor(), "group": PerGroup(inputs.get("group_size") or 128)}
    granularity = granularities.get(str(strategy))
    known = kind in ("int", "float") and inputs.get("num_bits") == 8
    if granularity is None or not known or dynamic not in (True, False) or (kind == "float" and not symmetric):
        raise NotImplementedError(f"{where}: input_activations {str(inputs)[:200]} is not read")
    if not dynamic and strategy != "tensor":
        raise NotImplementedError(f"{where}: static activations per {strategy}; per tensor is read")
    qtype = "float8_e4m3fn" if kind == "float" else "int8" if symmetric else "uint8"
    return TensorSpec(qtype, granularity, "absmax" if symmetric else "minmax", static=not dynamic)
