#!/usr/bin/env bash
# The checks, in three sizes. Installs what it needs into .venv; may be run again.
# Usage: bash tests/run.sh quick                 lint, types, tests that start no processes: under 4 minutes on 2 cores
#        bash tests/run.sh                       lint, types, all tests: what continuous integration runs, 15 to 30 minutes
#        bash tests/run.sh nightly               transformers' own tests, the site of docs/, other Pythons, an hour of damaged files, and the downloads
#        bash tests/run.sh PYTEST ARGUMENTS      some tests, e.g. tests/unit -k masking
# Variables: TEST_WORKERS, processes that run tests side by side (2, for 2 cores).
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh dev
# Tests start several processes on few cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
# Which tests stay together, and their order: tests/conftest.py.
SIDE_BY_SIDE=(-n "${TEST_WORKERS:-2}")

# Lint, then tests; the check of types, one process that takes long, runs beside them.
check_all() {
    echo "== lint"
    ruff check .
    ruff format --check .
    echo "== tests and types"
    local found status=0
    found="$(mktemp)"
    mypy >"$found" 2>&1 &
    local checker=$!
    trap 'kill $checker 2>/dev/null || true; rm -f "$found"' EXIT
    python -m pytest "${SIDE_BY_SIDE[@]}" "$@" || status=$?
    echo "== types"
    wait "$checker" || status=$?
    cat "$found"
    exit "$status"
}

case "${1:-}" in
    "")
        check_all
        ;;
    quick)
        check_all -m "not dist and not e2e and not process" "${@:2}"
        ;;
    nightly)
        exec bash tests/nightly.sh
        ;;
    *)
        exec python -m pytest "$@"
        ;;
esac
