#!/usr/bin/env bash
# Builds .venv in the checkout with the package, its extras `worker` and `dev`, and nothing from outside it.
# Does nothing when the stamp says that pyproject.toml and the constraints are those of the last build.
#   PYTHON       interpreter to build with (default: the first of 3.11 or later on PATH)
#   CONSTRAINTS  constraints file (default requirements/cpu.txt; empty: none)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.stamp
constraints=${CONSTRAINTS-requirements/cpu.txt}
wanted=$(cat pyproject.toml ${constraints:+"$constraints"} scripts/*.sh | cksum)

if [ -x $venv/bin/python ] && [ -f $stamp ] && [ "$(cat $stamp)" = "$wanted" ]; then
    exit 0
fi

is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if ! { [ -x $venv/bin/python ] && is_usable $venv/bin/python; }; then
    found=
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.14}; do
        if is_usable "$candidate"; then found=$candidate; break; fi
    done
    if [ -z "$found" ]; then
        echo "make venv: no Python 3.11 or later on PATH (set PYTHON to one)" >&2
        exit 1
    fi
    rm -rf $venv
    if ! "$found" -m venv $venv; then
        rm -rf $venv
        echo "make venv: $found cannot build a virtual environment (Debian: install python3-venv)" >&2
        exit 1
    fi
fi

echo "make venv: installing into $venv (the first time takes minutes)" >&2
bash scripts/pip_install.sh $venv/bin/python --editable '.[worker,dev]'
echo "$wanted" >$stamp
