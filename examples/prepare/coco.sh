#!/usr/bin/env bash
# COCO captions with Karpathy's splits: train + restval to train on, val held out (the test split stays unseen).
# Download:
#   https://cocodataset.org: 2014 Train images, 2014 Val images
#   Karpathy's caption datasets (caption_datasets.zip): dataset_coco.json
# Layout:
#   RAW/coco/train2014/COCO_train2014_*.jpg
#   RAW/coco/val2014/COCO_val2014_*.jpg
#   RAW/coco/dataset_coco.json
# Makes DATA/coco_train and DATA/coco_val. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
need "$RAW/coco/dataset_coco.json" "Karpathy's COCO splits"
need "$RAW/coco/train2014" "COCO's 2014 training images"
need "$RAW/coco/val2014" "COCO's 2014 validation images"
pairs coco_train --format karpathy --annotations "$RAW/coco/dataset_coco.json" --images "$RAW/coco"
pairs coco_val --format karpathy --annotations "$RAW/coco/dataset_coco.json" --images "$RAW/coco" --split val
