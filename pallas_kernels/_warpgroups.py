"""A block whose last warpgroup drives the copy engine while the others compute."""

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Registers a thread keeps, computing and copying, by the number of compute warpgroups: what the copying warpgroup gives
# back of its share at launch (168, 128, 96) pays for what the others take, in steps of 8.
REGISTERS = {2: (232, 40), 3: (152, 40), 4: (112, 24)}


def copy_and_compute(
    num_warpgroups: int,
    scratch: dict[str, Any],
    copy: Callable[[dict], None],
    compute: Callable[[Any, dict], None],
    registers: dict[int, tuple[int, int]] = REGISTERS,
    prepare: Callable[[dict], None] = lambda shared: None,
) -> None:
    """Run the two roles of a block over shared memory that all of its warpgroups see.

    Args:
      num_warpgroups: that compute; the kernel has one more, along its axis "warpgroup".
      scratch: shared memory and barriers, by name.
      copy: called as `copy(shared)` by one warp of the last warpgroup.
      compute: called as `compute(warpgroup, shared)` by the others.
      prepare: called as `prepare(shared)` by all of them before.
      registers: like `REGISTERS`; a number of warpgroups that is not in it keeps what it was launched with.
    """
    computing, copying = registers.get(num_warpgroups, (None, None))

    def scoped(shared):
        prepare(shared)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == num_warpgroups)
        def _copy():
            if copying is not None:
                plgpu.set_max_registers(copying, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(lambda: copy(shared))

        @pl.when(warpgroup < num_warpgroups)
        def _compute():
            if computing is not None:
                plgpu.set_max_registers(computing, action="increase")
            compute(warpgroup, shared)

    pl.run_scoped(scoped, scratch, collective_axes="warpgroup")
