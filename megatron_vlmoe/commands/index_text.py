"""Tokenize text files into an indexed dataset.

vlmoe index-text --input wiki.jsonl books.txt --output data/wikibooks \
    --text-tokenizer tokenizers/text.model --workers 16
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_vlmoe.commands.options import (
    OUTPUT_PREFIX,
    TEXT_TOKENIZER,
    CommandParser,
    add_options,
    add_sharding,
    execution_of,
    run_of,
)
from megatron_vlmoe.config.errors import DataError, user_files
from megatron_vlmoe.prepare.corpora import preprocess_text
from megatron_vlmoe.prepare.executors import execute
from megatron_vlmoe.prepare.readers.text import TextInput, lines_of_document


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "index-text",
        "Tokenize text files; writes P_text_document.bin, P_text_document.idx, P.json.",
        OUTPUT_PREFIX | TEXT_TOKENIZER,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, plain text, Parquet or Arrow, compressed or not",
    )
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
        *("--output", "--text-tokenizer", "--workers", "--on-error"),
        rejects="records",
    )
    add_sharding(parser)
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Tokenizes."""
    parser = build_parser()
    options = parser.parse_args(words)
    try:
        lines_of_document(options.documents)
    except DataError as error:
        parser.error(str(error))
    source = TextInput(tuple(options.input), options.format, options.text_key, options.documents)
    run = run_of(options, "index-text", words, options.input)
    execute(partial(preprocess_text, source, options.text_tokenizer), run, execution_of(options))
