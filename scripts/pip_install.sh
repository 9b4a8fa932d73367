#!/usr/bin/env bash
# pip_install.sh PYTHON TARGET...: install TARGETs, under the constraints that CONSTRAINTS names (may be empty).
# Where pip knows no CPU build of torch, it takes the default build of the same version, with a warning.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$1
shift
constraints=${CONSTRAINTS-requirements/cpu.txt}
log=$(mktemp)
trap 'rm -f "$log" "$log.constraints"' EXIT

install() { "$python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location "$@"; }

if install ${constraints:+--constraint "$constraints"} "$@" 2>"$log"; then
    exit 0
fi
if [ -n "$constraints" ] && grep -Eq 'No matching distribution found for torch|ResolutionImpossible' "$log"; then
    echo "pip knows no CPU build of torch (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can name one):" >&2
    echo "taking the default build, which brings GPU libraries along" >&2
    sed 's/^\(torch==[0-9.]*\)+cpu/\1/; /^triton==/d' "$constraints" >"$log.constraints"
    install --constraint "$log.constraints" "$@"
    exit 0
fi
cat "$log" >&2
exit 1
