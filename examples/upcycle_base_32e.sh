#!/usr/bin/env bash
# Makes BASE/32E of a dense BASE run, every expert a copy of the FFN of its modality, and pretrains it further.
#
#   DENSE=runs/base-dense       run or checkpoint folder to start from
#   START=runs/base-32e-start   the sparse checkpoint; made where it is missing
#   MOE                         options of the sparse model in one string, such as "--moe.topk 2"
#   UPCYCLE                     further options of `vlmoe upcycle` in one string (docs/upcycling.md)
# Data, processes, layout and RUN: examples/pretrain_common.sh. Everything after the script's name goes to the training:
#   TEXT=... IMAGES=... PAIRS=... TEXT_TOKENIZER=... RUN=runs/base-32e bash examples/upcycle_base_32e.sh --train.steps 50000
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/launch_common.sh

DENSE="${DENSE:-runs/base-dense}"
START="${START:-runs/base-32e-start}"
# read returns 1 at the end of a string, which may have several lines.
read -r -d '' -a MOE_OPTIONS <<< "${MOE:-}" || true
read -r -d '' -a UPCYCLE_OPTIONS <<< "${UPCYCLE:-}" || true

upcycle() {
    python -m megatron_vlmoe upcycle --load "$DENSE" --preset base-32e --output "$START" \
        "${MOE_OPTIONS[@]}" "${UPCYCLE_OPTIONS[@]}"
}
case " $* " in
    *" --dry-run "*) ;;
    *)
        prepare_once "$START" "$START/latest_checkpointed_iteration.txt" upcycle
        set -- --load "$START" "$@"
        ;;
esac
exec bash examples/pretrain_base_32e.sh "${MOE_OPTIONS[@]}" "$@"
