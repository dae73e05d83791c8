"""Clocks for kernels on a GPU: the profiler's kernel times, CUDA graph replay; and what a number was taken under."""

import datetime
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import time

import jax

# Weights are rotated over more than this many bytes, several times the 50 MB of a Hopper's L2 cache.
ROTATED_BYTES = 240e6


def rotations(bytes_per_call: int) -> int:
    """How many copies of an operand make a rotation that the L2 cache cannot hold."""
    return max(2, math.ceil(ROTATED_BYTES / bytes_per_call))


def kernel_microseconds(program, args: tuple, *, calls: int, iterations: int = 10) -> float:
    """Time of every kernel that a program launches, by CUPTI, per call of the op under test.

    Args:
      program: a jitted function whose body calls the op `calls` times on different operands.
      args: its arguments, on the device.
      calls: calls of the op in one run of the program.
      iterations: runs; the median is taken.
    """
    runs = _profiled_runs(program, args, iterations)
    return statistics.median(sum(milliseconds for _, milliseconds in run) for run in runs) * 1e3 / calls


def microseconds_of_each_kernel(program, args: tuple, *, iterations: int = 10) -> tuple[float, list[tuple[str, float]]]:
    """Time of a run of a program, by CUPTI: of all its kernels, and of each by name in order; medians over the runs."""
    runs = _profiled_runs(program, args, iterations)
    each = [(name, statistics.median(run[i][1] for run in runs) * 1e3) for i, (name, _) in enumerate(runs[0])]
    return statistics.median(sum(milliseconds for _, milliseconds in run) for run in runs) * 1e3, each


def _profiled_runs(program, args: tuple, iterations: int) -> list[list[tuple[str, float]]]:
    """Of each run of a program, names and milliseconds of its kernels."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.Cupti(finalize=False).measure(program, aggregate=False, iterations=iterations)(*args)
    if not runs:
        raise RuntimeError("the profiler recorded no kernel")
    return runs if iterations > 1 else [runs]


def launched_kernels(run) -> list[tuple[str, float]]:
    """Names and milliseconds of the kernels that a function launches, by CUPTI; it may donate and carry state.

    Args:
      run: waits for its own results.
    """
    from jax._src.lib import mosaic_gpu as mosaic_gpu_lib

    recorder = mosaic_gpu_lib._mosaic_gpu_ext  # jax's public Cupti runs a program on one set of arguments only
    recorder._cupti_init()
    try:
        run()
    finally:
        kernels = recorder._cupti_get_timings(False)
    return list(kernels)


def wall_microseconds(program, args: tuple, *, calls: int, seconds: float = 0.2) -> float:
    """Time per call inside a jitted program, launches and gaps included: many runs enqueued, one wait."""
    jax.block_until_ready(program(*args))
    once = time.perf_counter()
    jax.block_until_ready(program(*args))
    once = time.perf_counter() - once
    samples = []
    for _ in range(3):
        runs = max(3, int(seconds / 3 / once))
        start = time.perf_counter()
        for _ in range(runs):
            out = program(*args)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / runs)
    return statistics.median(samples) * 1e6 / calls


def graph_microseconds(calls: list, *, replays: int = 20) -> float:
    """Time per call by replay of a CUDA graph of PyTorch calls: the clock of the published tables."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    samples = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / replays)
    return statistics.median(samples) * 1e3 / len(calls)


def conditions() -> dict:
    """Date, device, versions and commit: what every figure is published with.

    The commit is what the environment variable JAXQUANT_COMMIT says (on a machine that has the files but no
    repository), else the repository's.
    """
    commit = os.environ.get("JAXQUANT_COMMIT", "")
    if not commit and shutil.which("git"):
        command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit or "unknown",
    }


def write_results(path: str | pathlib.Path, **results) -> None:
    """Write results as JSON, by name, with the conditions that they were measured in."""
    text = json.dumps({"conditions": conditions(), **results}, indent=1)
    pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


def measured_peaks() -> dict:
    """This card's own ceilings: bytes a second of a large copy (read and written) and bfloat16 operations a second."""
    import jax.numpy as jnp

    source = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    copy = kernel_microseconds(jax.jit(lambda a: a ^ jnp.uint32(1)), (source,), calls=1, iterations=5)
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in (1, 2))
    product = kernel_microseconds(jax.jit(jnp.matmul), (a, b), calls=1, iterations=5)
    return {"copy_bytes_per_s": 2 * source.nbytes / copy * 1e6, "bf16_flop_per_s": 2 * 8192**3 / product * 1e6}
