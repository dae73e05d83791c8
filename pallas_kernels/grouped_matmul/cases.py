"""Expert layers of real models, `(experts, K, N, experts of a token)`, and group sizes that strain a tile map."""

LAYERS = {
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v3": (256, 7168, 2048, 8),
}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
SIZES = {
    "none": (0, 0, 0, 0, 0),
    "one row": (0, 0, 1, 0, 0),
    "all to one": (0, 0, 0, 301, 0),
    "ones": (1, 1, 1, 1, 1),
    "ragged": (3, 0, 130, 7, 8),
    "crossing": (5, 260, 0, 1, 515),
}
