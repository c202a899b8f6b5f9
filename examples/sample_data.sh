#!/usr/bin/env bash
# The sample corpus, both tokenizers and the indexed datasets of the quick start, and with TASKS also the five downstream
# tasks: what quickstart.sh, downstream_quickstart.sh and `vlmoe study` train on. What is there is not made again.
#
#   bash examples/sample_data.sh
#   TASKS=corpora/tasks-2000 bash examples/sample_data.sh
#
# Leaves CORPUS (raw files), INDEXED (tokenizers, datasets) and TASKS (prepared tasks).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x .venv/bin/python ] || export PATH="$PATH:$PWD/.venv/bin"

NUM_IMAGES="${NUM_IMAGES:-2000}"
CORPUS="${CORPUS:-corpora/sample-$NUM_IMAGES}"
INDEXED="${INDEXED:-corpora/indexed-$NUM_IMAGES}"
TASKS="${TASKS:-}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$INDEXED"

say() { printf '\n== %s\n' "$*"; }
# Runs a command unless the file that it leaves last is there.
once() { local made="$1"; shift; if [ -e "$made" ]; then echo "have $made"; else "$@"; fi; }

say "data 1/4: sample corpus, pictures of shapes, captions, paragraphs"
python -m megatron_vlmoe sample-corpus --output "$CORPUS" --num-images "$NUM_IMAGES" --seed 1

say "data 2/4: text tokenizer (SentencePiece)"
once "$INDEXED/text.model" python -m megatron_vlmoe train-text-tokenizer \
    --input "$CORPUS/text/train.jsonl" "$CORPUS/coco/annotations/captions_train2014.json" \
    --vocab-size 320 --output "$INDEXED/text"

say "data 3/4: indexed datasets"
for SPLIT in train val; do
    once "$INDEXED/text_$SPLIT.json" python -m megatron_vlmoe index-text \
        --input "$CORPUS/text/$SPLIT.jsonl" --output "$INDEXED/text_$SPLIT" \
        --text-tokenizer "$INDEXED/text.model" --workers 2
    once "$INDEXED/images_$SPLIT.json" python -m megatron_vlmoe index-images \
        --input "$CORPUS/images/$SPLIT" --output "$INDEXED/images_$SPLIT" --workers 2
    once "$INDEXED/pairs_$SPLIT.json" python -m megatron_vlmoe index-pairs \
        --format coco --annotations "$CORPUS/coco/annotations/captions_${SPLIT}2014.json" \
        --images "$CORPUS/coco/${SPLIT}2014" --output "$INDEXED/pairs_$SPLIT" \
        --text-tokenizer "$INDEXED/text.model" --workers 2
done

say "data 4/4: image tokenizer (VQ-KD)"
# Goes on where it was interrupted, and knows itself whether it is done.
python -m megatron_vlmoe train-image-tokenizer \
    --images "$INDEXED/images_train" "$INDEXED/pairs_train" --output "$INDEXED/image_tokenizer" \
    --preset tiny --seed 1 --log-interval 100

[ -n "$TASKS" ] || exit 0
say "tasks: question answering, reasoning, retrieval, classification, inference"
prepare() {
    local task="$1" raw="$2"; shift 2
    [ -e "$TASKS/$task.prepared" ] && { echo "have $TASKS/$task"; return; }
    python -m megatron_vlmoe index-task --task "$task" --raw "$CORPUS/tasks/$raw" --output "$TASKS/$task" "$@"
    touch "$TASKS/$task.prepared"
}
TOKENIZER=(--text-tokenizer "$INDEXED/text.model")
prepare vqa vqa "${TOKENIZER[@]}"
prepare nlvr2 nlvr2 "${TOKENIZER[@]}"
prepare retrieval flickr30k "${TOKENIZER[@]}"
prepare imagenet imagenet
prepare mnli mnli "${TOKENIZER[@]}"
