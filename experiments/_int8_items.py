"""What `bench_int8` verifies and times, most wanted first."""

import dataclasses

from pallas_kernels.activation_quant.cases import SHAPES as QUANT_SHAPES
from pallas_kernels.int8_matmul.cases import BLOCK_SHAPES, SHAPES

DTYPES = ("float8_e4m3fn", "int8")
SWEPT = 12  # configurations of a problem that a sweep times


def verify_items() -> list[dict]:
    """Each form, each cut of the kernel, ragged in every dimension that is not padded."""
    config = lambda **cut: {"num_stages": 4, "block_k": 128, "weights_first": False, "multicast": 1, "split_k": 1} | cut  # noqa: E731
    first = lambda m, **cut: config(weights_first=True, block_m=m, block_n=128, **cut)  # noqa: E731
    cuts = [
        (300, config(block_m=256, block_n=128), "float8_e4m3fn"),
        (1000, config(block_m=256, block_n=128, multicast=2), "float8_e4m3fn"),
        (300, config(block_m=128, block_n=128), "float8_e4m3fn"),
        (1000, config(block_m=128, block_n=128, multicast=2), "float8_e4m3fn"),
        (300, config(block_m=128, block_n=256), "int8"),
        (1000, config(block_m=128, block_n=256, multicast=2), "int8"),
        (1000, config(block_m=256, block_n=128, multicast=2), "int8"),
        (16, first(16), "int8"),
        (16, first(16, split_k=2), "int8"),
        (7, first(8, split_k=4), "int8"),
        (64, first(64, split_k=4), "float8_e4m3fn"),
        (100, first(128, split_k=2), "float8_e4m3fn"),
        (33, config(block_m=64, block_n=128, num_warpgroups=1, split_k=2), "int8"),
        (64, first(64, multicast=2), "int8"),
        (200, first(64, multicast=2), "float8_e4m3fn"),
    ]
    items = [
        {"m": m, "k": 2048 + 128, "n": 1024 + 128, "dtype": dtype, "form": "token", "config": c} for m, c, dtype in cuts
    ]
    # Several tiles a block: both slots of scales are used.
    narrow = first(16, num_warpgroups=1) | {"block_n": 64}
    items += [
        {"m": 16, "k": 512, "n": 150 * 128, "dtype": dtype, "form": "token", "config": narrow | {"split_k": split}}
        for dtype in DTYPES
        for split in (1, 2)
    ]
    sizes = (
        (1, 4096, 4096),
        (8, 14336, 4096),
        (17, 4096, 6144),
        (64, 4096, 4096),
        (130, 4096, 4096),
        (520, 2048, 1152),
    )
    thirds = config(block_m=192, block_n=128, num_warpgroups=3)
    items += [
        {"m": 1000, "k": 2048, "n": 1152, "dtype": dtype, "form": form, "config": thirds | {"multicast": multicast}}
        for dtype, form, multicast in (
            ("float8_e4m3fn", "block", 1),
            ("float8_e4m3fn", "block", 2),
            ("int8", "token", 2),
        )
    ]
    for dtype in DTYPES:
        items += [{"m": m, "k": k, "n": n, "dtype": dtype, "form": "token", "bias": True} for m, k, n in sizes]
        items += [{"m": m, "k": 2048, "n": 1152, "dtype": dtype, "form": "tensor"} for m in (5, 300)]
        items += [{"m": m, "k": 2048, "n": 1152, "dtype": dtype, "form": "block"} for m in (1, 16, 64, 100, 1000)]
        items += [
            {"m": m, "k": 2048, "n": 1152, "dtype": dtype, "form": "token", "out_dtype": out}
            for m in (9, 200)
            for out in ("float32", "float16")
        ]
    items += [{"m": m, "k": 2048, "n": 1152, "dtype": "int8", "form": "asymmetric", "bias": True} for m in (1, 40, 300)]
    return [item | {"what": "verify"} for item in items]


def sibling_items() -> list[dict]:
    """Several weights in one launch (of many fp8 tokens, one launch each): q, k and v, gate and up, ragged ones."""
    return [
        {"what": "siblings", "m": m, "k": k, "outputs": outputs, "dtype": dtype, "form": form}
        for dtype in DTYPES
        for m, k, outputs, form in (
            (1, 4096, (4096, 1024, 1024), "token"),
            (16, 4096, (14336, 14336), "token"),
            (13, 2048, (128, 1152, 384), "tensor"),
            (300, 2048, (384, 1152), "token"),
            (4096, 4096, (4096, 1024, 1024), "token"),
        )
    ] + [{"what": "siblings", "m": 5, "k": 2048, "outputs": (384, 128), "dtype": "int8", "form": "asymmetric"}]


def quant_items() -> list[dict]:
    """The quantization kernels, verified on ragged rows, then timed on real ones."""
    cases = [(m, k, group, x_dtype, norm) for m, k in ((3, 4096), (70, 1664)) for group in (None, 128)
             for x_dtype, norm in (("bfloat16", False), ("float32", True), ("float16", False))]  # fmt: skip
    names = ("m", "k", "group", "x_dtype", "norm")
    items = [
        {"what": "quant_verify", "dtype": dtype} | dict(zip(names, case, strict=True))
        for case in cases
        for dtype in DTYPES
    ]
    return items + [
        {"what": "quant", "shape": shape, "dtype": dtype, "group": group, "norm": norm}
        for shape in QUANT_SHAPES
        for dtype, group, norm in (
            ("int8", None, False),
            ("int8", None, True),
            ("float8_e4m3fn", None, False),
            ("float8_e4m3fn", 128, False),
        )
    ]


def time_items(shapes: list[str], tokens: list[int]) -> list[dict]:
    """Every problem with the default configuration, and the block-scaled ones."""
    items = [
        {"what": "time", "shape": s, "m": m, "dtype": dtype, "form": "token"}
        for m in tokens
        for s in shapes
        for dtype in DTYPES
    ]
    return items + [
        {"what": "time", "shape": s, "m": m, "dtype": "float8_e4m3fn", "form": "block"}
        for s, m in (("deepseek-v3/o", 4096), ("square", 8192), ("deepseek-v3/o", 64))
    ]


def sweep_items() -> list[dict]:
    """What the cost model likes best for each problem, problems interleaved: a run cut short covers all of them."""
    from pallas_kernels.int8_matmul import candidates
    from pallas_kernels.int8_matmul.config import predicted_microseconds

    tables = {
        ("llama3-70b/o", "float8_e4m3fn"): (16, 128, 256),
        ("llama3-8b/o", "float8_e4m3fn"): (16, 128, 256, 1024),
        ("llama3-8b/gate_up", "float8_e4m3fn"): (1, 16, 64, 128, 256, 1024),
        ("llama3-70b/o", "int8"): (1, 64, 256, 1024, 4096),
        ("llama3-8b/o", "int8"): (1, 64, 256, 1024, 4096),
        ("llama3-8b/gate_up", "int8"): (1, 64, 256, 1024, 4096),
    }
    problems = [(shape, m, dtype, "token") for (shape, dtype), tokens in tables.items() for m in tokens]
    problems += [(shape, m, "float8_e4m3fn", "block") for shape, m in (("deepseek-v3/o", 4096), ("square", 8192))]
    queues = []
    for shape, m, dtype, form in problems:
        k, n = (SHAPES | BLOCK_SHAPES)[shape]
        configs = candidates(m, k, n, dtype, blocked=form == "block")
        configs = sorted(configs, key=lambda c, m=m, k=k, n=n: predicted_microseconds(c, m, k, n))[:SWEPT]
        problem = {"what": "time", "shape": shape, "m": m, "dtype": dtype, "form": form}
        queues.append([problem | {"config": dataclasses.asdict(c)} for c in configs])
    return [queue[i] for i in range(SWEPT) for queue in queues if i < len(queue)]


def torch_items(shapes: list[str], tokens: list[int]) -> list[dict]:
    """Two token counts an item: few enough to be done before a worker counts as hung."""
    return [
        {"what": "torch", "shape": s, "tokens": tokens[i : i + 2]} for i in range(0, len(tokens), 2) for s in shapes
    ]
