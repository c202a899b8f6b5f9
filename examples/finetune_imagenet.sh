#!/usr/bin/env bash
# ImageNet-1K: 384 pixels, 15 epochs of 2,048; after the intermediate step --preset imagenet22k on ImageNet-22K. Variables and options: examples/finetune_common.sh.
TASK=imagenet
RECIPE=imagenet
source "$(dirname "$0")/finetune_common.sh"
