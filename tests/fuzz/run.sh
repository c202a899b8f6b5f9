#!/usr/bin/env bash
# Damaged files for every reader of files that come from outside: tests/README.md.
# Usage: bash tests/fuzz/run.sh [--cases N] [--seconds S] [--only READER...] [--append] [--seed N]
#        bash tests/fuzz/run.sh --report                              counts of all runs
#        bash tests/fuzz/run.sh --replay runs/fuzz/findings/NAME       reads a saved case again
set -euo pipefail
cd "$(dirname "$0")/../.."
# Where a program's environment is active it is used as it is.
python -c "import torch" 2>/dev/null || source examples/setup_env.sh dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
exec nice -n "${NICE:-15}" python tests/fuzz/run.py "$@"
