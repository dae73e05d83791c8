"""Hash the PTX that each kernel compiles to for an H200, to see what a refactoring leaves as it was.

    python scripts/ptx_hashes.py [--only int4 int8 grouped quant] > before.txt
    ... edit ...
    python scripts/ptx_hashes.py > after.txt; diff before.txt after.txt

Every tuned and default configuration of the products is there, with each option of theirs once. Names of kernels and
lines of source are left out of the hash.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import re
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from pallas_kernels._aot import dumped_for_h200
from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.grouped_matmul import default_config, grouped_matmul
from pallas_kernels.grouped_matmul.cases import LAYERS, TOKENS
from pallas_kernels.int4_matmul import int4_matmul, int4_matmul_many
from pallas_kernels.int4_matmul.choice import tuned_entries
from pallas_kernels.int8_matmul import default_config as int8_matmul_config
from pallas_kernels.int8_matmul import int8_matmul
from pallas_kernels.int8_matmul.cases import BLOCK_SHAPES, SHAPES
from pallas_kernels.low_bit_matmul import FORMATS, low_bit_matmul

S = jax.ShapeDtypeStruct
KERNEL = {"implementation": "mosaic_gpu"}


def packed(k: int, n: int, bits: int = 4):
    return S((-(-n // 64), -(-k // (256 // bits)), 2, 256), jnp.int32)


def int4_cases():
    """Names, functions and operands of the products of int4 weights, and of the other formats of their skeleton."""
    for e in {json.dumps(e["config"]): e for e in tuned_entries()}.values():
        yield int4_case(e["m"], e["k"], e["n"])
    for m in (5, 8, 32, 40, 300, 1000, 8192):
        yield int4_case(m, 8192, 8192)
    for m in (5, 64, 150):
        for options in ({"group": 32, "zero": True}, {"group": 64}, {"group": 4096}, {"group": 4096, "bias": True}):
            yield int4_case(m, 4096, 4096, **options)
    for m in (1, 16, 64, 128, 256, 4096):
        for dtype, group in (("int8", 128), ("int8", 8192), ("float8_e4m3fn", 128)):
            yield int4_case(m, 8192, 8192, group=group, dtype=dtype)
    for m in (1, 16, 300):
        x, scale = S((m, 4096), jnp.bfloat16), S((32, 4096), jnp.bfloat16)
        weights = [(packed(4096, n), S((32, n), jnp.bfloat16), None, None) for n in (4096, 1024, 1024)]
        yield f"int4 siblings {m}", lambda x, *w: int4_matmul_many(x, w, **KERNEL), (x, *weights)
    for qtype in FORMATS:
        for m in (1, 16, 64, 300):
            scale = S((1 if FORMATS[qtype].bits == 8 else 64, 8192), jnp.bfloat16)
            operands = S((m, 8192), jnp.bfloat16), packed(8192, 8192, FORMATS[qtype].bits), scale
            yield f"{qtype} {m}", lambda *o, qtype=qtype: low_bit_matmul(*o, qtype=qtype, **KERNEL), operands


def int4_case(m, k, n, *, group=128, dtype="bfloat16", zero=False, bias=False):
    x, scale = S((m, k), jnp.dtype(dtype)), S((k // group, n), jnp.bfloat16)
    operands = x, packed(k, n), scale, scale if zero else None
    rest = {"bias": S((n,), jnp.bfloat16) if bias else None}
    if x.dtype.itemsize == 1:
        rest["x_scale"] = S((m, 1), jnp.float32)
    name = f"int4 {m} {k} {n} g{group} {dtype}{' zero' * zero}{' bias' * bias}"
    return name, lambda operands, rest: int4_matmul(*operands, **rest, **KERNEL), (operands, rest)


def int8_cases():
    """The products of 8-bit codes."""
    found = {}
    for dtype in ("int8", "float8_e4m3fn"):
        for form, shapes in (("token", SHAPES), ("block", BLOCK_SHAPES)):
            for (k, n), m in itertools.product(shapes.values(), (1, 16, 64, 128, 256, 1024, 4096)):
                config = int8_matmul_config(m, k, n, dtype, blocked=form == "block")
                found.setdefault((dtype, form, config), (m, k, n, dtype, form))
    yield from itertools.starmap(int8_case, found.values())
    for dtype in ("int8", "float8_e4m3fn"):
        for m in (5, 300):
            yield int8_case(m, 2048, 1152, dtype, "tensor")
            yield int8_case(m, 2048, 1152, dtype, bias=True)
    for m in (5, 300):
        yield int8_case(m, 2048, 1152, "int8", "asymmetric")


def int8_case(m, k, n, dtype, form="token", *, bias=False):
    x_shape, w_shape = {"tensor": ((1, 1), (1, 1)), "block": ((m, k // 128), (k // 128, n // 128))}.get(
        form, ((m, 1), (1, n))
    )
    operands = S((m, k), dtype), S((n, k), dtype), S(w_shape, jnp.float32), S(x_shape, jnp.float32)
    rest = {"bias": S((n,), jnp.bfloat16) if bias else None}
    if form == "asymmetric":
        rest |= {"x_zero_point": S((m, 1), jnp.int32), "weight_sum": S((n,), jnp.int32)}
    name = f"8-bit {m} {k} {n} {dtype} {form}{' bias' * bias}"
    return name, lambda operands, rest: int8_matmul(*operands, **rest, **KERNEL), (operands, rest)


def grouped_cases():
    """The products of experts."""
    forms = {
        "w4a16": (jnp.int32, jnp.bfloat16, 128),
        "w4a8": (jnp.int32, jnp.int8, 128),
        "w4a8-fp8": (jnp.int32, jnp.float8_e4m3fn, 128),
        "int8": (jnp.int8, jnp.int8, None),
        "fp8": (jnp.float8_e4m3fn, jnp.float8_e4m3fn, None),
    }
    found = {}
    for layer, tokens, form in itertools.product(LAYERS, TOKENS, forms):
        experts, k, n, top = LAYERS[layer]
        weight, x, group = forms[form]
        config = default_config(tokens * top, experts, k, n, k // group if group else 1, x, weight)
        found.setdefault((config, form), (layer, tokens))
    for (config, form), (layer, tokens) in found.items():
        experts, k, n, top = LAYERS[layer]
        weight, x, group = forms[form]
        shape = (experts, n // 64, k // 64, 2, 256) if weight == jnp.int32 else (experts, n, k)
        rows, groups = tokens * top, k // group if group else 1
        operands = S((rows, k), x), S(shape, weight), S((experts, groups, n), jnp.bfloat16)
        rest = {"group_sizes": S((experts,), jnp.int32), "row_scale": S((rows,), jnp.float32)}
        if jnp.dtype(x).itemsize == 1:
            rest["x_scale"] = S((rows, 1), jnp.float32)
        for activation in (None, "silu_mul") if form == "w4a16" else (None,):
            options = {"activation": activation, "config": config, **KERNEL}
            yield (
                f"grouped {layer} {tokens} {form} {activation}",
                lambda operands, rest, options=options: grouped_matmul(*operands, **rest, **options),
                (operands, rest),
            )


def quant_cases():
    """The quantization of activations."""
    for m, k in ((16, 4096), (70, 1664), (4096, 14336)):
        for dtype in ("int8", "float8_e4m3fn"):
            for group, epsilon in ((None, None), (None, 1e-6), (128, None), (128, 1e-6)):
                options = {"dtype": dtype, "group_size": group, "epsilon": epsilon, **KERNEL}
                operands = S((m, k), jnp.bfloat16), S((k,), jnp.float32)
                yield (
                    f"quant {m} {k} {dtype} {group} {epsilon}",
                    lambda x, gain, options=options: activation_quant(x, pre_scale=gain, **options),
                    operands,
                )


CASES = {"int4": int4_cases, "int8": int8_cases, "grouped": grouped_cases, "quant": quant_cases}


def digest(fn, operands) -> str:
    """What is left of a hash of the PTX of each kernel of a program."""
    with tempfile.TemporaryDirectory() as folder:
        dumped_for_h200(fn, operands, folder, MOSAIC_GPU_DUMP_PTX="1")
        texts = [path.read_text() for path in sorted(pathlib.Path(folder).glob("*.ptx"))]
    return " ".join(hashlib.sha256(nameless(text).encode()).hexdigest()[:16] for text in texts)


def nameless(ptx: str) -> str:
    """PTX without lines of source and the kernel's name."""
    lines = (line for line in ptx.splitlines() if not re.match(r"\s*(\.loc|\.file|//)", line))
    (name,) = set(re.findall(r"\.entry (\w+)", ptx))
    return "\n".join(lines).replace(name, "kernel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    for part in parser.parse_args().only:
        for name, fn, operands in CASES[part]():
            print(json.dumps(name), digest(fn, operands), flush=True)


if __name__ == "__main__":
    main()
