"""Shapes `(K, N)` of real models' linear layers: the table that every matrix product is measured on."""

LAYERS = {
    "llama3-8b/o": (4096, 4096),
    "llama3-8b/qkv": (4096, 6144),
    "llama3-8b/gate_up": (4096, 28672),
    "llama3-70b/o": (8192, 8192),
    "llama3-70b/gate_up": (8192, 57344),
    "llama3-8b/down": (14336, 4096),
    "llama3-70b/down": (28672, 8192),
}
