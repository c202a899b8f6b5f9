#!/usr/bin/env bash
# Slow checks that need the network: `bash tests/run.sh nightly`. Runs all of them, also after one has failed.
# The last line is recorded in docs/installation.md. Another Python needs about 3 GB in runs/nightly for its packages.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh dev,docs
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1

transformers_suite() {
    bash tests/transformers_suite.sh
}

site() {
    python -m mkdocs build --strict --site-dir runs/nightly/site
}

# Damaged files, other ones every night; FUZZ_SECONDS is how long.
damaged_files() {
    bash tests/fuzz/run.sh --cases 20000 --seconds "${FUZZ_SECONDS:-3600}" --append
}

# The package, its program and the tests that start no processes, with what pip resolves for that Python today.
another_python() {
    local folder="$PWD/runs/nightly/$1"
    rm -rf "$folder"
    "$1" -m venv "$folder"
    "$folder/bin/pip" install -q "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu \
        || "$folder/bin/pip" install -q "torch>=2.11,<2.14"
    "$folder/bin/pip" install -q -e ".[dev]"
    "$folder/bin/vlmoe" pretrain --preset base-32e --dry-run >/dev/null
    "$folder/bin/python" -m pytest -n "${TEST_WORKERS:-2}" -m "not dist and not e2e and not process"
}

results=()
failed=0
check() {
    local status=passed
    echo "== $1"
    # Not `if "${@:2}"`: inside a condition `set -e` stops nothing.
    set +e
    (set -e; "${@:2}")
    [ "$?" -eq 0 ] || { status=FAILED; failed=1; }
    set -e
    results+=("$1 $status")
}

check "transformers' tests" transformers_suite
check "documentation site" site
check "damaged files" damaged_files
current="$(python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
for name in python3.11 python3.12; do
    if [ "$name" = "$current" ]; then
        continue
    elif "$name" -c pass 2>/dev/null; then
        check "$name" another_python "$name"
    else
        results+=("$name not installed, not run")
    fi
done
joined="$(printf '%s; ' "${results[@]}")"
echo "nightly $(date -u +%F) at $(git rev-parse --short HEAD 2>/dev/null || echo '?'): ${joined%; }"
exit "$failed"
