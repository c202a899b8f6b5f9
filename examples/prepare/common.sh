# What the preparation scripts share. Variables:
#   RAW=raw                 folder with the downloads, laid out as each script says
#   DATA=data               folder of the indexed datasets
#   TEXT_TOKENIZER=tokenizers/text.model      made by examples/prepare/tokenizers.sh
#   WORKERS                 processes (unset: one per core)
#   RESIZE_SHORT=320        shrinks larger images to this shorter side (training crops are 224); empty keeps all pixels
#   ON_ERROR=skip           leaves bad records out and lists them in PREFIX.rejects.jsonl; stop ends at the first
# Nothing is downloaded. A dataset that is complete is not made again: remove its PREFIX.json to redo it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x .venv/bin/python ] || export PATH="$PWD/.venv/bin:$PATH"
RAW="${RAW:-raw}"
DATA="${DATA:-data}"
TEXT_TOKENIZER="${TEXT_TOKENIZER:-tokenizers/text.model}"
WORKERS="${WORKERS:-$(nproc)}"
RESIZE_SHORT="${RESIZE_SHORT-320}"
ON_ERROR="${ON_ERROR:-skip}"
SHRINK=()
[ -z "$RESIZE_SHORT" ] || SHRINK=(--resize-short "$RESIZE_SHORT")

die() { echo "error: $*" >&2; exit 1; }

# need PATH WHAT: ends with what to download if PATH is not there.
need() { [ -e "$1" ] || die "$1 is missing: $2"; }

need_tokenizer() { need "$TEXT_TOKENIZER" "train it first with examples/prepare/tokenizers.sh, or set TEXT_TOKENIZER"; }

# once NAME COMMAND...: runs the command unless the dataset DATA/NAME is complete.
once() {
    local name="$1"; shift
    if [ -e "$DATA/$name.json" ]; then echo "have $DATA/$name"; return; fi
    "$@" --output-prefix "$DATA/$name" --workers "$WORKERS" --on-error "$ON_ERROR"
}

text() { local name="$1"; shift; need_tokenizer; once "$name" python tools/preprocess_text.py --tokenizer-model "$TEXT_TOKENIZER" "$@"; }
images() { local name="$1"; shift; once "$name" python tools/preprocess_images.py "${SHRINK[@]}" "$@"; }
pairs() { local name="$1"; shift; need_tokenizer; once "$name" python tools/preprocess_pairs.py --tokenizer-model "$TEXT_TOKENIZER" "${SHRINK[@]}" "$@"; }
