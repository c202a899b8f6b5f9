#!/usr/bin/env bash
# Runs any training command on this node's GPUs, or on those of several nodes: what the other launchers do, without their
# choice of data and options. `vlmoe study ... --print-commands --slurm` prints lines that call it.
#
#   bash examples/launch.sh COMMAND OPTIONS...
#   sbatch --nodes=4 examples/slurm_pretrain.sh examples/launch.sh COMMAND OPTIONS...
#
# Processes: examples/launch_common.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/launch_common.sh
start_workers "$@"
