#!/bin/sh
# Runs the dispatch tests on the newest jax that pip finds, with the newest of everything else. That jax may deprecate
# what the oldest supported one still needs, so here a warning is no error. The third-party models of test_dispatch_models.py
# stay out: their newest release need not run on it.
set -eu

rm -rf .venv-newest
"$(scripts/find_python.sh)" -m venv .venv-newest
python=.venv-newest/bin/python
"$python" -m pip install --quiet --disable-pip-version-check --upgrade jax jaxlib -e . pytest pytest-xdist hypothesis

newest=$("$python" -c 'import jax; print(jax.__version__)')
if grep -qx "jax==$newest" constraints.txt; then
    echo "jax $newest is the newest: make test runs the dispatch tests on it already"
    exit 0
fi
echo "dispatch tests on jax $newest"
tests=tests/jaxquant
"$python" -m pytest -q -n 2 --dist worksteal -o filterwarnings=default $tests/test_dispatch.py $tests/test_explain.py $tests/test_interpreter.py
