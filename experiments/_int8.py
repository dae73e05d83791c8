"""Random 8-bit problems on the device, and the checks that precede every timing."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from experiments._clock import rotations
from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.int8_matmul import Int8Weight, int8_matmul, int8_matmul_many

# One rounding of the result is off by at most half an eps of each element. The fp8 tensor core truncates sums of 128
# products to about 14 bits: below that again. So the norm of the error stays under one eps of the norm of the result.
TOLERANCE = {"bfloat16": 2.0**-8, "float16": 2.0**-9, "float32": 2.0**-9}


def problem(seed: int, m: int, k: int, n: int, dtype: str, form: str, *, bias: bool = False, copies: int = 1) -> dict:
    """Codes and scales of `x`, and `copies` of packed weights with their scales; k and n are multiples of 128.

    Args:
        seed: of everything random.
        m: tokens.
        k: inputs.
        n: outputs.
        dtype: "int8" or "float8_e4m3fn".
        form: "token" (per token x per channel), "tensor" (one scale each), "block" (1 x 128 and 128 x 128),
            "asymmetric" (per token with zero points).
        bias: whether there is one.
        copies: weights to rotate over.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 5 + 2 * copies))
    x_shape, w_shape = {"tensor": ((1, 1), (1, 1)), "block": ((m, k // 128), (k // 128, n // 128))}.get(
        form, ((m, 1), (1, n))
    )
    scale = lambda shape: jax.random.uniform(next(keys), shape, jnp.float32, 0.5, 1.5) * 0.02  # noqa: E731
    return {
        "x": _codes(next(keys), (m, k), dtype),
        "x_scale": scale(x_shape),
        "weights": [(_codes(next(keys), (n, k), dtype), scale(w_shape)) for _ in range(copies)],
        "bias": jax.random.normal(next(keys), (n,), jnp.bfloat16) if bias else None,
        "x_zero_point": jax.random.randint(next(keys), (m, 1), -128, 128) if form == "asymmetric" else None,
    }


def _codes(key, shape, dtype: str):
    bits = jax.random.bits(key, shape, jnp.uint8)
    if dtype == "int8":
        return jax.lax.bitcast_convert_type(bits, jnp.int8)
    # Any finite e4m3 of magnitude 16 to 448, either sign: no NaN.
    magnitude = 0x58 + bits % jnp.uint8(0x27)
    return jax.lax.bitcast_convert_type(magnitude | (bits & jnp.uint8(0x80)), jnp.float8_e4m3fn)


def copies_for(k: int, n: int) -> int:
    """Copies of a weight to rotate over."""
    return rotations(k * n)


def _exact_sums(x, weight):
    """`x @ weight^T` of int8 codes in int32, by two bfloat16 products whose float32 sums are exact integers.

    XLA's own int8 product is no reference: without autotuning its tiles of 16 inputs are half of the instruction's 32,
    and every sum came out doubled (jax 0.11.2, H200).
    """
    high = lax.shift_right_arithmetic(x, jnp.int8(4))
    parts = [
        lax.dot_general(
            part.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(jnp.int32)
        for part in (high, x - 16 * high)
    ]  # fmt: skip
    return 16 * parts[0] + parts[1]


def _exact(x, weight, x_scale, w_scale, zero, bias):
    """The product in float32 of codes whose sums are exact (int8) or float32 at the highest precision (fp8)."""
    blocks = 1 if x_scale.shape[1] == 1 else x_scale.shape[1]
    total, step = jnp.float32(0.0), x.shape[1] // blocks
    for i in range(blocks):
        inputs = slice(i * step, (i + 1) * step)
        codes, rows = x[:, inputs], weight[:, inputs]
        if x.dtype == jnp.int8:
            sums = _exact_sums(codes, rows)
            if zero is not None:
                sums = sums - zero * jnp.sum(rows, axis=1, dtype=jnp.int32)[None, :]
            sums = sums.astype(jnp.float32)
        else:
            wide = [a.astype(jnp.float32) for a in (codes, rows)]
            sums = lax.dot_general(*wide, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        scale = w_scale if blocks == 1 else jnp.repeat(w_scale[i : i + 1], 128, axis=1)
        total = total + sums * x_scale[:, i : i + 1] * scale
    return total if bias is None else total + bias.astype(jnp.float32)[None, :]


@jax.jit
def _relative_error(out, x, weight, x_scale, w_scale, zero, bias):
    """`|out - exact| / |exact|`."""
    exact = _exact(x, weight, x_scale, w_scale, zero, bias)
    return jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)


def prepare(data: dict, config=None, out_dtype: str = "bfloat16", implementation="mosaic_gpu", compiler_options=None):
    """Compile the check of the kernel (or of XLA's program) on the first weight; the result runs it.

    It runs the kernel twice, over poisoned memory: its error, and whether both runs agree to the bit.
    """
    (weight, w_scale), x = data["weights"][0], data["x"]
    options = {"out_dtype": out_dtype, "implementation": implementation, "config": config}

    def product(x, weight, x_scale, w_scale, zero, bias):
        return int8_matmul(x, weight, w_scale, x_scale, x_zero_point=zero, bias=bias, **options)

    operands = (x, weight, data["x_scale"], w_scale, data["x_zero_point"], data["bias"])
    run = jax.jit(product).lower(*operands).compile(compiler_options=compiler_options)
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), out_dtype)
    relative_error = _relative_error.lower(out, *operands).compile()

    def verify() -> dict:
        outs = []
        for _ in range(2):
            poison = [jnp.full(out.shape, jnp.nan, out_dtype) for _ in range(4)]
            jax.block_until_ready(poison)
            del poison
            outs.append(jax.block_until_ready(run(*operands)))
        error, same = float(relative_error(outs[0], *operands)), bool((outs[0] == outs[1]).all())
        return {"relative_error": error, "deterministic": same, "ok": error <= TOLERANCE[out_dtype] and same}

    return verify


def prepare_siblings(seed: int, m: int, k: int, outputs: tuple[int, ...], dtype: str, form: str):
    """Compile one product with several weights; the result runs it twice and gives the worst error of any."""
    data = [problem(seed + i, m, k, n, dtype, form) for i, n in enumerate(outputs)]
    alike = [data[0][name] for name in ("x", "x_scale", "x_zero_point")]

    def product(x, x_scale, zero, weights):
        given = [Int8Weight(weight, scale, num_outputs=weight.shape[0]) for weight, scale in weights]
        return int8_matmul_many(x, given, x_scale, x_zero_point=zero, implementation="mosaic_gpu")

    weights = [d["weights"][0] for d in data]
    run = jax.jit(product).lower(*alike, weights).compile()

    def verify() -> dict:
        outs, again = run(*alike, weights), run(*alike, weights)
        x, x_scale, zero = alike
        errors = [
            float(_relative_error(out, x, weight, x_scale, scale, zero, None))
            for out, (weight, scale) in zip(outs, weights, strict=True)
        ]
        same = all(bool((a == b).all()) for a, b in zip(outs, again, strict=True))
        worst = max(errors)
        return {"relative_error": worst, "deterministic": same, "ok": worst <= TOLERANCE["bfloat16"] and same}

    return verify


def verify_quantization(seed: int, m: int, k: int, dtype: str, group: int | None, x_dtype: str, norm: bool) -> dict:
    """Compare the quantization kernel with XLA's program: scales, codes, and what becomes of a NaN and of zeros."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = (jax.random.normal(keys[0], (m, k)) * jnp.exp(3 * jax.random.normal(keys[1], (m, 1)))).astype(x_dtype)
    x = x.at[m // 2, k // 3].set(jnp.nan).at[0].set(0.0)
    options = {"group_size": group}
    if norm:
        options |= {"pre_scale": jax.random.uniform(keys[2], (k,), jnp.float32, 0.5, 2.0), "epsilon": 1e-6}
    got, want = (
        jax.jit(functools.partial(activation_quant, dtype=dtype, implementation=i, **options))(x)
        for i in ("mosaic_gpu", "xla")
    )
    nans = bool((jnp.isnan(got[1]) == jnp.isnan(want[1])).all()) and bool(jnp.isnan(got[1][m // 2]).any())
    finite = ~jnp.isnan(want[1])
    scale_error = float(jnp.max(jnp.where(finite, jnp.abs(got[1] / want[1] - 1.0), 0.0)))
    rows = finite.all(axis=1)[:, None]
    codes = [jax.lax.bitcast_convert_type(c, jnp.uint8) for c, _ in (got, want)]
    differing = float(jnp.mean(jnp.where(rows, codes[0] != codes[1], False)))
    # The mean square of a norm is summed in another order: scales move by a few eps, and then the codes at ties.
    ok = nans and scale_error <= (2.0**-20 if norm else 2.0**-23) and differing <= (1e-3 if norm else 1e-5)
    return {"nan_kept": nans, "scale_error": scale_error, "codes_differing": differing, "ok": ok}
