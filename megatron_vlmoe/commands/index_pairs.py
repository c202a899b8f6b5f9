"""Put images with their captions into an indexed dataset.

vlmoe index-pairs --format karpathy --annotations dataset_coco.json --images coco \
    --output data/coco --text-tokenizer tokenizers/text.model --workers 16
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_vlmoe.commands.options import (
    OUTPUT_PREFIX,
    TEXT_TOKENIZER,
    CommandParser,
    add_image_rules,
    add_options,
    add_sharding,
    execution_of,
    run_of,
)
from megatron_vlmoe.config.errors import DataError, user_files
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.corpora import DEFAULT_MAX_CAPTION_TOKENS, PairOptions, preprocess_pairs
from megatron_vlmoe.prepare.executors import execute
from megatron_vlmoe.prepare.readers.pair_formats import (
    FORMATS_WITH_KEYS,
    FORMATS_WITH_SPLITS,
    PAIR_FORMATS,
    check_options,
)
from megatron_vlmoe.prepare.readers.pairs import SPLIT_KEY, PairInput
from megatron_vlmoe.prepare.tool import positive_int


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "index-pairs",
        "Index captioned images; writes P_image.*, P_text.* and P.json.",
        OUTPUT_PREFIX | TEXT_TOKENIZER,
    )
    parser.add_argument(
        "--format",
        choices=["auto", *PAIR_FORMATS],
        default="auto",
        help="layout of the annotations; auto: by what they hold",
    )
    parser.add_argument(
        "--annotations",
        nargs="+",
        default=[],
        metavar="F",
        help="annotation files; for webdataset tars or folders of tars, for files folders",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images")
    keyed = ", ".join(FORMATS_WITH_KEYS)
    parser.add_argument(
        "--split",
        nargs="+",
        metavar="S",
        help=f"{', '.join(FORMATS_WITH_SPLITS)}: splits to take, where the records name theirs "
        "(train restval)",
    )
    parser.add_argument(
        "--split-key",
        default=SPLIT_KEY,
        metavar="K",
        help=f"{keyed}: key of the split (%(default)s)",
    )
    parser.add_argument("--image-key", metavar="K", help=f"{keyed}: key or column of the image")
    parser.add_argument(
        "--caption-key", metavar="K", help=f"{keyed}, webdataset, files: key of the caption(s)"
    )
    parser.add_argument(
        "--separator",
        metavar="C",
        help="csv: what separates the columns (tab, else the one that the first line has)",
    )
    parser.add_argument(
        "--max-caption-tokens",
        type=positive_int,
        default=DEFAULT_MAX_CAPTION_TOKENS,
        metavar="N",
        help="reject longer captions (%(default)s)",
    )
    add_options(
        parser,
        *("--output", "--text-tokenizer", "--workers", "--resize-short", "--on-error"),
        rejects="captions and images",
    )
    add_image_rules(parser)
    add_sharding(parser)
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Indexes."""
    parser = build_parser()
    options = parser.parse_args(words)
    if not options.annotations and options.images is None:
        parser.error("neither --annotations nor --images is given")
    source = PairInput(
        options.format,
        tuple(options.annotations),
        options.images,
        tuple(options.split) if options.split else None,
        options.image_key,
        options.caption_key,
        options.split_key,
        None if options.separator is None else options.separator.replace("\\t", "\t"),
    )
    if options.format != "auto":
        try:
            check_options(source)
        except DataError as error:
            parser.error(str(error))
    inputs = [*options.annotations, *([options.images] if options.images else [])]
    run = run_of(options, "index-pairs", words, inputs)
    rules = ImageRules(options.exif, options.alpha)
    store = PairOptions(options.resize_short, options.max_caption_tokens, rules)
    job = partial(preprocess_pairs, source, options.text_tokenizer, options=store)
    execute(job, run, execution_of(options))
