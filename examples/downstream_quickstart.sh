#!/usr/bin/env bash
# Takes the quick start's checkpoints through all five downstream tasks on the sample corpus and prints a table: guessing,
# the same model from scratch, from a pretrained dense model, from a pretrained one with 8 experts. Every run of a task has
# the same steps. Runs what is missing first: the quick start, and the quick start with the dense preset.
#
#   bash examples/downstream_quickstart.sh      about twenty minutes on two cores after the two quick starts
#
# Leaves RUNS/TASK/{scratch,dense,moe}/ (metrics.json, predictions, report.html) and RUNS/table.json. May be run again:
# what is done is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh

NUM_IMAGES="${NUM_IMAGES:-2000}"
CORPUS="${CORPUS:-corpora/sample-$NUM_IMAGES}"
INDEXED="${INDEXED:-corpora/indexed-$NUM_IMAGES}"
TASKS="${TASKS:-corpora/tasks-$NUM_IMAGES}"
RUNS="${RUNS:-runs/downstream}"
MOE="${MOE:-runs/quickstart}"
DENSE="${DENSE:-runs/dense}"
JOBS="${JOBS:-2}"
SCALE="${SCALE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$RUNS"

say() { printf '\n== %s\n' "$*"; }

[ -e "$MOE/checkpoints" ] || RUN="$MOE" NUM_IMAGES="$NUM_IMAGES" bash examples/quickstart.sh
[ -e "$DENSE/checkpoints" ] || PRESET=tiny-dense RUN="$DENSE" NUM_IMAGES="$NUM_IMAGES" bash examples/quickstart.sh

say "1/3 the five tasks"
NUM_IMAGES="$NUM_IMAGES" CORPUS="$CORPUS" INDEXED="$INDEXED" TASKS="$TASKS" bash examples/sample_data.sh

say "2/3 fifteen runs, $JOBS at a time"
# finetune TASK START STEPS OPTIONS...
finetune() {
    local task="$1" start="$2" steps="$3"; shift 3
    local run="$RUNS/$task/$start" from
    if [ -e "$run/metrics.json" ]; then echo "have $run"; return; fi
    case "$start" in
        # Experts that were never trained are not frozen.
        scratch) from=(--task.architecture tiny-8e --moe.train_experts true --data.text_tokenizer "$INDEXED/text.model") ;;
        dense) from=(--load "$DENSE") ;;
        moe) from=(--load "$MOE") ;;
    esac
    mkdir -p "$run"
    python -m megatron_vlmoe finetune --task "$task" --preset "sample-$task" "${from[@]}" \
        --task.data "$TASKS/$task" --save "$run" --train.steps "$steps" --train.seed 1 "$@" > "$run/console.txt" 2>&1 \
        || { echo "error: $run failed: $(tail -n 1 "$run/console.txt")" >&2; return 1; }
    echo "$task from $start: $(grep -c '' "$run/metrics.jsonl") lines in $run/metrics.jsonl"
}
export -f finetune
export RUNS TASKS INDEXED MOE DENSE
for START in scratch dense moe; do
    echo "vqa $START $((SCALE * 800))"
    # Two pictures side by side are new to the experts: frozen, they learn it twice as slowly.
    echo "nlvr2 $START $((SCALE * 350)) --moe.train_experts true"
    echo "retrieval $START $((SCALE * 200))"
    echo "imagenet $START $((SCALE * 400)) --optim.lr 2e-3 --optim.layer_decay 0.7"
    echo "mnli $START $((SCALE * 500)) --optim.lr 7e-4"
done | xargs -P "$JOBS" -L 1 bash -c 'finetune "$@"' finetune

say "3/3 results"
python -m megatron_vlmoe downstream-table --runs "$RUNS" --data "$TASKS" --output "$RUNS/table.json"
