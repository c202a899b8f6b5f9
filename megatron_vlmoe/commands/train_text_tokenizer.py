"""Train the SentencePiece text tokenizer.

vlmoe train-text-tokenizer --input text.jsonl captions.json --vocab-size 64000 --output tokenizers/text
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import OUTPUT_PREFIX, CommandParser, add_options
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.text import read_training_texts
from megatron_vlmoe.prepare.tool import RejectLog
from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer


def build_parser() -> CommandParser:
    """The options."""
    defaults = TextTokenizerTraining
    parser = CommandParser(
        "train-text-tokenizer",
        "Train the SentencePiece (unigram) text tokenizer; writes P.model and P.vocab.",
        OUTPUT_PREFIX,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text as index-text reads it, or captions (docs/data.md)",
    )
    add("--text-key", metavar="K", help="JSON key or column (text, caption or captions)")
    add("--vocab-size", type=int, required=True, help="pieces, special ones included")
    add("--output", type=Path, required=True, metavar="P", help="path of the files without suffix")
    add(
        "--character-coverage",
        type=float,
        default=defaults.character_coverage,
        help="share of all characters that get a piece of their own (%(default)s)",
    )
    add("--byte-fallback", action="store_true", help="spell unknown characters as UTF-8 bytes")
    add(
        "--max-sentences",
        type=int,
        default=defaults.max_sentences,
        help="train on a uniform sample of so many lines; bounds the memory (%(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, help="seed of that sample (%(default)s)")
    add(
        "--num-threads",
        type=int,
        default=defaults.num_threads,
        help="another number gives a slightly different model (%(default)s)",
    )
    add_options(parser, "--on-error", rejects="records")
    return parser


def without_rejects(items: Iterable[str | Reject], rejects: RejectLog) -> Iterator[str]:
    """The texts; what is none goes to ``rejects``."""
    for item in items:
        if isinstance(item, Reject):
            rejects.add([item])
        else:
            yield item


@user_files()
def main(words: Sequence[str]) -> None:
    """Trains and says what it made."""
    values = vars(build_parser().parse_args(words))
    inputs, key, on_error = (values.pop(name) for name in ("input", "text_key", "on_error"))
    training = TextTokenizerTraining(output_prefix=values.pop("output"), **values)
    training.validate()
    training.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    rejects = RejectLog(str(training.output_prefix), on_error)
    try:
        texts = without_rejects(read_training_texts(inputs, key), rejects)
        size = train_text_tokenizer(training, texts)
        rejects.finish()
        rejects.publish()
    finally:
        rejects.abort()
    if size < training.vocab_size:
        print(
            f"warning: the corpus fills only {size} of the {training.vocab_size} pieces asked for; "
            f"the vocabulary has {size}",
            file=sys.stderr,
        )
    if rejects.count:
        print(f"{rejects.count} records left out; the first: {rejects.first}", file=sys.stderr)
    print(
        f"wrote {training.output_prefix}.model ({size} pieces) and {training.output_prefix}.vocab"
    )
