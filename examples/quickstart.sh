#!/usr/bin/env bash
# From nothing to a trained sparse vision-language model on a laptop: environment, sample corpus, both
# tokenizers, indexed datasets, pretraining of tiny-8e on two processes (8 vision and 8 text experts, half
# of each on either process), and a picture of the losses. May be run again: what is done is not repeated.
#
#   bash examples/quickstart.sh                 about ten minutes on two cores after the installation
#   PRESET=tiny-dense RUN=runs/dense bash examples/quickstart.sh        the same model without experts
#   STEPS=200 RUN=runs/short bash examples/quickstart.sh
#
# Leaves RUN/metrics.jsonl, RUN/losses.png, RUN/checkpoints/, RUN/hf (for transformers) and RUN/filled.png.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh hf

PRESET="${PRESET:-tiny-8e}"
RUN="${RUN:-runs/quickstart}"
STEPS="${STEPS:-800}"
NUM_IMAGES="${NUM_IMAGES:-2000}"
CORPUS="${CORPUS:-corpora/sample-$NUM_IMAGES}"
INDEXED="${INDEXED:-corpora/indexed-$NUM_IMAGES}"
PROCESSES="${PROCESSES:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$INDEXED" "$RUN"

say() { printf '\n== %s\n' "$*"; }
# Runs a command unless the file that it leaves last is there.
once() { local made="$1"; shift; if [ -e "$made" ]; then echo "have $made"; else "$@"; fi; }

say "1/7 sample corpus: pictures of shapes, captions, paragraphs"
python -m megatron_vlmoe sample-corpus --output "$CORPUS" --num-images "$NUM_IMAGES" --seed 1

say "2/7 text tokenizer (SentencePiece)"
once "$INDEXED/text.model" python -m megatron_vlmoe train-text-tokenizer \
    --input "$CORPUS/text/train.jsonl" "$CORPUS/coco/annotations/captions_train2014.json" \
    --vocab-size 320 --output "$INDEXED/text"

say "3/7 indexed datasets"
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

say "4/7 image tokenizer (VQ-KD)"
once "$INDEXED/image_tokenizer/config.json" python -m megatron_vlmoe train-image-tokenizer \
    --images "$INDEXED/images_train" "$INDEXED/pairs_train" --output "$INDEXED/image_tokenizer" \
    --preset tiny --image-size 64 --patch-size 8 --num-codes 256 --steps 400 --seed 1

say "5/7 pretraining $PRESET on $PROCESSES processes"
# Half of the experts on each process where their number allows it.
EXPERT_PARALLEL=1
[ "${PRESET#*-}" != dense ] && [ $((PROCESSES % 2)) -eq 0 ] && EXPERT_PARALLEL=2
torchrun --standalone --nproc-per-node "$PROCESSES" -m megatron_vlmoe pretrain \
    --preset "$PRESET" \
    --data.text "$INDEXED/text_train" --data.images "$INDEXED/images_train" --data.pairs "$INDEXED/pairs_train" \
    --data.eval_text "$INDEXED/text_val" --data.eval_images "$INDEXED/images_val" \
    --data.eval_pairs "$INDEXED/pairs_val" \
    --data.text_tokenizer "$INDEXED/text.model" --data.image_tokenizer "$INDEXED/image_tokenizer" \
    --parallel.expert_model_parallel_size "$EXPERT_PARALLEL" \
    --train.steps "$STEPS" --train.seed 1 --save "$RUN"

say "6/7 losses"
python -m megatron_vlmoe plot-losses --run "$RUN" --output "$RUN/losses.png"

say "7/7 export to Hugging Face, and what the exported model makes of a masked word and masked patches"
python -m megatron_vlmoe export --load "$RUN" --output "$RUN/hf" --overwrite
python -m megatron_vlmoe fill-masked --model "$RUN/hf" --image-tokenizer "$INDEXED/image_tokenizer" \
    --pairs "$INDEXED/pairs_val" --output "$RUN/filled.png"
