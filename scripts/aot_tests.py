"""Print the AOT test files to run: all of them, or those of the kernels that changed since a given commit.

Usage: python scripts/aot_tests.py [COMMIT]

A kernel is a folder of pallas_kernels/ and its tests are tests/pallas_kernels/test_aot_<kernel>.py. A kernel counts as
changed when its files, its tests, or a kernel that it imports did. A change to a file that is no kernel's own (_aot.py,
the target description, the pinned versions) changes them all. A kernel without AOT tests is an error.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
KERNELS = sorted(path.parent.name for path in ROOT.glob("pallas_kernels/*/mosaic_gpu.py"))
WATCHED = ("pallas_kernels", "tests/pallas_kernels", "pyproject.toml", "constraints.txt")


def test_file(kernel: str) -> pathlib.Path:
    return ROOT / "tests" / "pallas_kernels" / f"test_aot_{kernel}.py"


def imported_kernels(kernel: str) -> set[str]:
    sources = "".join(path.read_text() for path in (ROOT / "pallas_kernels" / kernel).glob("*.py"))
    return {other for other in KERNELS if re.search(rf"pallas_kernels\b.*\b{other}\b", sources)} - {kernel}


def owner(path: str) -> str | None:
    """The kernel that a changed file belongs to, or None where it concerns every kernel."""
    for kernel in KERNELS:
        if path.startswith(f"pallas_kernels/{kernel}/") or path == f"tests/pallas_kernels/test_aot_{kernel}.py":
            return kernel
    return None


def changed_kernels(commit: str) -> set[str]:
    command = ["git", "-C", str(ROOT), "diff", "--name-only", commit, "--", *WATCHED]
    paths = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    owners = {owner(path) for path in paths if not re.fullmatch(r"tests/pallas_kernels/test_(?!aot_).*", path)}
    if None in owners:
        return set(KERNELS)
    changed = {kernel for kernel in owners if kernel}
    while users := {kernel for kernel in KERNELS if imported_kernels(kernel) & changed} - changed:
        changed |= users
    return changed


def main(commit: str | None = None) -> None:
    kernels = changed_kernels(commit) if commit else set(KERNELS)
    missing = [test_file(kernel).relative_to(ROOT) for kernel in sorted(kernels) if not test_file(kernel).exists()]
    if missing or not KERNELS:
        sys.exit(f"no AOT tests: {', '.join(map(str, missing)) or 'pallas_kernels has no kernel'}")
    print(*(test_file(kernel).relative_to(ROOT) for kernel in sorted(kernels)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
