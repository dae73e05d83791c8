"""The kernel's body on a CPU, block by block, thread by thread: barriers that never complete show as a hang here.

JAX's interpreter of Mosaic GPU programs lacks three things that the kernel uses, supplied here: a product whose left
operand is in registers, a store to another block of the cluster, and the inline PTX that unpacks codes (replaced by
the layout's own inverse).
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_matmul import Config, pack, unpack
from pallas_kernels.int4_matmul.layout import CODE_OFFSET
from pallas_kernels.int4_matmul.operand import MAGIC

kernel = importlib.import_module("pallas_kernels.int4_matmul.mosaic_gpu")


def unpack_int4(tile, offset, scale, *, first_step, depth, dtype):
    """What `operand.unpack_int4` emits, in jnp."""
    codes = unpack(tile[...][None, None]).astype(jnp.float32) + CODE_OFFSET
    magic = (codes + MAGIC[jnp.dtype(dtype).name]).astype(dtype)
    weights = magic - offset.astype(dtype)[None, :]
    if scale is not None:
        weights = weights * scale.astype(dtype)[None, :]
    return weights[16 * first_step : 16 * first_step + depth].T


def wgmma_from_registers(product):
    """The interpreter's product, for a left operand that is a value."""

    def wgmma(*, a_allocation_key_as_array, **others):
        if a_allocation_key_as_array.ndim < 2:
            return product(a_allocation_key_as_array=a_allocation_key_as_array, **others)
        memory = gpu_callbacks._get_shared_memory()
        thread, log = others["thread"], None
        b_key = gpu_callbacks.HostAllocationKey.from_array(others["b_allocation_key_as_array"])
        acc_key = gpu_callbacks.HostAllocationKey.from_array(others["acc_allocation_key_as_array"])
        clean = lambda transforms: jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))  # noqa: E731
        b_range = memory.access(b_key, clean(others["b_transforms"]))
        acc_range = memory.access(acc_key, clean(others["acc_transforms"]))
        b, *_ = memory.get_buffer_content(b_key, b_range, thread, logging_info=log)
        acc, *_ = memory.get_buffer_content(acc_key, acc_range, thread, logging_info=log)
        total = acc + np.matmul(np.asarray(a_allocation_key_as_array, np.float32), np.asarray(b, np.float32))
        memory.store_buffer_content(acc_key, acc_range, total.astype(acc.dtype), thread, logging_info=log)
        return others["token"]

    return wgmma


def store_to_peer(token, thread, value, ref_key, ref_transforms, barrier_key, peer):
    """Write to a buffer of another block of the cluster, then arrive at that block's barrier."""
    memory = gpu_callbacks._get_shared_memory()
    there = lambda key: dataclasses.replace(  # noqa: E731
        gpu_callbacks.HostAllocationKey.from_array(key), block_id=int(peer)
    )
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(ref_transforms))
    ref = there(ref_key)
    memory.store_buffer_content(ref, memory.access(ref, transforms), np.asarray(value), thread, logging_info=None)
    barrier, clock = memory.get_barrier_and_increment_clock(there(barrier_key), thread)
    barrier.arrive(thread, clock, None)
    return token


class PeerStores:
    """Teaches the interpreter `async_store_smem`: noted when it is met, done at the `commit_smem` put behind it."""

    def __init__(self, monkeypatch):
        interpreter = jaxpr_interpret.JaxprInterpreter
        self.noted, self.arithmetic, self.commit = (
            [],
            interpreter._interpret_arithmetic_primitive,
            interpreter._interpret_commit_smem_p,
        )
        monkeypatch.setattr(interpreter, "_interpret_arithmetic_primitive", lambda *a: self.note(*a))
        monkeypatch.setattr(interpreter, "_interpret_commit_smem_p", lambda *a: self.do(*a))
        store = plgpu.async_store_smem
        monkeypatch.setattr(plgpu, "async_store_smem", lambda *a, **k: (store(*a, **k), plgpu.commit_smem()))

    def note(self, interpreter, eqn, invals):
        if eqn.primitive.name != "async_store_smem":
            return self.arithmetic(interpreter, eqn, invals)
        value, ref, barrier, peer, *leaves = invals()
        trees = eqn.params["ref_transforms_treedef"], eqn.params["barrier_transforms_treedef"]
        count = trees[0].num_leaves
        key, transforms = jaxpr_interpret.resolve_ref(eqn.invars[1].aval, ref, trees[0].unflatten(leaves[:count]))
        arrive_at = jaxpr_interpret._get_barrier_allocation_key_from_inval(barrier, trees[1], leaves[count:])
        self.noted.append((value, key, transforms, arrive_at, peer))
        return []

    def do(self, interpreter, eqn, token, invals):
        if not self.noted:
            return self.commit(interpreter, eqn, token, invals)
        shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
        return callback.io_callback(store_to_peer, shape, token, interpreter.thread, *self.noted.pop()), []


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(kernel, "unpack_int4", unpack_int4)
    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma_from_registers(gpu_callbacks.wgmma))
    PeerStores(monkeypatch)

    def run(x, weights, config):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore")):
            return kernel.int4_matmul_mosaic_gpu(x, weights, config=config)

    return run


CONFIG = Config(block_m=8, block_k=128, num_stages=2, num_warpgroups=1, split_k=1, scale_after=True)


# Several tiles a block, steps that no count of blocks divides, more steps than stages and fewer.
@pytest.mark.parametrize(
    ("m", "k", "n", "group", "clusters", "changes"),
    [
        (8, 384, 256, 128, 1, {"num_warpgroups": 2, "num_stages": 4}),
        (32, 384, 128, 64, 1, {"block_m": 16, "scale_after": False, "num_stages": 3}),
        (16, 896, 192, 64, 2, {"block_m": 16, "split_k": 4}),
        (16, 128, 128, 32, 1, {"block_m": 16, "split_k": 2}),
        (32, 384, 256, 128, 1, {"block_m": 16, "multicast": 2}),
    ],
    ids=["after", "before", "split", "idle", "multicast"],
)
def test_interpreted_kernel_is_the_product(rng, interpreted, monkeypatch, m, k, n, group, clusters, changes):
    monkeypatch.setattr(kernel, "num_clusters", lambda cluster, blocks_per_sm: clusters)
    codes = rng.integers(-8, 8, (k, n)).astype(np.int8)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    x, scale, bias = half(m, k), half(k // group, n), half(n)
    zero = jnp.asarray(rng.integers(-8, 8, (k // group, n)), jnp.bfloat16)
    config = dataclasses.replace(CONFIG, **changes)
    (out,) = interpreted(x, ((pack(jnp.asarray(codes)), scale, zero, bias),), config=config)
    shifted = codes.reshape(k // group, group, n) - np.asarray(zero, np.float64)[:, None]
    weight = (shifted * np.asarray(scale, np.float64)[:, None]).reshape(k, n)
    exact = np.asarray(x, np.float64) @ weight + np.asarray(bias, np.float64)
    # The result, and the weight if it is scaled before the product, are rounded to 8 significant bits.
    assert np.linalg.norm(np.asarray(out, np.float64) - exact) <= 2.0**-8 * np.linalg.norm(exact)


# Tiles of several weights in one launch: a block, and a cluster that shares x, goes from one weight to the next.
@pytest.mark.parametrize("changes", [{}, {"split_k": 2}, {"multicast": 2}], ids=["alone", "split", "shared"])
def test_interpreted_kernel_takes_several_weights(rng, interpreted, monkeypatch, changes):
    monkeypatch.setattr(kernel, "num_clusters", lambda cluster, blocks_per_sm: 2)
    m, k, group = 16, 256, 128
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    x, weights, exact = half(m, k), [], []
    for n in (192, 64, 128):
        codes, scale, bias = rng.integers(-8, 8, (k, n)).astype(np.int8), half(k // group, n), half(n)
        weights.append((pack(jnp.asarray(codes)), scale, None, bias))
        weight = codes * np.repeat(np.asarray(scale, np.float64), group, axis=0)
        exact.append(np.asarray(x, np.float64) @ weight + np.asarray(bias, np.float64))
    config = dataclasses.replace(CONFIG, **({"block_m": 16} | changes))
    outs = interpreted(x, tuple(weights), config=config)
    for out, right in zip(outs, exact, strict=True):  # rounded to 8 significant bits
        assert np.linalg.norm(np.asarray(out, np.float64) - right) <= 2.0**-8 * np.linalg.norm(right)
