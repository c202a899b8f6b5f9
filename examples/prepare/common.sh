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

# find_files CORPUS PATTERN...: FILES becomes the files of the first pattern below RAW/CORPUS that has any (none: empty).
# Says what it takes, and what else is there.
find_files() {
    local corpus="$1" pattern found=(); shift
    FILES=()
    for pattern in "$@"; do
        # cache-*.arrow is what the datasets library keeps of filters and maps, beside the data.
        mapfile -t found < <(compgen -G "$RAW/$corpus/$pattern" | grep -v '/cache-[^/]*[.]arrow$' | LC_ALL=C sort)
        if [ "${#found[@]}" -eq 0 ]; then
            continue
        elif [ "${#FILES[@]}" -eq 0 ]; then
            FILES=("${found[@]}")
            echo "$corpus: reads ${#found[@]} of $RAW/$corpus/$pattern"
        else
            echo "$corpus: leaves out ${#found[@]} of $RAW/$corpus/$pattern"
        fi
    done
}

# The layouts of the two corpora of text, the first that is there; WikiExtractor writes AA/wiki_00 and so on.
find_wikipedia() { find_files wikipedia '*.parquet' '*.arrow' '*.jsonl' '*.jsonl.*' '*/wiki_*'; }
find_bookcorpus() { find_files bookcorpus '*.parquet' '*.arrow' '*.jsonl' '*.jsonl.*' '*.txt' '*.txt.*'; }

need_tokenizer() { need "$TEXT_TOKENIZER" "train it first with examples/prepare/tokenizers.sh, or set TEXT_TOKENIZER"; }

# once NAME COMMAND...: runs the command unless the dataset DATA/NAME is complete.
once() {
    local name="$1"; shift
    if [ -e "$DATA/$name.json" ]; then echo "have $DATA/$name"; return; fi
    "$@" --output "$DATA/$name" --workers "$WORKERS" --on-error "$ON_ERROR"
}

text() { local name="$1"; shift; need_tokenizer; once "$name" python -m megatron_vlmoe index-text --text-tokenizer "$TEXT_TOKENIZER" "$@"; }
images() { local name="$1"; shift; once "$name" python -m megatron_vlmoe index-images "${SHRINK[@]}" "$@"; }
pairs() { local name="$1"; shift; need_tokenizer; once "$name" python -m megatron_vlmoe index-pairs --text-tokenizer "$TEXT_TOKENIZER" "${SHRINK[@]}" "$@"; }
