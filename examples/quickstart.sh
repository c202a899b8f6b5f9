#!/usr/bin/env bash
# From nothing to a trained sparse vision-language model on a laptop: environment, sample corpus, both
# tokenizers, indexed datasets, pretraining of tiny-8e on two processes (8 vision and 8 text experts, half
# of each on either process), and a picture of the losses. May be run again: what is done is not repeated.
#
#   bash examples/quickstart.sh                 about a quarter of an hour on two cores after the installation
#   PRESET=tiny-dense RUN=runs/dense bash examples/quickstart.sh        the same model without experts
#   STEPS=200 RUN=runs/short bash examples/quickstart.sh
#
# Leaves RUN/metrics.jsonl, RUN/losses.png, RUN/checkpoints/, RUN/hf (for transformers) and RUN/filled.png.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup_env.sh hf

PRESET="${PRESET:-tiny-8e}"
RUN="${RUN:-runs/quickstart}"
STEPS="${STEPS:-1300}"
NUM_IMAGES="${NUM_IMAGES:-2000}"
CORPUS="${CORPUS:-corpora/sample-$NUM_IMAGES}"
INDEXED="${INDEXED:-corpora/indexed-$NUM_IMAGES}"
PROCESSES="${PROCESSES:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$RUN"

say() { printf '\n== %s\n' "$*"; }

say "1/4 data: corpus, tokenizers, datasets"
NUM_IMAGES="$NUM_IMAGES" CORPUS="$CORPUS" INDEXED="$INDEXED" TASKS="" bash examples/sample_data.sh

say "2/4 pretraining $PRESET on $PROCESSES processes"
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
    --train.steps "$STEPS" --train.eval_interval 325 --train.seed 1 --save "$RUN"

say "3/4 losses"
python -m megatron_vlmoe plot-losses --run "$RUN" --output "$RUN/losses.png"

say "4/4 export to Hugging Face, and what the exported model makes of a masked word and masked patches"
python -m megatron_vlmoe export --load "$RUN" --output "$RUN/hf" --overwrite
python -m megatron_vlmoe fill-masked --model "$RUN/hf" --image-tokenizer "$INDEXED/image_tokenizer" \
    --pairs "$INDEXED/pairs_val" --output "$RUN/filled.png"
