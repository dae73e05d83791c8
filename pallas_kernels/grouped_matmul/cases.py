"""Expert layers of real models, `(experts, K, N, experts of a token)`, and group sizes that strain a tile map."""

LAYERS = {
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v3": (256, 7168, 2048, 8),
}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
# Of 40 experts, more than the lanes of the warp that sums them up, and 800 rows: rows by expert, zero where not named.
STRAINED = (40, 800)
SIZES = {
    "none": {},
    "one row": {33: 1},
    "all to one": {31: 301},
    "every row": {39: 800},
    "ones": dict.fromkeys(range(40), 1),
    "ragged": {0: 3, 2: 130, 3: 7, 4: 8, 31: 70, 32: 97, 38: 64, 39: 1},
    "crossing": {1: 5, 2: 260, 4: 1, 5: 515},
    "ends": {0: 400, 39: 399},
}
