"""What one product of 8-bit codes and several share: checks, derivatives, batches, and the choice of what runs."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._batching import foldable
from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.int8_matmul.config import Config, default_config, supports, xla_is_faster
from pallas_kernels.int8_matmul.layout import BLOCK, output_sums
from pallas_kernels.int8_matmul.mosaic_gpu import int8_matmul_mosaic_gpu
from pallas_kernels.int8_matmul.reference import int8_matmul_reference, is_blocked

Implementation = Literal["mosaic_gpu", "xla"]


class Int8Weight(NamedTuple):
    """One weight of `int8_matmul_many`; its fields are those of `int8_matmul`.

    Attributes:
        weight: int8 or float8_e4m3fn [padded N, padded K], from `pack`.
        w_scale: [1, N], [1, 1], or [padded K / 128, padded N / 128].
        weight_sum: int32 [padded N], or None.
        bias: [N], or None.
        num_outputs: N where w_scale does not tell.
    """

    weight: jax.Array
    w_scale: jax.Array
    weight_sum: jax.Array | None = None
    bias: jax.Array | None = None
    num_outputs: int | None = None

    @property
    def n(self) -> int:
        """Outputs that are not padding."""
        rows, columns = self.w_scale.shape
        return self.num_outputs or (columns if rows == 1 and columns > 1 else self.weight.shape[0])

    @property
    def blocked(self) -> bool:
        """Whether scales belong to blocks."""
        return is_blocked(self.w_scale, self.weight)


class Rows(NamedTuple):
    """Activations: codes [M, K], float32 scales [M or 1, 1] or [M, K / 128], int32 zero points [M, 1] or None."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None


class Call(NamedTuple):
    """The static part of one call."""

    implementation: Implementation | None
    config: Config | None
    out_dtype: jnp.dtype


def packed_matmul(
    x: jax.Array,
    weights: Sequence[Int8Weight],
    x_scale: jax.Array | None,
    *,
    x_zero_point: jax.Array | None,
    out_dtype,
    implementation: Implementation | None,
    config: Config | None,
) -> list[jax.Array]:
    """Multiply as `int8_matmul_many` does."""
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    weights = [Int8Weight(*weight) for weight in weights]
    for weight in weights:
        _check(x, weight, x_scale, x_zero_point)
    _check_alike(weights)
    padded_k = weights[0].weight.shape[1]
    lead, rows = x.shape[:-1], jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, padded_k - x.shape[-1])))
    straight, out_dtype = None, jnp.dtype(out_dtype or (jnp.bfloat16 if x_scale is not None else x.dtype))
    if x_scale is None:
        straight, group = rows, BLOCK if weights[0].blocked else None
        rows, x_scale = activation_quant(rows, weights[0].weight.dtype, group_size=group, implementation=implementation)
    else:
        x_scale = x_scale.reshape(-1, x_scale.shape[-1]).astype(jnp.float32)
    zero = None if x_zero_point is None else x_zero_point.reshape(-1, 1).astype(jnp.int32)
    channels = any(weight.w_scale.shape[1] > 1 for weight in weights)
    operands = tuple(_padded(weight, channels, zero is not None) for weight in weights)
    call = resolve(Call(implementation, config, out_dtype), Rows(rows, x_scale, zero), operands)
    outs = _multiply_jit(call, straight, Rows(rows, x_scale, zero), operands)
    return [out[:, : w.n].reshape(*lead, w.n) for out, w in zip(outs, weights, strict=True)]


def _padded(weight: Int8Weight, channels: bool, has_zero_point: bool) -> Int8Weight:
    """Vectors filled up to the packed outputs, and the sums of codes where a zero point needs them."""
    padded_n, w_scale, sums, bias = weight.weight.shape[0], weight.w_scale, None, weight.bias
    if not weight.blocked and channels:
        scale = jnp.broadcast_to(w_scale, (1, max(weight.n, w_scale.shape[1])))
        w_scale = jnp.pad(scale, ((0, 0), (0, padded_n - scale.shape[1])))
    if has_zero_point:
        sums = output_sums(weight.weight) if weight.weight_sum is None else weight.weight_sum
    if bias is not None:
        bias = jnp.pad(bias, (0, padded_n - bias.shape[0]))
    return Int8Weight(weight.weight, w_scale, sums, bias)


def _check(x, weight: Int8Weight, x_scale, x_zero_point):
    """Refuse operands that do not fit, by name."""
    codes, w_scale, _, bias, _ = weight
    if codes.ndim != 2 or w_scale.ndim != 2 or x.ndim < 1:
        raise ValueError(
            f"int8_matmul takes x [..., K], weight [N, K] (see pack) and w_scale of two dimensions; got x {x.shape}, "
            f"weight {codes.shape}, w_scale {w_scale.shape} (vmap over leading weight axes)"
        )
    n, k = codes.shape
    if n % BLOCK or k % BLOCK or not k - BLOCK < x.shape[-1] <= k:
        raise ValueError(
            f"weight has shape {codes.shape}; x with K = {x.shape[-1]} needs [N, K], each padded to 128 by pack()"
        )
    _check_dtypes(x, codes, x_scale)
    _check_scales(x, codes, w_scale, x_scale)
    zero_shape = (*x.shape[:-1], 1)
    if x_zero_point is not None and (codes.dtype != jnp.int8 or x_scale is None or x_zero_point.shape != zero_shape):
        raise ValueError(
            f"x_zero_point has shape {x_zero_point.shape}; with int8 codes and their x_scale it is {zero_shape}"
        )
    if bias is not None and (bias.ndim != 1 or not n - BLOCK < bias.shape[0] <= n):
        raise ValueError(f"bias has shape {bias.shape}, expected (N,)")


def _check_alike(weights: Sequence[Int8Weight]):
    """Refuse weights that one launch cannot take together."""
    if not weights:
        raise ValueError("int8_matmul_many: weights is empty; it takes one or more")
    if len({(w.weight.dtype, w.weight.shape[1], w.blocked, w.bias is None) for w in weights}) != 1:
        raise ValueError("int8_matmul_many: the weights differ in dtype, K, blocked scales, or in having a bias or not")
    if len(weights) > 1 and weights[0].blocked:
        raise NotImplementedError("int8_matmul_many: blocked scales; multiply by one weight after another")


def _check_dtypes(x, weight, x_scale):
    if weight.dtype not in (jnp.int8, jnp.float8_e4m3fn):
        raise TypeError(f"weight is {weight.dtype}; accepted are int8 and float8_e4m3fn")
    if x_scale is not None and x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}; codes with a scale must have the weight's dtype")
    if x_scale is None and x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(
            f"x is {x.dtype} without x_scale; accepted are bfloat16, float16, float32, or codes and x_scale"
        )


def _check_scales(x, weight, w_scale, x_scale):
    n, k = weight.shape
    blocks, columns = (k // BLOCK, n // BLOCK), w_scale.shape[1]
    if w_scale.shape != blocks and (w_scale.shape[0] != 1 or not (columns == 1 or n - BLOCK < columns <= n)):
        raise ValueError(f"w_scale has shape {w_scale.shape}; accepted for this weight are (1, N), (1, 1) and {blocks}")
    if x_scale is None:
        return
    leads = (x.shape[:-1], (1,) * (x.ndim - 1))
    if x_scale.ndim != x.ndim or x_scale.shape[:-1] not in leads or x_scale.shape[-1] not in (1, k // BLOCK):
        raise ValueError(
            f"x_scale has shape {x_scale.shape}; for x {x.shape} it is [..., 1], all ones or [..., {k // BLOCK}]"
        )


def resolve(call: Call, rows: Rows, weights: Sequence[Int8Weight]) -> Call:
    """Decide what a call runs, as far as that can be known before it is lowered."""
    dtype, blocked, mixed = rows.codes.dtype, *_forms(rows, weights[0])
    if rows.zero_point is not None and (blocked or mixed):
        raise NotImplementedError("int8_matmul: a zero point with blocked scales")
    options = {"several": len(weights) > 1, "config": call.config, "out_dtype": call.out_dtype}
    reason = supports(dtype, blocked=blocked, mixed=mixed, **options)
    if call.implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"int8_matmul: {reason}")
    m, k, n = _problem(rows, weights)
    slower = call.implementation is None and call.config is None and xla_is_faster(m, k, n, dtype, blocked=blocked)
    return call._replace(implementation="xla") if reason is not None or m == 0 or slower else call


def _problem(rows: Rows, weights: Sequence[Int8Weight]) -> tuple[int, int, int]:
    """Tokens, inputs, and the outputs of all weights."""
    m, k = rows.codes.shape
    return m, k, sum(weight.weight.shape[0] for weight in weights)


def _forms(rows: Rows, weight: Int8Weight) -> tuple[bool, bool]:
    """Whether both scales are blocked, and whether only one is."""
    pair = rows.scale.shape[1] > 1, weight.blocked
    return all(pair), any(pair) and not all(pair)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(call: Call, x, rows: Rows, weights: tuple[Int8Weight, ...]) -> tuple[jax.Array, ...]:
    """`[M, K]` to `[M, N]` for each weight, all padded; `x` is the float activation, if any, that codes came from."""
    del x
    return _batchable(call)(rows, weights)


def _multiply_forward(call, x, rows, weights):
    return _multiply(call, x, rows, weights), (x, rows, weights)


def _multiply_backward(call, residuals, cotangents):
    x, rows, weights = residuals

    def product(x_scale, floats):
        given = [w._replace(w_scale=s, bias=b) for w, (s, b) in zip(weights, floats, strict=True)]
        return _reference(call, rows._replace(scale=x_scale), given)

    _, vjp = jax.vjp(product, rows.scale, [(w.w_scale, w.bias) for w in weights])
    slope, slopes = vjp(cotangents)
    dx = None
    if x is not None:
        dx = sum(jnp.matmul(c.astype(x.dtype), _dense(w, x.dtype)) for c, w in zip(cotangents, weights, strict=True))
    return dx, Rows._make((None, slope, None)), tuple(Int8Weight._make((None, s, None, b, None)) for s, b in slopes)


def _dense(weight: Int8Weight, dtype) -> jax.Array:
    """The dequantized weight `[N, K]`."""
    scale = weight.w_scale
    if weight.blocked:
        scale = jnp.repeat(jnp.repeat(scale, BLOCK, axis=1), BLOCK, axis=0)
    return (weight.weight.astype(jnp.float32) * scale.T.astype(jnp.float32)).astype(dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)
# A model calls the same product in every layer: traced and lowered once.
_multiply_jit = jax.jit(_multiply, static_argnums=0)


@functools.cache
def _batchable(call: Call):
    return foldable(functools.partial(_dispatch, call))


def _dispatch(call: Call, rows: Rows, weights):
    """Run the named implementation, or the one for the platform that the program is lowered for."""
    rows, xla = Rows(*rows), functools.partial(_reference, call)
    if call.implementation == "xla":
        return xla(rows, weights)
    kernel = functools.partial(_mosaic_gpu, call)
    if call.implementation == "mosaic_gpu":
        return kernel(rows, weights)
    return lax.platform_dependent(rows, weights, cuda=kernel, default=xla)


def _reference(call: Call, rows: Rows, weights):
    codes, scale, zero = rows
    return tuple(
        int8_matmul_reference(codes, w.weight, scale, w.w_scale, zero, w.weight_sum, w.bias, call.out_dtype)
        for w in weights
    )


def _mosaic_gpu(call: Call, rows: Rows, weights):
    blocked, _ = _forms(rows, weights[0])
    m, k, n = _problem(rows, weights)
    dtype = rows.codes.dtype
    config = call.config or default_config(m, k, n, dtype, blocked=blocked, out_dtype=call.out_dtype)
    if len(weights) > 1 and supports(dtype, blocked=blocked, several=True, config=config) is not None:
        # A launch is cheap beside the products of so many tokens; another cut would not be.
        return tuple(_mosaic_gpu(call, rows, (weight,))[0] for weight in weights)
    x_scale = rows.scale.T if blocked else rows.scale.reshape(-1)
    zero = None if rows.zero_point is None else rows.zero_point.reshape(-1)
    operands = [w if blocked else w._replace(w_scale=w.w_scale.reshape(-1)) for w in weights]
    return int8_matmul_mosaic_gpu(
        rows.codes, x_scale, zero, [w[:4] for w in operands], out_dtype=call.out_dtype, config=config
    )
