#!/usr/bin/env bash
# SBU Captions (one million Flickr images, one caption each; some links are dead by now).
# Download: the list of URLs and captions from the SBU Captions site, then the images, with a downloader of your
# choice. Two layouts are read:
#   RAW/sbu/annot.json, a list of [path, caption], and RAW/sbu/images_train/*/*        (as VLMo)
#   RAW/sbu/*.tar: WebDataset shards of image and caption                              (as img2dataset)
# Makes DATA/sbu_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
if compgen -G "$RAW/sbu/*.tar" >/dev/null; then
    pairs sbu_train --format webdataset --images "$RAW/sbu"
else
    need "$RAW/sbu/annot.json" "a list of [path, caption], or WebDataset shards $RAW/sbu/*.tar"
    need "$RAW/sbu/images_train" "the images"
    pairs sbu_train --format sbu --annotations "$RAW/sbu/annot.json" --images "$RAW/sbu/images_train"
fi
