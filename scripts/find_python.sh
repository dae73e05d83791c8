#!/bin/sh
# Prints the path of a Python that can run this project: 3.12 to 3.14, with the venv module.
# Each candidate is run, not believed: a pyenv shim exists on PATH for every version that is installed but not chosen.
# 3.12 comes first because constraints.txt was resolved with it.
set -u

is_usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

for name in python3.12 python3.13 python3.14 python3; do
    path=$(command -v "$name" 2>/dev/null) && is_usable "$path" && echo "$path" && exit 0
done

for minor in 12 13 14; do
    for root in ${PYENV_ROOT:+"$PYENV_ROOT"} "${HOME:-}/.pyenv"; do
        for path in "$root"/versions/3."$minor"*/bin/python; do
            is_usable "$path" && echo "$path" && exit 0
        done
    done
done

cat >&2 <<MESSAGE
No usable Python was found: jaxquant needs Python 3.12, 3.13 or 3.14 with its venv and ensurepip modules.
Looked for
  python3.12, python3.13, python3.14 and python3 on PATH: ${PATH:-(empty)}
  3.12*, 3.13* and 3.14* under ${PYENV_ROOT:+$PYENV_ROOT/versions and }${HOME:-}/.pyenv/versions
$(command -v python3 >/dev/null 2>&1 && echo "The python3 on PATH is $(command -v python3): $(python3 --version 2>&1)")
Install one, for example 'apt-get install python3.12 python3.12-venv' or 'pyenv install 3.12', and run make again.
MESSAGE
exit 1
