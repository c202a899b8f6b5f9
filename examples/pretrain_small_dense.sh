#!/usr/bin/env bash
# Pretrains the dense SMALL of the paper. Variables and options: examples/pretrain_common.sh.
SIZE=small
EXPERTS=dense
source "$(dirname "$0")/pretrain_common.sh"
