"""Named shapes `(K, N)` of real models' layers, shared by tests and benches."""

# The first seven are the table the kernel is measured on.
SHAPES = {
    "llama3-8b/o": (4096, 4096),
    "llama3-8b/qkv": (4096, 6144),
    "llama3-8b/gate_up": (4096, 28672),
    "llama3-70b/o": (8192, 8192),
    "llama3-70b/gate_up": (8192, 57344),
    "llama3-8b/down": (14336, 4096),
    "llama3-70b/down": (28672, 8192),
}
# Weights with block scales.
BLOCK_SHAPES = {"deepseek-v3/o": (7168, 4096), "square": (8192, 8192)}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
