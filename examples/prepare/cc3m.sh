#!/usr/bin/env bash
# Conceptual Captions 3M (some links are dead by now).
# Download: the training and validation lists of URLs and captions from the Conceptual Captions site, then the
# images, with a downloader of your choice. For each split the first of these layouts that is there is read:
#   RAW/cc3m/{train,val}/*.tar: WebDataset shards of image and caption                      (as img2dataset)
#   RAW/cc3m/{train,val}/00000/*: images with a .txt or .json beside each                   (as img2dataset, files)
#   RAW/cc3m/{train,val}_annot.json, lists of [path, caption], and RAW/cc3m/images_{train,val}/*/*    (as VLMo and ViLT)
#   RAW/cc3m/{Train,Validation}_GCC-*.tsv, the lists themselves, and RAW/cc3m/images_{train,val}/ with images that
#   are named as in their URLs or NUMBER_CRC32 (docs/data.md)
# Makes DATA/cc3m_train and, where there is a validation part, DATA/cc3m_val. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
for SPLIT in train val; do
    case "$SPLIT" in train) LISTS="$RAW/cc3m/Train_GCC-*.tsv" ;; val) LISTS="$RAW/cc3m/Validation_GCC-*.tsv" ;; esac
    LIST="$RAW/cc3m/${SPLIT}_annot.json"
    [ -e "$LIST" ] || LIST="$(compgen -G "$LISTS" || true)"
    if compgen -G "$RAW/cc3m/$SPLIT/*.tar" >/dev/null; then
        pairs "cc3m_$SPLIT" --format webdataset --images "$RAW/cc3m/$SPLIT"
    elif compgen -G "$RAW/cc3m/$SPLIT/00000/*" >/dev/null; then
        pairs "cc3m_$SPLIT" --format files --images "$RAW/cc3m/$SPLIT"
    elif [ -n "$LIST" ]; then
        need "$RAW/cc3m/images_$SPLIT" "the images of the $SPLIT list"
        pairs "cc3m_$SPLIT" --format cc3m --annotations "$LIST" --images "$RAW/cc3m/images_$SPLIT"
    elif [ "$SPLIT" = train ]; then
        die "none of $RAW/cc3m/train_annot.json, $RAW/cc3m/Train_GCC-*.tsv and $RAW/cc3m/train/*.tar is there"
    else
        echo "cc3m: no validation part: none of $RAW/cc3m/val_annot.json, $RAW/cc3m/Validation_GCC-*.tsv and $RAW/cc3m/val/*.tar is there"
    fi
done
