#!/usr/bin/env bash
# Slow checks that need the network: `bash tests/run.sh nightly`. Runs all of them, also after one has failed.
# The last line is recorded in docs/installation.md. Each other Python needs up to 6 GB for its packages.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh dev,docs,ray
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1

transformers_suite() {
    bash tests/transformers_suite.sh
}

# Real Ray workers. Without Ray pytest finds no test, which is a failure.
ray_workers() {
    python -m pytest tests/unit/test_ray.py
}

site() {
    python -m mkdocs build --strict --site-dir runs/nightly/site
}

# Damaged files, other ones every night; FUZZ_SECONDS is how long.
damaged_files() {
    bash tests/fuzz/run.sh --cases 20000 --seconds "${FUZZ_SECONDS:-3600}" --append
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
check "Ray" ray_workers
check "documentation site" site
check "damaged files" damaged_files
current="$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
for version in 3.11 3.12 3.13; do
    if [ "$version" = "$current" ]; then
        continue
    elif bash tests/run_python.sh "$version" find >/dev/null 2>&1; then
        # All tests on the first one that has the later megatron-core.
        check "Python $version" bash tests/run_python.sh "$version" $([ "$version" = 3.12 ] || echo quick)
    else
        results+=("Python $version not installed, not run")
    fi
done
joined="$(printf '%s; ' "${results[@]}")"
echo "nightly $(date -u +%F) at $(git rev-parse --short HEAD 2>/dev/null || echo '?'): ${joined%; }"
exit "$failed"
