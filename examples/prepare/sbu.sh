#!/usr/bin/env bash
# SBU Captions (one million Flickr images, one caption each; some links are dead by now).
# Download: the list of URLs and captions from the SBU Captions site, then the images, with a downloader of your
# choice. The first of these layouts that is there is read:
#   RAW/sbu/*.tar: WebDataset shards of image and caption                              (as img2dataset)
#   RAW/sbu/00000/*: images with a .txt or .json beside each                           (as img2dataset, files)
#   RAW/sbu/annot.json, a list of [path, caption], and RAW/sbu/images_train/*/*        (as VLMo and ViLT)
#   RAW/sbu/sbu-captions-all.json, the list itself, and RAW/sbu/images_train/ with images named as in their URLs
# Makes DATA/sbu_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
if compgen -G "$RAW/sbu/*.tar" >/dev/null; then
    pairs sbu_train --format webdataset --images "$RAW/sbu"
elif compgen -G "$RAW/sbu/00000/*" >/dev/null; then
    pairs sbu_train --format files --images "$RAW/sbu"
else
    LIST="$RAW/sbu/annot.json"
    [ -e "$LIST" ] || LIST="$RAW/sbu/sbu-captions-all.json"
    need "$LIST" "a list of [path, caption] (annot.json), SBU's own list, or WebDataset shards $RAW/sbu/*.tar"
    need "$RAW/sbu/images_train" "the images"
    pairs sbu_train --format sbu --annotations "$LIST" --images "$RAW/sbu/images_train"
fi
