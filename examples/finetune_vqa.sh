#!/usr/bin/env bash
# Visual question answering (VQA v2): 480 pixels, 10 epochs of 128. Variables and options: examples/finetune_common.sh.
TASK=vqa
RECIPE=vqa
source "$(dirname "$0")/finetune_common.sh"
