"""`pack_for`: quantized trees in the layout of a device's kernels."""

from typing import Any

import jax

from jaxquant.arrays._packing import is_packed, pack_array, packing_refusal, plain
from jaxquant.parameters._tree import is_quantized

TARGETS = ("h200", "plain")


def pack_for(qparams: Any, target: str) -> Any:
    """Lays quantized weights out as a device's kernels read them, so that products run there without unpacking.

    Packing is exact: `pack_for(pack_for(qparams, "h200"), "plain")` gives every leaf back bit for bit. Packed trees
    are saved, loaded, sliced by `scan`, mapped by `vmap` and run on any device; where there is no kernel, XLA reads
    the packed codes.

    Args:
        qparams: a tree with quantized weights, plain or packed.
        target: `"h200"` for the Hopper kernels, or `"plain"`. `pallas_kernels.int4_matmul` takes int4 and uint4 weights
            with 16-bit activations, per channel or in groups of 32, 64, 128 or a multiple of 256 inputs, and int4
            weights with int8 or float8_e4m3fn activations per token; `pallas_kernels.low_bit_matmul` int8,
            float8_e4m3fn, nf4, int2 and uint2 weights with 16-bit activations, int3 and uint3 in four bits;
            `pallas_kernels.int8_matmul` int8 and float8_e4m3fn weights per channel or tensor, with activations of the
            same format per token or tensor, int8 ones also with uint8 activations, and both in blocks of 128 x 128 with
            activations in groups of 128.

    Returns:
        The tree. Weights that no kernel takes stay plain; `explain` says why.

    Raises:
        ValueError: the target is unknown.

    >>> import jax.numpy as jnp
    >>> from jaxquant.arrays._qarray import quantize_array
    >>> from jaxquant.arrays._spec import PRESETS
    >>> packed = pack_for({"kernel": quantize_array(jnp.ones((128, 64)), PRESETS["w4a16"])}, "h200")
    >>> packed["kernel"]
    QArray(int4[128, 64], axis=(-2,), scale=[1, 64], int4_fragments)
    """
    if target not in TARGETS:
        raise ValueError(f"pack_for: target {target!r}; accepted: {', '.join(map(repr, TARGETS))}")

    def lay_out(leaf: Any) -> Any:
        if not is_quantized(leaf) or is_packed(leaf) == (target == "h200"):
            return leaf
        if target == "plain":
            return _unpack(leaf)
        return leaf if packing_refusal(leaf) else _pack(leaf)

    return jax.tree.map(lay_out, qparams, is_leaf=is_quantized)


_pack, _unpack = jax.jit(pack_array), jax.jit(plain)
