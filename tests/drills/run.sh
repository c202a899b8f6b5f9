#!/usr/bin/env bash
# Breaks runs at random places and looks whether anything is lost. The last line counts what came of it.
# Usage: bash tests/drills/run.sh --count 200 --seed 1          each kind of drill in turn, at random places
#        bash tests/drills/run.sh --only "kill save" --count 5  some kinds
#        bash tests/drills/run.sh --append ...                  adds to what earlier runs found
#        bash tests/drills/run.sh --list                        the kinds
# The full disk and the cut network need root; without it these are listed as not run.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -n "${VIRTUAL_ENV:-}" ] || source examples/setup_env.sh dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec python -m drills "$@"
