"""What the stored bits of a weight mean: the formats that the kernel unpacks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of a normal distribution: Dettmers et al., "QLoRA" (2023), arXiv:2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of a weight's codes.

    Attributes:
      bits: of a code.
      offset: what is added to an integer code to store it, or None where codes are no integers.
      takes_zero_points: whether the unpacking subtracts one at no cost.
      side_by_side: the two codes of an operand register are neighbours in a word; else they lie in its two halves.
    """

    bits: int
    offset: int | None
    takes_zero_points: bool
    side_by_side: bool = False

    @property
    def tile_k(self) -> int:
        """Inputs of a packed tile, whose 64 outputs by so many inputs are four words a thread."""
        return 256 // self.bits


FORMATS = {
    "int2": Format(2, 2, takes_zero_points=True),
    "int4": Format(4, 8, takes_zero_points=True),
    "int8": Format(8, 128, takes_zero_points=False),
    "float8_e4m3fn": Format(8, None, takes_zero_points=False),
    "nf4": Format(4, None, takes_zero_points=False, side_by_side=True),
}


def stored_bits(codes: jax.Array, qtype: str) -> jax.Array:
    """What is stored of codes: uint32, the code's bits at the bottom."""
    if qtype == "float8_e4m3fn":
        return jax.lax.bitcast_convert_type(codes.astype(jnp.float8_e4m3fn), jnp.uint8).astype(jnp.uint32)
    return (codes.astype(jnp.int32) + (FORMATS[qtype].offset or 0)).astype(jnp.uint32)


def codes_of(stored: jax.Array, qtype: str) -> jax.Array:
    """Undo `stored_bits`: int8, float8_e4m3fn, or uint8 indices of NF4 levels."""
    if qtype == "float8_e4m3fn":
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint8), jnp.float8_e4m3fn)
    return (stored.astype(jnp.int32) - (FORMATS[qtype].offset or 0)).astype(jnp.uint8 if qtype == "nf4" else jnp.int8)


def values_of(codes: jax.Array, qtype: str) -> jax.Array:
    """What codes stand for, float32."""
    return jnp.asarray(np.array(NF4_LEVELS, np.float32))[codes] if qtype == "nf4" else codes.astype(jnp.float32)
