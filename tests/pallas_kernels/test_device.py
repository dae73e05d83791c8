import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _device
from pallas_kernels.attention import attention
from pallas_kernels.decode_attention import decode_attention


def call(op, implementation):
    x = jnp.ones((1, 64, 2, 64), jnp.bfloat16)
    if op is attention:
        return attention(x, x, x, implementation=implementation)
    k = x.swapaxes(1, 2)
    return decode_attention(x[:, 0], k, k.swapaxes(2, 3), jnp.array([40]), implementation=implementation)


@pytest.mark.parametrize("op", [attention, decode_attention])
def test_another_generation_gets_xla_or_a_refusal(op, monkeypatch):
    expected = call(op, "xla")
    ampere = types.SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100")
    monkeypatch.setattr(_device.jax, "devices", lambda: [ampere])
    with pytest.raises(NotImplementedError, match=r"Hopper GPUs .* NVIDIA A100 has 8.0"):
        call(op, "mosaic_gpu")
    np.testing.assert_array_equal(call(op, None), expected)
    jaxpr = jax.make_jaxpr(lambda: call(op, None))()
    assert "mosaic" not in str(jaxpr)
    ampere.compute_capability = "9.0"
    assert _device.wrong_generation() is None
