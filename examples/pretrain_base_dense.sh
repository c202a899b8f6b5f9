#!/usr/bin/env bash
# Pretrains the dense BASE of the paper. Variables and options: examples/pretrain_common.sh.
SIZE=base
EXPERTS=dense
source "$(dirname "$0")/pretrain_common.sh"
