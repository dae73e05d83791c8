"""Compile a kernel for an H200 on a machine without a GPU, and read what the assembler said.

With the CUDA plugin wheels installed (no driver, no GPU) XLA compiles for a described target. What this catches:
layout and lowering errors, shared memory out of bounds, register spills, wgmma serialised by register pressure. What
it cannot: numerics, races, deadlocks, speed.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

_TARGET = pathlib.Path(__file__).parent / "h200_target_config.textproto"
SHARED_MEMORY_BYTES = 232448


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What ptxas reported for one Mosaic kernel."""

    name: str
    registers: int
    spill_bytes: int
    shared_memory_bytes: int
    serialized_wgmma: bool
    ptxas: str

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons this kernel must not ship; empty when it is fit."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of register spills")
        if self.serialized_wgmma:
            found.append("wgmma serialised (C7510/C7512)")
        if self.shared_memory_bytes > SHARED_MEMORY_BYTES:
            found.append(f"{self.shared_memory_bytes} bytes of shared memory, at most {SHARED_MEMORY_BYTES}")
        return tuple(found)


@functools.cache
def _device_sharding() -> NamedSharding:
    """A replicated sharding on one described H200."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=_TARGET.read_text()
    )
    return NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())


def compile_for_h200(fn, *args) -> tuple[str, tuple[KernelReport, ...]]:
    """Compile `fn` for an H200 and report on every Mosaic kernel in it.

    Args:
      fn: a function of arrays (not jitted: a cached trace would hide its kernels' reports).
      *args: arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are used.

    Returns:
      The compiled HLO as text, and one report per Mosaic kernel compiled.

    Raises:
      RuntimeError: if the CUDA plugin wheels are missing.
      ValueError: from the compiler, when a kernel exceeds the shared memory of the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        hlo = dumped_for_h200(fn, args, folder, MOSAIC_GPU_DUMP_PTXAS="1")
        reports = tuple(_report(path) for path in sorted(pathlib.Path(folder).glob("*.ptxas")))
    return hlo, reports


def dumped_for_h200(fn, args: tuple, folder: str, **variables: str) -> str:
    """Compile `fn` for an H200 while the kernels' compiler writes what `variables` name to a folder; gives the HLO."""
    sharding = _device_sharding()
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with _environment(MOSAIC_GPU_DUMP_TO=folder, **variables):
        compiled = jax.jit(lambda *a: fn(*a)).lower(*avals).compile()
    return compiled.as_text() or ""


@contextlib.contextmanager
def _environment(**variables: str):
    """Set environment variables (the compiler's only interface for dumps) and put the old ones back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _report(ptxas_file: pathlib.Path) -> KernelReport:
    text = ptxas_file.read_text()
    resources = ptxas_file.with_suffix(".resources.txt")
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else None
    return KernelReport(
        name=ptxas_file.stem,
        registers=_largest(r"Used (\d+) registers", text),
        spill_bytes=_largest(r"(\d+) bytes spill stores", text) + _largest(r"(\d+) bytes spill loads", text),
        shared_memory_bytes=int(shared.group(1)) if shared else 0,
        serialized_wgmma="C7510" in text or "C7512" in text,
        ptxas=text,
    )


def _largest(pattern: str, text: str) -> int:
    return max((int(value) for value in re.findall(pattern, text)), default=0)
