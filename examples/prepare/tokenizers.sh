#!/usr/bin/env bash
# Both tokenizers.
#
#   bash examples/prepare/tokenizers.sh text      a SentencePiece model of 64,000 pieces, on text and captions
#   bash examples/prepare/tokenizers.sh image     an image tokenizer of your own (VQ-KD), on images that are indexed
#
# text: set TEXT_FILES to the files or patterns that it trains on: text and captions as docs/data.md says. Unset, it takes
# the six corpora with text as examples/prepare/*.sh find them below RAW, and says which are not there:
#   wikipedia  bookcorpus  coco/dataset_coco.json  vg/annotations/region_descriptions.json
#   sbu/{*.tar,annot.json,sbu-captions-all.json}  cc3m/{train/*.tar,train_annot.json,Train_GCC-*.tsv}
# A bad record is left out and listed in TEXT_TOKENIZER's .rejects.jsonl, unless ON_ERROR=stop. Memory is bounded by
# SENTENCES=10000000 lines, drawn uniformly from all files. Makes TEXT_TOKENIZER.
#
# image: the paper takes BEiT v2's tokenizer. Its official checkpoint
# (vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth, from the unilm repository) needs no step here:
#   IMAGE_TOKENIZER=tokenizers/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth bash examples/pretrain_base_32e.sh
# To train one instead: TEACHER=hf:DIR names a folder of a CLIP or ViT model on disk (TEACHER=pixels needs none, and
# is for tests), IMAGES the indexed images, IMAGE_TOKENIZER=tokenizers/image the result; GPUS_PER_NODE its processes.
# Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"

train_text() {
    [ ! -e "$TEXT_TOKENIZER" ] || { echo "have $TEXT_TOKENIZER"; return; }
    local files=() missing=() corpus
    if [ -n "${TEXT_FILES:-}" ]; then
        # Words are patterns; the tool names one without a match.
        # shellcheck disable=SC2206
        files=($TEXT_FILES)
    else
        for corpus in wikipedia bookcorpus coco vg sbu cc3m; do
            case "$corpus" in
                wikipedia) find_wikipedia ;;
                bookcorpus) find_bookcorpus ;;
                coco) find_files coco dataset_coco.json ;;
                vg) find_files vg annotations/region_descriptions.json ;;
                sbu) find_files sbu '*.tar' annot.json sbu-captions-all.json ;;
                cc3m) find_files cc3m 'train/*.tar' train_annot.json 'Train_GCC-*.tsv' ;;
            esac
            if [ "${#FILES[@]}" -gt 0 ]; then files+=("${FILES[@]}"); else missing+=("$corpus"); fi
        done
        [ "${#files[@]}" -gt 0 ] || die "no text below $RAW: set TEXT_FILES to the files to train on"
        [ "${#missing[@]}" -eq 0 ] || echo "warning: not below $RAW, so not in the tokenizer: ${missing[*]}" >&2
    fi
    mkdir -p "$(dirname "$TEXT_TOKENIZER")"
    python -m megatron_vlmoe train-text-tokenizer --input "${files[@]}" --vocab-size "${VOCAB_SIZE:-64000}" \
        --output "${TEXT_TOKENIZER%.model}" --on-error "$ON_ERROR" --max-sentences "${SENTENCES:-10000000}"
}

train_image() {
    local images
    read -r -d '' -a images <<< "${IMAGES:-$DATA/imagenet22k_train}" || true # also over several lines
    # Goes on where an interrupted training stopped.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-1}" \
        -m megatron_vlmoe train-image-tokenizer --images "${images[@]}" --output "${IMAGE_TOKENIZER:-tokenizers/image}" \
        --teacher "${TEACHER:?names the teacher: hf:DIR, or pixels}" --workers 4 "$@"
}

case "${1:-}" in
    text) train_text ;;
    image) shift; train_image "$@" ;;
    *) die "usage: bash examples/prepare/tokenizers.sh text|image" ;;
esac
