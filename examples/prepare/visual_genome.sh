#!/usr/bin/env bash
# Visual Genome: every region phrase is a caption of the whole image, as VLMo takes it.
# Download from the Visual Genome site: images part 1 and part 2, region descriptions (version 1.2 or later).
# Layout:
#   RAW/vg/VG_100K/*.jpg
#   RAW/vg/VG_100K_2/*.jpg
#   RAW/vg/annotations/region_descriptions.json      (read whole: some GB of memory)
# Makes DATA/vg_train. Variables: examples/prepare/common.sh.
#
# Visual Genome and COCO share images, among them images of COCO's validation and test splits: leave those out of
# the annotations first if fine-tuning on COCO or VQA is to be scored cleanly.
source "$(dirname "$0")/common.sh"
need "$RAW/vg/annotations/region_descriptions.json" "Visual Genome's region descriptions"
need "$RAW/vg/VG_100K" "Visual Genome's images, part 1"
need "$RAW/vg/VG_100K_2" "Visual Genome's images, part 2"
pairs vg_train --format visual-genome --annotations "$RAW/vg/annotations/region_descriptions.json" --images "$RAW/vg"
