#!/usr/bin/env bash
# The first run of this project on a GPU: checks, each with a time limit, and one JSON file of what they found.
# Needs no network: packages that the machine lacks are taken from a folder of wheels. docs/benchmarks.md says more.
#
#   bash tests/gpu/first_run.sh --wheels wheels          all checks, at most 270 s
#   bash tests/gpu/first_run.sh --only sdpa bench        some of them
#   bash tests/gpu/first_run.sh --list                   their names and limits
#   bash tests/gpu/first_run.sh --device cpu             a rehearsal at small sizes, without what only a GPU has
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/first_run.py" "$@"
