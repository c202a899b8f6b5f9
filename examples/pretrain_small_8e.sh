#!/usr/bin/env bash
# Pretrains VL-MoE SMALL/8E of the paper: 8 vision and 8 text experts. Variables and options: examples/pretrain_common.sh.
SIZE=small
EXPERTS=8e
source "$(dirname "$0")/pretrain_common.sh"
