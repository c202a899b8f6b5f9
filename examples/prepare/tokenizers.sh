#!/usr/bin/env bash
# Both tokenizers.
#
#   bash examples/prepare/tokenizers.sh text      a SentencePiece model of 64,000 pieces, on text and captions
#   bash examples/prepare/tokenizers.sh image     an image tokenizer of your own (VQ-KD), on images that are indexed
#
# text: set TEXT_FILES to what it trains on: JSONL with the key "text", .json of COCO or Karpathy captions,
# anything else is plain text (no parquet). Unset, it takes what is there of
#   RAW/wikipedia/*.jsonl  RAW/bookcorpus/{*.jsonl,*.txt}  RAW/coco/dataset_coco.json
# Memory is bounded by SENTENCES=10000000 lines, drawn uniformly from all files. Makes TEXT_TOKENIZER.
#
# image: the paper takes BEiT v2's tokenizer. Its official checkpoint
# (vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth, from the unilm repository) needs no step here:
#   IMAGE_TOKENIZER=tokenizers/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth bash examples/pretrain_base_32e.sh
# To train one instead: TEACHER=hf:DIR names a folder of a CLIP or ViT model on disk (TEACHER=pixels needs none, and
# is for tests), IMAGES the indexed images, IMAGE_TOKENIZER=tokenizers/image the result; GPUS_PER_NODE its processes.
# Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"

train_text() {
    local files
    if [ -n "${TEXT_FILES:-}" ]; then
        read -r -a files <<< "$TEXT_FILES"
    else
        mapfile -t files < <(compgen -G "$RAW/wikipedia/*.jsonl"; compgen -G "$RAW/bookcorpus/*.jsonl"
            compgen -G "$RAW/bookcorpus/*.txt"; compgen -G "$RAW/coco/dataset_coco.json")
    fi
    [ "${#files[@]}" -gt 0 ] || die "no text below $RAW: set TEXT_FILES to the files to train on"
    [ ! -e "$TEXT_TOKENIZER" ] || { echo "have $TEXT_TOKENIZER"; return; }
    mkdir -p "$(dirname "$TEXT_TOKENIZER")"
    python tools/train_text_tokenizer.py --input "${files[@]}" --vocab-size "${VOCAB_SIZE:-64000}" \
        --output-prefix "${TEXT_TOKENIZER%.model}" --max-sentences "${SENTENCES:-10000000}"
}

train_image() {
    local images
    read -r -a images <<< "${IMAGES:-$DATA/imagenet22k_train}"
    # Goes on where an interrupted training stopped.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-1}" \
        tools/train_image_tokenizer.py --images "${images[@]}" --output "${IMAGE_TOKENIZER:-tokenizers/image}" \
        --teacher "${TEACHER:?names the teacher: hf:DIR, or pixels}" --workers 4 "$@"
}

case "${1:-}" in
    text) train_text ;;
    image) shift; train_image "$@" ;;
    *) die "usage: bash examples/prepare/tokenizers.sh text|image" ;;
esac
