"""Named shapes `(K, N)` of real models' layers, shared by tests and benches."""

from pallas_kernels._layers import LAYERS

SHAPES = LAYERS
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
