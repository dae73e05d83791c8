"""Named shapes `(tokens, K)` of real models' activations, shared by tests and benches."""

SHAPES = {
    "llama3-8b/hidden/decode": (16, 4096),
    "llama3-8b/hidden/prefill": (4096, 4096),
    "llama3-8b/ffn/prefill": (4096, 14336),
    "llama3-70b/hidden/prefill": (4096, 8192),
    "llama3-70b/ffn/decode": (64, 28672),
    "deepseek-v3/hidden/prefill": (4096, 7168),
}
