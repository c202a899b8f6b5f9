#!/usr/bin/env bash
# Image-text retrieval on COCO: 384 pixels, 20 epochs of 2,048. Variables and options: examples/finetune_common.sh.
TASK=retrieval
RECIPE=coco
source "$(dirname "$0")/finetune_common.sh"
