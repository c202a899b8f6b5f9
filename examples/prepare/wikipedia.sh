#!/usr/bin/env bash
# English Wikipedia.
# Download a dump (enwiki-*-pages-articles.xml.bz2 from dumps.wikimedia.org) and take the text out of it with
# WikiExtractor: `wikiextractor --json -o RAW/wikipedia DUMP`; or take the parquet files of a cleaned copy.
# Layout (the first that is there is read):
#   RAW/wikipedia/*.parquet             column "text"
#   RAW/wikipedia/*.jsonl               key "text", a document per line
#   RAW/wikipedia/??/wiki_*             WikiExtractor's output, JSON lines with the key "text"
# Makes DATA/wikipedia_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
need "$RAW/wikipedia" "the extracted text of Wikipedia"
if compgen -G "$RAW/wikipedia/*.parquet" >/dev/null; then
    text wikipedia_train --input "$RAW"/wikipedia/*.parquet
elif compgen -G "$RAW/wikipedia/*.jsonl" >/dev/null; then
    text wikipedia_train --input "$RAW"/wikipedia/*.jsonl
elif compgen -G "$RAW/wikipedia/*/wiki_*" >/dev/null; then
    text wikipedia_train --format jsonl --input "$RAW"/wikipedia/*/wiki_*
else
    die "$RAW/wikipedia has neither *.parquet nor *.jsonl nor WikiExtractor's ??/wiki_*"
fi
