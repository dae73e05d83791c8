"""What the formats share: building a `QArray` of NumPy leaves for one linear layer, and asking a tensor what it is."""

from collections.abc import Mapping

import numpy as np

from jaxquant.arrays._qarray import QArray
from jaxquant.arrays._qtypes import QType, get_qtype
from jaxquant.arrays._spec import TensorSpec
from jaxquant.storage._nodes import check_qarray

Tensors = Mapping[str, np.ndarray]


def make_linear(
    where: str,
    qvalue: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    qtype: str,
    shape: tuple[int, int],
    dtype: np.dtype,
    *,
    padded: int | None = None,
    perm: np.ndarray | None = None,
    act_scale: np.ndarray | None = None,
    act_zero_point: np.ndarray | None = None,
    activation: TensorSpec | None = None,
) -> QArray:
    """Joins the parts of a kernel [K, N] that contracts K.

    Args:
        where: the layer's name, for errors.
        qvalue: codes as stored in a QArray.
        scale: grid.
        zero_point: grid of uint8, or None.
        qtype: the format's name.
        shape: (K, N).
        dtype: the logical dtype.
        padded: rows of codes, where whole groups need more than K.
        perm: [K] input order, or None.
        act_scale: static activation scale of one element, or None.
        act_zero_point: its zero point, uint8, or None.
        activation: the activation's spec, or None.

    Returns:
        The QArray; every leaf is NumPy and of rank 2.

    Raises:
        ValueError: the parts do not fit.
    """
    q = QArray(
        qvalue,  # pyright: ignore[reportArgumentType]  (NumPy leaves: the caller chooses the device)
        *(scale, zero_point, None, _as_matrix(act_scale), _as_matrix(act_zero_point), _as_matrix(perm)),  # pyright: ignore
        qtype,
        (-2,),
        shape,
        shape[0] if padded is None else padded,
        np.dtype(dtype),
        activation,
    )
    check_qarray(where, q)
    return q


def _as_matrix(leaf: np.ndarray | None) -> np.ndarray | None:
    return None if leaf is None else leaf.reshape(-1, 1)


def expect(where: str, tensors: Tensors, name: str, dtypes: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Takes a tensor of a layer and checks it.

    Args:
        where: the layer's name.
        tensors: the layer's tensors.
        name: which.
        dtypes: accepted dtype names, separated by spaces.
        shape: accepted shape; None accepts any size.

    Returns:
        The tensor.

    Raises:
        ValueError: it is missing or something else.
    """
    if name not in tensors:
        raise ValueError(f"{where}: no tensor {name!r}; there are {', '.join(sorted(tensors))}")
    tensor = tensors[name]
    sizes = zip(shape, tensor.shape, strict=False)
    fits = len(shape) == tensor.ndim and all(want in (None, got) for want, got in sizes)
    if not fits or tensor.dtype.name not in dtypes.split() or 0 in tensor.shape:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        wanted = f"[{wanted}] of {dtypes.replace(' ', ' or ')}"
        raise ValueError(f"{where}.{name}: {list(tensor.shape)} of {tensor.dtype}, where {wanted} is needed")
    return tensor


FLOATS = "float16 bfloat16 float32"


def check_finite(where: str, name: str, scale: np.ndarray) -> np.ndarray:
    """Refuses scales that are not finite."""
    if not np.isfinite(scale.astype(np.float32)).all():
        raise ValueError(f"{where}.{name}: holds NaN or Inf")
    return scale


def check_surplus(where: str, tensors: Tensors, known: set[str]) -> None:
    """Refuses tensors of a quantized layer that the format does not know."""
    if surplus := sorted(tensors.keys() - known):
        beside = ", ".join(sorted(known & tensors.keys()))
        raise ValueError(f"{where}: unknown tensors {', '.join(surplus)} beside {beside}")


def input_order(where: str, g_idx: np.ndarray, groups: int) -> np.ndarray | None:
    """The order that sorts inputs by group, or None where they are sorted already.

    Args:
        where: the layer's name.
        g_idx: [K] group of each input.
        groups: how many there are.

    Returns:
        [K] int32: the input at each sorted place, ascending inside a group; or None.

    Raises:
        ValueError: an index out of range.
        NotImplementedError: groups of unequal size in no order.
    """
    size = -(-len(g_idx) // groups)
    if np.array_equal(g_idx, np.arange(len(g_idx)) // size):
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"{where}.g_idx: groups {g_idx.min()} to {g_idx.max()}, there are {groups} scales")
    if not (np.bincount(g_idx, minlength=groups) == size).all():
        raise NotImplementedError(f"{where}.g_idx: groups of unequal sizes that are not in order")
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def group_index(q: QArray) -> np.ndarray:
    """[K] int32: the group of each input, in the original order; undoes `input_order`."""
    rows, groups = q.trailing[0], q.scale.shape[0]
    index = (np.arange(rows) // (q.padded // groups)).astype(np.int32)
    if q.perm is None:
        return index
    original = np.empty_like(index)
    original[np.asarray(q.perm)[:, 0]] = index
    return original


def unsigned_zero_points(q: QArray) -> np.ndarray:
    """[G, N] uint8 zero points of unsigned codes: those of the array, or the middle for a signed format."""
    if q.zero_point is not None:
        return np.asarray(q.zero_point)
    return np.full(q.scale.shape, q.format.offset, np.uint8)


def check_exportable(where: str, q: QArray, format: str, qtypes: str) -> None:
    """Refuses what a linear layer of another library cannot hold.

    Args:
        where: the parameter's path.
        q: the kernel.
        format: the target, for the error.
        qtypes: accepted formats, separated by spaces.

    Raises:
        ValueError: the message says what stands in the way and the remedy.
    """
    remedy = ""
    if q.qtype not in qtypes.split():
        remedy = f"qtype {q.qtype}; accepted: {qtypes}"
    elif q.layout != "plain":
        remedy = f"layout {q.layout!r} is a kernel's; unpack it to the plain layout first"
    elif q.ndim != 2 or q.axis != (-2,):
        remedy = f"shape {q.shape} contracting {q.axis}; a [in, out] kernel contracting -2 is accepted"
    elif q.pre_scale is not None:
        remedy = "it has a pre_scale; fold it into the layer before it first (jaxquant.fold_pre_scale)"
    if remedy:
        raise ValueError(f"{where}: {format} cannot hold it: {remedy}")


def integer_type(bits: int, zero_points: np.ndarray | None) -> tuple[QType, np.ndarray | None]:
    """The signed format if every zero point is the middle of the range, else the unsigned one with its zero points."""
    if zero_points is None or (zero_points == 2 ** (bits - 1)).all():
        return get_qtype(f"int{bits}"), None
    return get_qtype(f"uint{bits}"), zero_points


def common_group_size(format: str, kernels: Mapping[str, QArray]) -> int:
    """The group size of all kernels, -1 where each output has one scale.

    Raises:
        ValueError: they have different ones.
    """
    sizes = {q.padded // q.scale.shape[0] for q in kernels.values()}
    if all(q.scale.shape[0] == 1 for q in kernels.values()):
        return -1
    if len(sizes) != 1:
        raise ValueError(f"{format}: one group size for all kernels; there are {sorted(sizes)}")
    return sizes.pop()
