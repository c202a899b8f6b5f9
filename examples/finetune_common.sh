# What all finetune_*.sh share: sourced with TASK and RECIPE set.
#
#   LOAD                        run or checkpoint folder to start from (flickr30k: that of the COCO fine-tuning)
#   DATA=data/RECIPE            prefix of the prepared task; where it is missing it is made from RAW
#   RAW                         raw data in its official layout (docs/data.md, "Downstream tasks")
#   TEXT_TOKENIZER=tokenizers/text.model    the one of pretraining
#   RUN=runs/RECIPE             run folder; a run that was interrupted goes on from it
#   WORKERS                     processes that prepare the data (unset: one per core)
#   PREPARE=first               on several nodes node 0 prepares, and the others wait; every: each on its own disk
# Processes and layout: examples/launch_common.sh, and EP=1, the expert-parallel size.
# Everything after the script's name goes to the program:
#   LOAD=runs/base-32e RAW=raw/vqa bash examples/finetune_vqa.sh --task.micro_batch_size 8
#   LOAD=runs/base-32e bash examples/finetune_nlvr2.sh --preset nlvr2-ablation      the recipe of Table 3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
COMMON=examples/finetune_common.sh
source examples/launch_common.sh

DATA="${DATA:-data/$RECIPE}"
TEXT_TOKENIZER="${TEXT_TOKENIZER:-tokenizers/text.model}"
RUN="${RUN:-runs/$RECIPE}"
OPTIONS=(
    --parallel.tensor_model_parallel_size "$TP"
    --parallel.pipeline_model_parallel_size "$PP"
    --parallel.expert_model_parallel_size "${EP:-1}"
)
READS_TEXT=(--data.text_tokenizer "$TEXT_TOKENIZER")
TOKENIZER=(--text-tokenizer "$TEXT_TOKENIZER")
[ "$TASK" != imagenet ] || READS_TEXT=() TOKENIZER=()

# The file is written after the last split, by hand too if the task was prepared elsewhere.
prepare_task() {
    [ -n "${RAW:-}" ] || die "$DATA.prepared is not there, and RAW is not set (see the head of $COMMON)"
    python -m megatron_vlmoe index-task --task "$TASK" --raw "$RAW" --output "$DATA" "${TOKENIZER[@]}" \
        --workers "${WORKERS:-$(nproc)}" --on-error skip && touch "$DATA.prepared"
}
given --task.data "$@" || prepare_once "$DATA" "$DATA.prepared" prepare_task
given --preset "$@" || OPTIONS+=(--preset "$RECIPE")
given --task.data "$@" || OPTIONS+=(--task.data "$DATA")
given --data.text_tokenizer "$@" || OPTIONS+=("${READS_TEXT[@]}")
given --task.architecture "$@" || take --load LOAD "$@"
given --save "$@" || OPTIONS+=(--save "$RUN")
start_workers finetune --task "$TASK" "${OPTIONS[@]}" "$@"
