#!/usr/bin/env bash
#SBATCH --job-name=vlmoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Pretrains on several nodes: one task per node, which starts torchrun. Ten minutes before the time limit every
# worker saves and leaves, and the job goes back into the queue and resumes from its own run folder; a job that
# is pre-empted (SIGTERM) does the same, and Slurm requeues it itself. Ends for good once all steps are done.
#
#   TEXT=... IMAGES=... PAIRS=... TEXT_TOKENIZER=... IMAGE_TOKENIZER=... RUN=runs/base-32e \
#       sbatch examples/slurm_pretrain.sh base_32e [OPTIONS OF THE PROGRAM]
#   sbatch --nodes=1 examples/slurm_pretrain.sh small_8e
#   sbatch --nodes=1 examples/slurm_pretrain.sh examples/launch.sh finetune --task vqa ...      another launcher
#
# Variables: examples/pretrain_common.sh. Start it from the repository root; RUN must be on a disk that all nodes see.
# The save must fit into the time between the signal and the limit.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
ROW="${1:-}"
SCRIPT="examples/pretrain_$ROW.sh"
case "$ROW" in *.sh) SCRIPT="$ROW" ;; esac
[ -f "$SCRIPT" ] || {
    echo "error: sbatch examples/slurm_pretrain.sh ROW, where ROW names examples/pretrain_ROW.sh (base_32e, ...)" >&2
    exit 2
}
shift
NODES="${SLURM_JOB_NUM_NODES:-1}"
export NNODES="$NODES"
export GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
MASTER_ADDR="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?not started by sbatch}" | head -n 1)"
export MASTER_ADDR
# Jobs that share a node need ports of their own.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# srun does not take over the cores per task that sbatch was asked for (Slurm 22.05 and later).
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"

# Reads all data and the last checkpoint, and tries disk, GPUs and network of all nodes, before a run is started:
# export PREFLIGHT=1

LIMIT_NEAR=0
# Each task is the launcher itself, so that signals reach it; SLURM_NODEID is the number of its node.
srun --kill-on-bad-exit=1 --export=ALL \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$0" "$@"' "$SCRIPT" "$@" &
STEP=$!
# srun passes what it gets on to every task.
trap 'LIMIT_NEAR=1; kill -USR1 "$STEP"' USR1
trap 'kill -TERM "$STEP"' TERM
STATUS=0
# A signal ends a wait early, and srun may have ended before the first one; its status stays known.
while kill -0 "$STEP" 2>/dev/null; do
    wait "$STEP" || true
done
wait "$STEP" || STATUS=$?
if [ "$STATUS" -eq 0 ] && [ "$LIMIT_NEAR" -eq 1 ]; then
    echo "[slurm] saved before the time limit; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
