#!/usr/bin/env bash
# English Wikipedia.
# Download a dump (enwiki-*-pages-articles.xml.bz2 from dumps.wikimedia.org) and take the text out of it with
# WikiExtractor: `wikiextractor --json -o RAW/wikipedia DUMP`; or take the parquet files of a cleaned copy.
# Layout (the first that is there is read):
#   RAW/wikipedia/*.parquet             column "text"
#   RAW/wikipedia/*.arrow               the same, of the datasets library
#   RAW/wikipedia/*.jsonl               key "text", a document per line; also compressed, as *.jsonl.gz
#   RAW/wikipedia/*/wiki_*              WikiExtractor's output, JSON lines with the key "text"
# Makes DATA/wikipedia_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
need "$RAW/wikipedia" "the extracted text of Wikipedia"
find_wikipedia
[ "${#FILES[@]}" -gt 0 ] || die "$RAW/wikipedia has neither *.parquet nor *.arrow nor *.jsonl nor WikiExtractor's */wiki_*"
text wikipedia_train --input "${FILES[@]}"
