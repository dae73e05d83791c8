"""Whether the GPU at hand is one that the kernels are for."""

import jax


def wrong_generation() -> str | None:
    """Returns why this process's GPU cannot run the kernels, or None on Hopper, and where there is no GPU at all."""
    device = jax.devices()[0]
    if device.platform != "gpu" or str(device.compute_capability).startswith("9."):
        return None
    return (
        f"the kernel is for Hopper GPUs (compute capability 9.0), {device.device_kind} has {device.compute_capability}"
    )
