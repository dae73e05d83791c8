#!/bin/sh
# Compiles the kernels for an H200: all of them, or those that changed since the commit given as $1.
set -eu

# XLA takes the first ptxas on PATH: make that the pinned one, whatever this machine has.
cuda_bin=$(.venv/bin/python -c 'import nvidia.cu13; print(nvidia.cu13.__path__[0])')/bin
[ -x "$cuda_bin/ptxas" ] || { echo "no ptxas at $cuda_bin: rm .venv/aot.stamp and run make aot again" >&2; exit 1; }
export PATH="$cuda_bin:$PATH"
"$cuda_bin/ptxas" --version | tail -2

tests=$(.venv/bin/python scripts/aot_tests.py "$@")
[ -n "$tests" ] || { echo "no kernel changed since $1"; exit 0; }
# shellcheck disable=SC2086  # one path a line, none with spaces
exec .venv/bin/python -m pytest -m aot -n 2 --dist worksteal $tests
