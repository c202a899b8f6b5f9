#!/usr/bin/env bash
# Pretrains VL-MoE SMALL/16E of the paper: 16 vision and 16 text experts. Variables and options: examples/pretrain_common.sh.
SIZE=small
EXPERTS=16e
source "$(dirname "$0")/pretrain_common.sh"
