#!/usr/bin/env bash
# Natural language inference (MNLI): 10 epochs of 32. Variables and options: examples/finetune_common.sh.
TASK=mnli
RECIPE=mnli
source "$(dirname "$0")/finetune_common.sh"
