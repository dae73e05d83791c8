"""Which problems the Hopper kernels take. They have nothing to tune."""

import jax.numpy as jnp

LARGEST_ROW = 32768  # inputs, in the one box that the copy engine fetches


def supports(k: int, group_size: int, dtype) -> str | None:
    """Say why the Hopper kernels cannot take a problem, or None if they can.

    Args:
        k: inputs of a token.
        group_size: inputs that share a scale.
        dtype: of x.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {jnp.dtype(dtype).name}; the kernels take bfloat16, float16 or float32"
    if k % 128 or k > LARGEST_ROW:
        return f"K = {k}; the kernels take multiples of 128 up to {LARGEST_ROW}"
    if group_size not in (128, k):
        return f"groups of {group_size} inputs; the kernels take 128 or all of a token's"
    return None
