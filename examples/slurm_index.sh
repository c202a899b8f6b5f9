#!/usr/bin/env bash
#SBATCH --job-name=vlmoe-index
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.log
# Indexes a corpus in shards, a job of an array for each, and joins them in a job that starts when all are done.
#
#   bash examples/slurm_index.sh SHARDS OUTPUT COMMAND OPTIONS...      submits both
#   bash examples/slurm_index.sh 16 data/wikipedia_train index-text --input raw/wikipedia/*.jsonl --text-tokenizer tokenizers/text.model
#
# COMMAND is index-text, index-images, index-pairs or index-task. OUTPUT must be on a disk that all nodes see. A job has as many
# processes as cores (--workers says otherwise). Shards that failed are done again by their numbers, and then joined:
#   sbatch --array=3,7 examples/slurm_index.sh shard 16 data/wikipedia_train index-text ...
#   bash examples/slurm_index.sh join data/wikipedia_train
# Partition, account and the like: variables of sbatch (SBATCH_PARTITION, SBATCH_ACCOUNT).
set -euo pipefail
die() { echo "error: $*" >&2; exit 2; }
[ $# -ge 2 ] || die "bash examples/slurm_index.sh SHARDS OUTPUT COMMAND OPTIONS..."
cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file
[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x .venv/bin/python ] || export PATH="$PWD/.venv/bin:$PATH"

case "$1" in
    shard)
        [ $# -ge 4 ] || die "sbatch --array=NUMBERS examples/slurm_index.sh shard SHARDS OUTPUT COMMAND OPTIONS..."
        SHARDS="$2" OUTPUT="$3" COMMAND="$4"; shift 4
        # Not SLURM_ARRAY_TASK_COUNT: some shards may be done again by themselves.
        python -m megatron_vlmoe "$COMMAND" --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" "$@" --output "$OUTPUT" \
            --shard "${SLURM_ARRAY_TASK_ID:?not a job of an array}/$SHARDS"
        ;;
    join)
        [ $# -eq 2 ] || die "bash examples/slurm_index.sh join OUTPUT"
        JOIN=(merge-data --shards "$2")
        python -m megatron_vlmoe "${JOIN[@]}"
        ;;
    "" | *[!0-9]* | 0*) die "$1 is not a number of shards: bash examples/slurm_index.sh SHARDS OUTPUT COMMAND OPTIONS..." ;;
    *)
        [ $# -ge 3 ] && [ -n "$2" ] || die "bash examples/slurm_index.sh SHARDS OUTPUT COMMAND OPTIONS..."
        case "$3" in
            index-text | index-images | index-pairs | index-task) ;;
            *) die "$3 is none of index-text, index-images, index-pairs and index-task" ;;
        esac
        JOB="$(sbatch --parsable --array="0-$(($1 - 1))" "$0" shard "$@")"
        sbatch --dependency="afterok:${JOB%%;*}" --kill-on-invalid-dep=yes --cpus-per-task=1 --output=%x-%j.log "$0" join "$2"
        echo "array job ${JOB%%;*}: $1 shards of $2"
        ;;
esac
