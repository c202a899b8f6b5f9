# What all pretrain_*.sh share: sourced with SIZE (small, base) and EXPERTS (dense, 8e, 16e, 32e) set.
#
# Data, as prefixes of indexed datasets (docs/data.md); several, or a blend "0.7 PREFIX 0.3 PREFIX", in one string.
# An empty string leaves an objective's data out (then give --data.micro_texts 0 or its like too).
#   TEXT IMAGES PAIRS           training data
#   EVAL_TEXT EVAL_IMAGES EVAL_PAIRS    held-out data; unset: the last part of the training data
#   TEXT_TOKENIZER              SentencePiece model
#   IMAGE_TOKENIZER             VQ-KD folder or official BEiT v2 file; may be unset if codes are stored
#   RUN                         run folder; a run that was interrupted goes on from it
# Processes, the same on every node but for NODE_RANK:
#   NNODES=1 NODE_RANK=0 MASTER_ADDR MASTER_PORT=29500
#   GPUS_PER_NODE               processes per node (NPROC is the same); unset: the GPUs found, or 1
# Layout:
#   TP=1 PP=1 EP                EP unset: the largest number that divides the experts, the ranks of a stage and those of
#                               a node, beyond which all-to-alls are slow
# Everything after the script's name goes to the program:
#   bash examples/pretrain_base_32e.sh --dry-run
#   bash examples/pretrain_base_32e.sh --train.seed 2 --data.num_workers 4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source examples/launch_common.sh
if [ "$EXPERTS" = dense ]; then EP="${EP:-1}"; else EP="${EP:-$(gcd "$(gcd "${EXPERTS%e}" $((RANKS / PP)))" "$GPUS_PER_NODE")}"; fi

OPTIONS=(
    --preset "$SIZE-$EXPERTS"
    --parallel.tensor_model_parallel_size "$TP"
    --parallel.pipeline_model_parallel_size "$PP"
    --parallel.expert_model_parallel_size "$EP"
)
if given --dry-run "$@"; then
    exec python -m megatron_vlmoe pretrain "${OPTIONS[@]}" --dry-run-world-size "$RANKS" "$@"
fi
take --data.text TEXT "$@"
take --data.images IMAGES "$@"
take --data.pairs PAIRS "$@"
take --data.text_tokenizer TEXT_TOKENIZER "$@"
take_if_set --data.image_tokenizer IMAGE_TOKENIZER "$@"
take_if_set --data.eval_text EVAL_TEXT "$@"
take_if_set --data.eval_images EVAL_IMAGES "$@"
take_if_set --data.eval_pairs EVAL_PAIRS "$@"
given --checkpoint.save "$@" || take --save RUN "$@"

start_workers pretrain "${OPTIONS[@]}" "$@"
