#!/usr/bin/env bash
# BookCorpus. The original is no longer distributed; BookCorpusOpen and other copies are.
# Layout (the first that is there is read):
#   RAW/bookcorpus/*.parquet            column "text"
#   RAW/bookcorpus/*.arrow              the same, of the datasets library
#   RAW/bookcorpus/*.jsonl              key "text"; also compressed, as *.jsonl.gz
#   RAW/bookcorpus/*.txt                a book per file, or a sentence per line in books_large_p*.txt
# DOCUMENTS says what a document is. Unset: a row or line of *.parquet, *.arrow and *.jsonl (a book); a paragraph of *.txt,
# between blank lines; 100 sentences of books_large_p*.txt. Copies with a sentence per row or line want DOCUMENTS=lines:100.
# Packing joins consecutive documents in a shuffled order, so long documents keep longer contexts.
# Makes DATA/bookcorpus_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
need "$RAW/bookcorpus" "a copy of BookCorpus"
find_bookcorpus
[ "${#FILES[@]}" -gt 0 ] || die "$RAW/bookcorpus has neither *.parquet nor *.arrow nor *.jsonl nor *.txt"
case "${FILES[0]}" in
    */books_large_p*.txt*) USUAL=lines:100 ;;
    *.txt | *.txt.*) USUAL=blank-line ;;
    *) USUAL=line ;;
esac
echo "bookcorpus: DOCUMENTS=${DOCUMENTS:=$USUAL}"
text bookcorpus_train --documents "$DOCUMENTS" --input "${FILES[@]}"
