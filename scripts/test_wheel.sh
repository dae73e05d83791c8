#!/bin/sh
# Builds the wheel, installs it alone into a new environment, and from outside the tree runs its doctests and
# scripts/wheel_check.py. A file that the wheel lacks cannot hide behind the one in the tree.
set -eu

root=$(pwd)
rm -rf dist .venv-wheel
.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
"$(scripts/find_python.sh)" -m venv .venv-wheel
python=$root/.venv-wheel/bin/python
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl pytest pytest-xdist

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
cp scripts/wheel_check.py "$outside"
cd "$outside"
"$python" -W error wheel_check.py "$root"
"$python" -m pytest -q -n 2 -W error -o doctest_optionflags="NORMALIZE_WHITESPACE ELLIPSIS" --doctest-modules \
    --pyargs jaxquant pallas_kernels
