#!/usr/bin/env bash
# Conceptual Captions 3M (some links are dead by now).
# Download: the training and validation lists of URLs and captions from the Conceptual Captions site, then the
# images, with a downloader of your choice. Two layouts are read:
#   RAW/cc3m/{train,val}_annot.json, lists of [path, caption], and RAW/cc3m/images_{train,val}/*/*    (as VLMo)
#   RAW/cc3m/{train,val}/*.tar: WebDataset shards of image and caption                        (as img2dataset)
# Makes DATA/cc3m_train and, where there is a validation part, DATA/cc3m_val. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
for SPLIT in train val; do
    if compgen -G "$RAW/cc3m/$SPLIT/*.tar" >/dev/null; then
        pairs "cc3m_$SPLIT" --format webdataset --images "$RAW/cc3m/$SPLIT"
    elif [ -e "$RAW/cc3m/${SPLIT}_annot.json" ]; then
        need "$RAW/cc3m/images_$SPLIT" "the images of the $SPLIT list"
        pairs "cc3m_$SPLIT" --format cc3m --annotations "$RAW/cc3m/${SPLIT}_annot.json" --images "$RAW/cc3m/images_$SPLIT"
    elif [ "$SPLIT" = train ]; then
        die "neither $RAW/cc3m/train_annot.json nor $RAW/cc3m/train/*.tar is there"
    else
        echo "cc3m: no validation part: neither $RAW/cc3m/val_annot.json nor $RAW/cc3m/val/*.tar is there"
    fi
done
