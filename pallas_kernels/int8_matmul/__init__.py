"""8-bit weights times 8-bit activations: int8 and float8_e4m3fn."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.int8_matmul.config import Config, candidates, default_config, supports, xla_is_faster
from pallas_kernels.int8_matmul.layout import BLOCK, output_sums, pack, unpack
from pallas_kernels.int8_matmul.mosaic_gpu import int8_matmul_mosaic_gpu
from pallas_kernels.int8_matmul.reference import int8_matmul_reference, is_blocked

__all__ = ["Config", "candidates", "default_config", "int8_matmul", "output_sums", "pack", "supports", "unpack"]

Implementation = Literal["mosaic_gpu", "xla"]


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one call."""

    implementation: Implementation | None
    config: Config | None
    out_dtype: jnp.dtype


def int8_matmul(
    x: jax.Array,
    weight: jax.Array,
    w_scale: jax.Array,
    x_scale: jax.Array | None = None,
    *,
    x_zero_point: jax.Array | None = None,
    weight_sum: jax.Array | None = None,
    bias: jax.Array | None = None,
    num_outputs: int | None = None,
    out_dtype=None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiply 8-bit activations by an 8-bit weight: `((x - x_zero_point) * x_scale) @ (codes * w_scale) + bias`.

    int8 products are summed exactly; fp8 products in float32, promoted out of the tensor core at least every 256
    inputs. A float x is quantized here, a scale a token (a scale per 128 inputs if the weight's scales are blocked),
    and its gradient passes straight through the rounding. Under `vmap` tokens fold into one product, and weights are
    taken one after another.

    Args:
        x: codes [..., K] of the weight's dtype, or bfloat16, float16 or float32.
        weight: int8 or float8_e4m3fn [padded N, padded K], from `pack`.
        w_scale: [1, N] a channel, [1, 1] for the tensor, or [padded K / 128, padded N / 128] for 128 x 128 blocks.
        x_scale: of codes, with x's rank: [..., 1] a token, all ones for the tensor, [..., padded K / 128] with a
            blocked w_scale.
        x_zero_point: integers [..., 1], for asymmetric int8 codes.
        weight_sum: int32 [padded N] from `output_sums`, which a zero point is multiplied by; summed here if absent.
        bias: [N].
        num_outputs: N where w_scale does not tell; the padded N by default.
        out_dtype: of the result; a float x's own by default, else bfloat16.
        implementation: "mosaic_gpu" (the Hopper kernel; never falls back), "xla", or None: the faster one on a CUDA
            device, as measured, and "xla" elsewhere; decided when the program is lowered for its platform.
        config: the kernel's configuration; by default what was tuned for such a problem, else the cost model's choice.

    Returns:
        [..., N] in out_dtype.

    Raises:
        TypeError: for operands of other dtypes.
        ValueError: for operands whose shapes do not fit.
        NotImplementedError: if `implementation="mosaic_gpu"` and the kernel cannot take the problem.

    >>> import jax.numpy as jnp
    >>> weight = pack(jnp.full((256, 64), 2, jnp.int8))
    >>> out = int8_matmul(jnp.ones((3, 256), jnp.bfloat16), weight, jnp.full((1, 64), 0.5))
    >>> out.shape, float(out[0, 0])
    ((3, 64), 256.0)
    """
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation={implementation!r}; accepted are 'mosaic_gpu', 'xla' and None")
    _check(x, weight, w_scale, x_scale, x_zero_point, bias)
    padded_n, padded_k = weight.shape
    n = num_outputs or (w_scale.shape[1] if w_scale.shape[0] == 1 and w_scale.shape[1] > 1 else padded_n)
    blocked = is_blocked(w_scale, weight)
    lead, rows = x.shape[:-1], jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, padded_k - x.shape[-1])))
    straight, out_dtype = None, jnp.dtype(out_dtype or (jnp.bfloat16 if x_scale is not None else x.dtype))
    if x_scale is None:
        straight = rows
        rows, x_scale = activation_quant(
            rows, weight.dtype, group_size=BLOCK if blocked else None, implementation=implementation
        )
    else:
        x_scale = x_scale.reshape(-1, x_scale.shape[-1]).astype(jnp.float32)
    if x_zero_point is not None:
        x_zero_point = x_zero_point.reshape(-1, 1).astype(jnp.int32)
        weight_sum = output_sums(weight) if weight_sum is None else weight_sum
    else:
        weight_sum = None
    if w_scale.shape[0] == 1 and 1 < w_scale.shape[1] < padded_n and not blocked:
        w_scale = jnp.pad(w_scale, ((0, 0), (0, padded_n - n)))
    if bias is not None:
        bias = jnp.pad(bias, (0, padded_n - bias.shape[0]))
    call = _resolve(_Call(implementation, config, out_dtype), rows, weight, x_scale, w_scale, x_zero_point)
    out = _multiply(call, straight, (rows, weight, x_scale, w_scale, x_zero_point, weight_sum, bias))
    return out[:, :n].reshape(*lead, n)  # pyright: ignore[reportIndexIssue] - custom_vjp loses the type


def _check(x, weight, w_scale, x_scale, x_zero_point, bias):
    """Refuse operands that do not fit, by name."""
    if weight.ndim != 2 or w_scale.ndim != 2 or x.ndim < 1:
        raise ValueError(
            f"int8_matmul takes x [..., K], weight [N, K] (see pack) and w_scale of two dimensions; got x {x.shape}, "
            f"weight {weight.shape}, w_scale {w_scale.shape} (vmap over leading weight axes)"
        )
    n, k = weight.shape
    if n % BLOCK or k % BLOCK or not k - BLOCK < x.shape[-1] <= k:
        raise ValueError(
            f"weight has shape {weight.shape}; x with K = {x.shape[-1]} needs [N, K], each padded to 128 by pack()"
        )
    _check_dtypes(x, weight, x_scale)
    _check_scales(x, weight, w_scale, x_scale)
    zero_shape = (*x.shape[:-1], 1)
    if x_zero_point is not None and (weight.dtype != jnp.int8 or x_scale is None or x_zero_point.shape != zero_shape):
        raise ValueError(
            f"x_zero_point has shape {x_zero_point.shape}; with int8 codes and their x_scale it is {zero_shape}"
        )
    if bias is not None and (bias.ndim != 1 or not n - BLOCK < bias.shape[0] <= n):
        raise ValueError(f"bias has shape {bias.shape}, expected (N,)")


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


def _resolve(call: _Call, x, weight, x_scale, w_scale, x_zero_point) -> _Call:
    """Decide what a call runs, as far as that can be known before it is lowered."""
    blocked, mixed = _forms(weight, x_scale, w_scale)
    if x_zero_point is not None and (blocked or mixed):
        raise NotImplementedError("int8_matmul: a zero point with blocked scales")
    reason = supports(weight.dtype, blocked=blocked, mixed=mixed, config=call.config, out_dtype=call.out_dtype)
    if call.implementation == "mosaic_gpu" and reason is not None:
        raise NotImplementedError(f"int8_matmul: {reason}")
    slower = call.implementation is None and call.config is None and _slower(x, weight, blocked)
    by_xla = reason is not None or x.shape[0] == 0 or slower
    return dataclasses.replace(call, implementation="xla") if by_xla else call


def _slower(x, weight, blocked: bool) -> bool:
    """Whether the kernel was measured to be the slower choice."""
    n, k = weight.shape
    return xla_is_faster(x.shape[0], k, n, weight.dtype, blocked=blocked)


def _forms(weight, x_scale, w_scale) -> tuple[bool, bool]:
    """Whether both scales are blocked, and whether only one is."""
    pair = x_scale.shape[1] > 1, is_blocked(w_scale, weight)
    return all(pair), any(pair) and not all(pair)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(call: _Call, x, operands) -> jax.Array:
    """`[M, K]` to `[M, N]`, all padded; `x` is the float activation, if any, that the codes came from."""
    del x
    return _batchable(call)(*operands)


def _multiply_forward(call, x, operands):
    return _multiply(call, x, operands), (x, operands)


def _multiply_backward(call, residuals, cotangent):
    x, (codes, weight, x_scale, w_scale, x_zero_point, weight_sum, bias) = residuals

    def product(x_scale, w_scale, bias):
        return int8_matmul_reference(codes, weight, x_scale, w_scale, x_zero_point, weight_sum, bias, call.out_dtype)

    _, vjp = jax.vjp(product, x_scale, w_scale, bias)
    dx_scale, dw_scale, dbias = vjp(cotangent)
    dx = None
    if x is not None:
        blocks = jnp.repeat(w_scale, BLOCK, axis=1) if is_blocked(w_scale, weight) else w_scale
        blocks = jnp.repeat(blocks, BLOCK, axis=0) if is_blocked(w_scale, weight) else blocks
        dense = (weight.astype(jnp.float32) * blocks.T.astype(jnp.float32)).astype(x.dtype)
        dx = jnp.matmul(cotangent.astype(x.dtype), dense)
    return dx, (None, None, dx_scale, dw_scale, None, None, dbias)


_multiply.defvjp(_multiply_forward, _multiply_backward)


@functools.cache
def _batchable(call: _Call):
    """The product with its vmap rule: batched tokens fold into M, batched weights are mapped over."""

    @jax.custom_batching.custom_vmap
    def product(*operands):
        return _dispatch(call, *operands)

    @product.def_vmap
    def batched(axis_size, in_batched, *operands):
        x, weight, x_scale, w_scale, x_zero_point, weight_sum, bias = operands
        tokens = (in_batched[0], in_batched[2], in_batched[4])
        weights = (in_batched[1], in_batched[3], in_batched[5], in_batched[6])
        if not any(jax.tree.leaves(weights)):
            m = x.shape[-2]
            x, x_scale, x_zero_point = (
                _fold(a, flag, axis_size, m) for a, flag in zip((x, x_scale, x_zero_point), tokens, strict=True)
            )
            out = product(x, weight, x_scale, w_scale, x_zero_point, weight_sum, bias)
            return out.reshape(axis_size, m, out.shape[1]), True

        def one(i):
            return product(
                *(a[i] if a is not None and flag else a for a, flag in zip(operands, in_batched, strict=True))
            )

        return lax.map(one, jnp.arange(axis_size)), True

    return product


def _fold(a, is_batched: bool, axis_size: int, m: int):
    """An operand of every token, batch and tokens one dimension."""
    if a is None:
        return None
    a = a if is_batched else a[None]
    return jnp.broadcast_to(a, (axis_size, m, a.shape[-1])).reshape(axis_size * m, a.shape[-1])


def _dispatch(call: _Call, *operands):
    """Run the named implementation, or the one for the platform that the program is lowered for."""
    xla = functools.partial(int8_matmul_reference, out_dtype=call.out_dtype)
    if call.implementation == "xla":
        return xla(*operands)
    kernel = functools.partial(_mosaic_gpu, call)
    return (
        kernel(*operands)
        if call.implementation == "mosaic_gpu"
        else lax.platform_dependent(*operands, cuda=kernel, default=xla)
    )


def _mosaic_gpu(call: _Call, x, weight, x_scale, w_scale, x_zero_point, weight_sum, bias):
    blocked, _ = _forms(weight, x_scale, w_scale)
    n, k = weight.shape
    config = call.config or default_config(x.shape[0], k, n, weight.dtype, blocked=blocked, out_dtype=call.out_dtype)
    if not blocked:
        x_scale, w_scale = x_scale.reshape(-1), w_scale.reshape(-1)
    else:
        x_scale = x_scale.T
    zero = None if x_zero_point is None else x_zero_point.reshape(-1)
    return int8_matmul_mosaic_gpu(
        x, weight, x_scale, w_scale, zero, weight_sum, bias, out_dtype=call.out_dtype, config=config
    )
