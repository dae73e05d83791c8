"""What JAX's interpreter of Mosaic GPU programs lacks and the kernels use."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax.experimental.pallas import mosaic_gpu as plgpu


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


@gpu_callbacks.fail_on_exception
def store_to_peer(token, thread, value, ref_key, ref_transforms, barrier_key, peer):
    """Write to a buffer of another block of the cluster, then arrive at that block's barrier."""
    memory = gpu_callbacks._get_shared_memory()
    there = lambda key: dataclasses.replace(  # noqa: E731
        gpu_callbacks.HostAllocationKey.from_array(key), block_id=int(peer)
    )
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(ref_transforms))
    ref = there(ref_key)
    # A cluster's blocks start together on a GPU, when all have their memory; here one may be ahead of another.
    while not {ref, there(barrier_key)} <= memory.mem.keys():
        memory.check_failed()
        time.sleep(0.001)
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
def complete_interpreter(monkeypatch):
    """The interpreter with products of a left operand in registers, and stores to another block of the cluster."""
    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma_from_registers(gpu_callbacks.wgmma))
    PeerStores(monkeypatch)
