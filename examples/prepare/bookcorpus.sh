#!/usr/bin/env bash
# BookCorpus. The original is no longer distributed; BookCorpusOpen and other copies are.
# Layout (the first that is there is read):
#   RAW/bookcorpus/*.parquet            column "text"
#   RAW/bookcorpus/*.jsonl              key "text", a document per line
#   RAW/bookcorpus/*.txt                a book per file, paragraphs between blank lines
# A paragraph of a .txt file becomes a document; packing joins consecutive documents in a shuffled order, so books
# as single documents (parquet, jsonl) keep longer contexts.
# Makes DATA/bookcorpus_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
need "$RAW/bookcorpus" "a copy of BookCorpus"
if compgen -G "$RAW/bookcorpus/*.parquet" >/dev/null; then
    text bookcorpus_train --input "$RAW"/bookcorpus/*.parquet
elif compgen -G "$RAW/bookcorpus/*.jsonl" >/dev/null; then
    text bookcorpus_train --input "$RAW"/bookcorpus/*.jsonl
elif compgen -G "$RAW/bookcorpus/*.txt" >/dev/null; then
    text bookcorpus_train --format text --documents blank-line --input "$RAW"/bookcorpus/*.txt
else
    die "$RAW/bookcorpus has neither *.parquet nor *.jsonl nor *.txt"
fi
