#!/usr/bin/env bash
# Runs the common tests of transformers on the exported model: five minutes, a part of `bash tests/run.sh nightly`.
# The tests come from the source archive of the installed version, which pip fetches once into runs/.
# Usage: bash tests/transformers_suite.sh [PYTEST ARGUMENTS]    e.g.  bash tests/transformers_suite.sh -k MaskedLM
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
exec python tests/transformers_suite/run.py "$@"
