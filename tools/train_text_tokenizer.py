"""Train the SentencePiece text tokenizer.

python tools/train_text_tokenizer.py --input text.jsonl captions.json --vocab-size 64000 \
    --output-prefix tokenizers/text
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.tokenizers.text_training import TextTokenizerTraining, train_text_tokenizer


def parse_arguments() -> TextTokenizerTraining:
    """Reads the command line."""
    defaults = TextTokenizerTraining
    parser = argparse.ArgumentParser(
        description="Train the SentencePiece (unigram) text tokenizer; writes P.model and P.vocab."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help='.jsonl (key "text"), .json (COCO or Karpathy captions), anything else: plain text',
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
    arguments = vars(parser.parse_args())
    return TextTokenizerTraining(inputs=arguments.pop("input"), **arguments)


def main() -> int:
    """Trains; returns the exit status."""
    training = parse_arguments()
    try:
        size = train_text_tokenizer(training)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if size < training.vocab_size:
        print(
            f"warning: the corpus fills only {size} of the {training.vocab_size} pieces asked for; "
            f"the vocabulary has {size}",
            file=sys.stderr,
        )
    print(
        f"wrote {training.output_prefix}.model ({size} pieces) and {training.output_prefix}.vocab"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
