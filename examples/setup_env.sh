#!/usr/bin/env bash
# Makes .venv with everything that this repository needs; does nothing where that is done.
# Usage: source examples/setup_env.sh [EXTRAS]   (EXTRAS such as "dev"; PYTHON=python3.12 chooses the interpreter)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
EXTRAS="${1:-}"
PYTHON="${PYTHON:-python3}"
STAMP="$ROOT/.venv/.installed-${EXTRAS:-base}"
if [ ! -f "$STAMP" ] || [ "$ROOT/requirements.txt" -nt "$STAMP" ] || [ "$ROOT/setup.py" -nt "$STAMP" ] \
    || [ "$ROOT/pyproject.toml" -nt "$STAMP" ]; then
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
