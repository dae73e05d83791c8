"""Small decode steps of each kind of cache and cut, for compute-sanitizer.

export XLA_PYTHON_CLIENT_PREALLOCATE=false
timeout 300 compute-sanitizer --tool memcheck python -m experiments.sanitize_decode_attention
timeout 300 compute-sanitizer --tool racecheck python -m experiments.sanitize_decode_attention
"""

import jax

from experiments import bench_decode_attention as bench
from pallas_kernels.decode_attention.cases import Case

# Pages, ragged lengths, an empty sequence, rings; two warpgroups a block and clusters, rows of two tiles.
RAGGED = Case(3, 512, 8, 2, lengths=(512, 0, 333))
PAGED = Case(2, 512, 8, 2, page_size=128, lengths=(449, 129))
STEPS = (
    (PAGED, "int4", [64, 2, 2, 2]),
    (RAGGED, "int8", [64, 2, 2, 2]),
    (RAGGED, "bf16", [64, 2, 1]),
)


def main() -> None:
    """Runs every step twice and prints what the checks say."""
    for case, mode, config in STEPS:
        item = {"mode": mode, "config": config}
        args = jax.jit(lambda key, case=case, mode=mode: bench.inputs(case, mode, key))(jax.random.key(3))
        run, checks = jax.jit(bench.program(case, item)), bench.checks(case, mode, args)
        print(case, mode, config, bench.verify(run, args, case, mode, checks), flush=True)


if __name__ == "__main__":
    main()
