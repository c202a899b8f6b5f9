"""Tokenize text files into an indexed dataset.

python tools/preprocess_text.py --input wiki.jsonl books.txt --output-prefix data/wikibooks \
    --tokenizer-model tokenizers/text.model --workers 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.text import TextInput, lines_of_document
from megatron_vlmoe.prepare.text import preprocess_text
from megatron_vlmoe.prepare.tool import run_tool
from megatron_vlmoe.prepare.tool_options import add_options, run_of


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Tokenize text files; writes P_text_document.bin, P_text_document.idx, P.json."
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--format",
        choices=["auto", "jsonl", "text", "parquet", "arrow"],
        default="auto",
        help="auto: by the content of each file, then its suffix",
    )
    parser.add_argument(
        "--text-key", default="text", help="JSON key or column of the text (%(default)s)"
    )
    parser.add_argument(
        "--documents",
        default="line",
        metavar="HOW",
        help="a document: line (or row), blank-line (plain text: between blank lines), or lines:N "
        "(N lines or rows joined, for files with a sentence per line)",
    )
    add_options(
        parser,
        *("--output-prefix", "--tokenizer-model", "--workers", "--on-error"),
        rejects="records",
    )
    options = parser.parse_args(argv)
    try:
        lines_of_document(options.documents)
    except DataError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocesses; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(arguments)
    source = TextInput(tuple(options.input), options.format, options.text_key, options.documents)
    run = run_of(options, "preprocess_text.py", arguments, options.input)
    return run_tool(lambda: preprocess_text(source, options.tokenizer_model, run))


if __name__ == "__main__":
    sys.exit(main())
