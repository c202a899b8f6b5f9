"""Show what an indexed dataset holds.

vlmoe inspect-data data/coco --text-tokenizer tokenizers/text.model --png coco.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import TEXT_TOKENIZER, CommandParser
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.prepare.inspect import open_view, save_contact_sheet
from megatron_vlmoe.prepare.tool import positive_int


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "inspect-data", "Print counts, percentiles and samples of a dataset.", TEXT_TOKENIZER
    )
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="of the dataset, or of a split of a task")
    add("--text-tokenizer", metavar="FILE", help="SentencePiece model; decodes the texts")
    add("--num-samples", type=positive_int, default=5, help="samples to print (%(default)s)")
    add("--png", type=Path, metavar="FILE", help="draw a contact sheet")
    add(
        "--num-images",
        type=positive_int,
        default=24,
        help="images on the contact sheet (%(default)s)",
    )
    add("--checksums", action="store_true", help="verify the checksum of each file")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Prints, and draws if asked to."""
    options = build_parser().parse_args(words)
    view = open_view(options.prefix, options.text_tokenizer, options.checksums)
    for line in (*view.summary(), *view.samples(options.num_samples)):
        print(line)
    if options.png is not None:
        save_contact_sheet(view, options.png, options.num_images)
