"""Check images and put them into an indexed dataset.

vlmoe index-images --input imagenet/train --output data/imagenet --workers 16
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_vlmoe.commands.options import (
    OUTPUT_PREFIX,
    CommandParser,
    add_image_rules,
    add_options,
    add_sharding,
    execution_of,
    run_of,
)
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.corpora import preprocess_images
from megatron_vlmoe.prepare.executors import execute


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "index-images",
        "Check and index images; writes P_image.bin, P_image.idx and P.json.",
        OUTPUT_PREFIX,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="DIR_OR_TAR",
        help="folders (recursive), tars of images, WebDataset tars",
    )
    add_options(parser, "--output", "--workers", "--resize-short", "--on-error", rejects="images")
    add_image_rules(parser)
    add_sharding(parser)
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Checks and indexes."""
    options = build_parser().parse_args(words)
    run = run_of(options, "index-images", words, options.input)
    rules = ImageRules(options.exif, options.alpha)
    job = partial(
        preprocess_images, tuple(options.input), resize_short=options.resize_short, rules=rules
    )
    execute(job, run, execution_of(options))
