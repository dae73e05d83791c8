"""Arrays in mapped files: turning them changes no bit, and giving pages back loses nothing."""

import ml_dtypes
import numpy as np
import pytest

from jaxquant.storage._mapped import contiguous, forget_pages


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", ml_dtypes.bfloat16, "float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2049), (300, 129), (2, 0), (7,), (2, 3, 4)])
def test_row_order_keeps_every_bit(tmp_path, rng, dtype, shape):
    content = rng.integers(0, 255, (*shape, np.dtype(dtype).itemsize), np.uint8)
    content = content & 1 if dtype == "bool" else content
    array = content.view(dtype)[..., 0]
    (tmp_path / "f").write_bytes(array.tobytes())
    if array.size:
        array = np.memmap(tmp_path / "f", dtype, "r", 0, shape)
    turned = contiguous(array.T)
    assert turned.flags.c_contiguous
    assert turned.dtype == array.dtype
    assert turned.tobytes() == np.ascontiguousarray(array.T).tobytes()
    forget_pages(array)
    assert turned.tobytes() == np.ascontiguousarray(array.T).tobytes()
