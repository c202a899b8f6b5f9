#!/usr/bin/env bash
# Makes .venv with everything that this repository needs; does nothing where that is done.
# Usage: source examples/setup_env.sh [EXTRAS]   (EXTRAS such as "dev"; PYTHON=python3.12 chooses the interpreter; unset: the
# first of python3, python3.13, python3.12 and python3.11 that has a version of pyproject.toml and can make environments)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
EXTRAS="${1:-}"
VERSIONS="$(sed -n 's/^requires-python = "\(.*\)"$/\1/p' "$ROOT/pyproject.toml")"

# unusable INTERPRETER: why it cannot be used; nothing if it can.
unusable() {
    command -v "$1" >/dev/null || { echo "not found"; return; }
    local said
    said="$("$1" - "$VERSIONS" <<'END' 2>/dev/null || true
import re, sys
lowest, beyond = [tuple(map(int, bound.split("."))) for bound in re.findall(r"[0-9][0-9.]*", sys.argv[1])]
number = "%d.%d" % tuple(sys.version_info[:2])
if not lowest <= tuple(sys.version_info[:2]) < beyond:
    print("is Python " + number)
else:
    try:
        import ensurepip, venv
        print("can be used")
    except ImportError:
        print("has no venv (Debian and Ubuntu: apt-get install python" + number + "-venv)")
END
)"
    case "$said" in
        "can be used") ;;
        "is Python "* | "has no venv "*) echo "$said" ;;
        *) echo "does not run, or is no Python" ;;
    esac
}

# find_python: sets PYTHON, or ends with one line about every interpreter that was tried.
find_python() {
    local candidate why tried="" candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        why="$(unusable "$candidate")"
        [ -n "$why" ] || { PYTHON="$candidate"; return; }
        tried="$tried${tried:+, }$candidate $why"
    done
    echo "error: Python $VERSIONS is needed: $tried; PYTHON names another interpreter" >&2
    exit 2
}

STAMP="$ROOT/.venv/.installed-${EXTRAS:-base}"
if [ ! -f "$STAMP" ] || [ "$ROOT/requirements.txt" -nt "$STAMP" ] || [ "$ROOT/setup.py" -nt "$STAMP" ] \
    || [ "$ROOT/pyproject.toml" -nt "$STAMP" ]; then
    if [ ! -x "$ROOT/.venv/bin/python" ]; then
        find_python
    elif WHY="$(unusable "$ROOT/.venv/bin/python")" && [ -n "$WHY" ]; then
        echo "error: Python $VERSIONS is needed: $ROOT/.venv/bin/python $WHY; delete $ROOT/.venv" >&2
        exit 2
    fi
    echo "[setup] installing into .venv (once)"
    [ -x "$ROOT/.venv/bin/python" ] || "$PYTHON" -m venv "$ROOT/.venv"
    if ! "$ROOT/.venv/bin/python" -c "import torch" 2>/dev/null; then
        # A machine without an NVIDIA driver needs no CUDA packages: take the CPU build where there is one.
        if command -v nvidia-smi >/dev/null 2>&1; then
            "$ROOT/.venv/bin/pip" install -q "torch>=2.11,<2.14"
        else
            "$ROOT/.venv/bin/pip" install -q "torch==2.13.0+cpu" 2>/dev/null \
                || "$ROOT/.venv/bin/pip" install -q "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
                || "$ROOT/.venv/bin/pip" install -q "torch>=2.11,<2.14"
        fi
    fi
    "$ROOT/.venv/bin/pip" install -q -e "$ROOT${EXTRAS:+[$EXTRAS]}"
    touch "$STAMP"
fi
export PATH="$ROOT/.venv/bin:$PATH"
