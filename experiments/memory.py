"""Peak memory of a stretch of work: the accelerator's where there is one, else this process's."""

from __future__ import annotations

import pathlib
import resource

import jax


def reset_peak() -> None:
    """Starts counting the process's peak anew (Linux only; elsewhere the peak is since the process's start)."""
    clear = pathlib.Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The accelerator's peak bytes since the program's start, or the process's since `reset_peak`."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
