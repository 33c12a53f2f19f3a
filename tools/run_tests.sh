#!/usr/bin/env bash
# Runs the tests in the environment of the repository, which it makes if need be:
#   bash tools/run_tests.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh --tests
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # two workers share the cores

NONE_SELECTED=5
found=no

# Stops at a failure; that a part holds none of the tests asked for is no failure.
run_part() {
    local title=$1 code=0
    shift
    echo "[run_tests] $title"
    "$@" || code=$?
    if [ "$code" = 0 ]; then
        found=yes
    elif [ "$code" != "$NONE_SELECTED" ]; then
        echo "run_tests.sh stopped: $title failed; the report is above." >&2
        exit "$code"
    fi
}

# Triton reads TRITON_INTERPRET when it is imported, and kernels that it interprets
# cannot be compiled: the two kinds of test need a process each.
run_part 'tests' env -u TRITON_INTERPRET python -m pytest -n 2 -m 'not interpret' "$@"
run_part 'kernels in the Triton interpreter' \
    env TRITON_INTERPRET=1 python -m pytest -n 2 -m interpret "$@"
# Code that is clean from one Triton can spill from another.
OLDER_TRITON=$PWD/.venv/triton-3.6
if [ -d "$OLDER_TRITON" ]; then
    run_part 'kernels compiled by Triton 3.6' \
        env -u TRITON_INTERPRET PYTHONPATH="$OLDER_TRITON${PYTHONPATH:+:$PYTHONPATH}" \
        python -m pytest -n 2 -m aot "${@:-tests/test_inspect}"
fi

if [ "$found" = no ]; then
    echo "run_tests.sh stopped: no test was selected; check the options: $*" >&2
    exit "$NONE_SELECTED"
fi
echo '[run_tests] all passed'
