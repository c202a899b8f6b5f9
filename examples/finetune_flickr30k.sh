#!/usr/bin/env bash
# Image-text retrieval on Flickr30K from the model of finetune_coco.sh (LOAD=runs/coco/best): 384 pixels, 40 epochs of 2,048. Variables and options: examples/finetune_common.sh.
TASK=retrieval
RECIPE=flickr30k
source "$(dirname "$0")/finetune_common.sh"
