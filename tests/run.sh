#!/usr/bin/env bash
# Lint, types and all tests. Installs what it needs into .venv; may be run again.
# Usage: bash tests/run.sh [PYTEST ARGUMENTS]    e.g.  bash tests/run.sh tests/unit -k masking
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh dev
# Tests start several processes on few cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1

if [ "$#" -gt 0 ]; then
    exec python -m pytest "$@"
fi
echo "== lint"
ruff check .
ruff format --check .
echo "== types"
mypy
echo "== tests"
python -m pytest
