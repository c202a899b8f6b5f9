"""Train the SentencePiece text tokenizer.

python tools/train_text_tokenizer.py --input text.jsonl captions.json --vocab-size 64000 \
    --output-prefix tokenizers/text
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.training_texts import read_training_texts
from megatron_vlmoe.prepare.tool import RejectLog, run_tool
from megatron_vlmoe.prepare.tool_options import add_options
from megatron_vlmoe.tokenizers.text_training import TextTokenizerTraining, train_text_tokenizer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    defaults = TextTokenizerTraining
    parser = argparse.ArgumentParser(
        description="Train the SentencePiece (unigram) text tokenizer; writes P.model and P.vocab."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text as tools/preprocess_text.py reads it, or captions (docs/data.md)",
    )
    parser.add_argument(
        "--text-key", metavar="K", help="JSON key or column (text, caption or captions)"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="special pieces included")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="P")
    parser.add_argument("--character-coverage", type=float, default=defaults.character_coverage)
    parser.add_argument(
        "--byte-fallback", action="store_true", help="spell unknown characters as UTF-8 bytes"
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=defaults.max_sentences,
        help="train on a uniform sample of so many lines; bounds the memory (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of that sample")
    parser.add_argument(
        "--num-threads",
        type=int,
        default=defaults.num_threads,
        help="another number gives a slightly different model (%(default)s)",
    )
    add_options(parser, "--on-error", rejects="records")
    return parser.parse_args(argv)


def without_rejects(items: Iterable[str | Reject], rejects: RejectLog) -> Iterator[str]:
    """The texts; what is none goes to ``rejects``."""
    for item in items:
        if isinstance(item, Reject):
            rejects.add([item])
        else:
            yield item


def train(options: argparse.Namespace) -> None:
    """Trains and says what it made."""
    values = dict(vars(options))
    inputs, key, on_error = (values.pop(name) for name in ("input", "text_key", "on_error"))
    training = TextTokenizerTraining(**values)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status."""
    options = parse_arguments(argv)
    return run_tool(lambda: train(options))


if __name__ == "__main__":
    sys.exit(main())
