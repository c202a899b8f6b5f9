#!/usr/bin/env bash
# Natural language for visual reasoning (NLVR2): 384 pixels, 10 epochs of 128. Variables and options: examples/finetune_common.sh.
TASK=nlvr2
RECIPE=nlvr2
source "$(dirname "$0")/finetune_common.sh"
