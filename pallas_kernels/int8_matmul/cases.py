"""Named shapes `(K, N)` of real models' layers, shared by tests and benches."""

from pallas_kernels._layers import LAYERS

SHAPES = LAYERS
# Weights with block scales.
BLOCK_SHAPES = {"deepseek-v3/o": (7168, 4096), "square": (8192, 8192)}
