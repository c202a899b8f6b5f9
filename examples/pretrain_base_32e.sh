#!/usr/bin/env bash
# Pretrains VL-MoE BASE/32E of the paper: 32 vision and 32 text experts. Variables and options: examples/pretrain_common.sh.
SIZE=base
EXPERTS=32e
source "$(dirname "$0")/pretrain_common.sh"
