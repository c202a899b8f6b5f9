#!/usr/bin/env bash
# Tests on another Python than that of .venv, with the megatron-core that requirements.txt names for it: 0.19 from 3.12 on.
# The installation, .venv-VERSION, takes 6 GB where torch has no CPU build for that Python, and is made anew only when
# what it is made from has changed. The last line is recorded in docs/installation.md.
# Usage: bash tests/run_python.sh 3.12                     all of the following
#        bash tests/run_python.sh 3.12 quick               the program, a short run, tests that start no processes
#        bash tests/run_python.sh 3.12 find                prints the interpreter; an error if there is none
#        bash tests/run_python.sh 3.12 PYTEST ARGUMENTS    some tests, e.g. tests/distributed -k resume
# Variables: PYTHON, the interpreter; TEST_WORKERS, processes that run tests side by side (2).
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION="${1:?the version of Python, such as 3.12}"
shift
VENV="$PWD/.venv-$VERSION"
OLDER_PYTHON="$PWD/.venv/bin/python"
WORK="$PWD/runs/python-$VERSION"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OLDER_PYTHON TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1

find_interpreter() {
    local candidate
    for candidate in "${PYTHON:-}" "python$VERSION" "$HOME/.pyenv/versions/$VERSION".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$VERSION')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python $VERSION; name one with PYTHON" >&2
    return 1
}

installation() {
    local stamp="$VENV/.installed" made_from
    made_from="$(cat requirements.txt setup.py pyproject.toml | sha256sum)"
    [ "$(cat "$stamp" 2>/dev/null)" != "$made_from" ] || return 0
    [ -x "$VENV/bin/python" ] || "$(find_interpreter)" -m venv "$VENV"
    # A machine without an NVIDIA driver needs no CUDA packages: take the CPU build where there is one.
    "$VENV/bin/python" -c "import torch" 2>/dev/null \
        || "$VENV/bin/pip" install -q "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
        || "$VENV/bin/pip" install -q "torch>=2.11,<2.14"
    "$VENV/bin/pip" install -q -e ".[dev]"
    echo "$made_from" >"$stamp"
}

# Ten steps on random data, of which the last two come from a checkpoint.
a_run() {
    local options=(pretrain-random --preset tiny-8e --train.steps 10 --save "$WORK/run")
    rm -rf "$WORK/run"
    vlmoe pretrain --preset base-32e --dry-run >/dev/null
    vlmoe "${options[@]}" --exit-interval 8
    vlmoe "${options[@]}" | tee "$WORK/run.txt"
    grep -q "starting after step 8" "$WORK/run.txt" && grep -q "finished 10 steps" "$WORK/run.txt"
}

tests() {
    python -m pytest "$@"
}

results=()
failed=0
check() {
    local status="" log="$WORK/$1.txt" counted
    echo "== $1"
    # Not `if "${@:2}"`: inside a condition `set -e` stops nothing.
    set +e
    (set -e; "${@:2}") 2>&1 | tee "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || { status=" FAILED"; failed=1; }
    set -e
    # pytest says how many.
    counted="$(grep -oE '([0-9]+ failed, )?[0-9]+ passed.* in [0-9.]+s' "$log" | tail -n 1 | sed 's/ in .*//' || true)"
    [ -n "$counted$status" ] || counted=passed
    results+=("$1$status${counted:+ $counted}")
}

if [ "${1:-}" = find ]; then
    find_interpreter
    exit
fi
mkdir -p "$WORK"
installation
export PATH="$VENV/bin:$PATH"

case "${1:-}" in
    "" | quick)
        ;;
    *)
        exec python -m pytest "$@"
        ;;
esac
SIDE_BY_SIDE=(-n "${TEST_WORKERS:-2}")
check "run" a_run
check "tests without processes" tests "${SIDE_BY_SIDE[@]}" -m "not dist and not e2e and not process"
if [ "${1:-}" != quick ]; then
    check "distributed tests" tests "${SIDE_BY_SIDE[@]}" tests/distributed tests/unit/test_devices.py
    check "end to end" tests tests/e2e/test_e2e_pretrain.py tests/e2e/test_e2e_old_files.py
    # .venv is what continuous integration uses, with the older megatron-core.
    if "$OLDER_PYTHON" -c "import sys; sys.exit(sys.version_info >= (3, 12))" 2>/dev/null \
        && python -c "import sys; sys.exit(sys.version_info < (3, 12))"; then
        check "checkpoints of both" tests tests/python_versions
    else
        results+=("checkpoints of both not run (they need .venv with Python 3.11, and a later one)")
    fi
fi
about="$(python - <<'END'
import platform
from importlib.metadata import version
print(f"Python {platform.python_version()}, megatron-core {version('megatron-core')}, torch {version('torch')}")
END
)"
joined="$(printf '%s; ' "${results[@]}")"
echo "$about, $(date -u +%F) at $(git rev-parse --short HEAD 2>/dev/null || echo '?'): ${joined%; }"
exit "$failed"
