"""Store visual codes of every image of an indexed dataset: PREFIX_image -> PREFIX_codes.

vlmoe encode-images --images corpora/images --image-tokenizer tokenizers/image --views 4
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.data.codes import codes_prefix
from megatron_vlmoe.runtime.lazy import load


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "encode-images",
        "Encode random crops of every image with the image tokenizer. Training draws among the stored views and "
        "applies exactly their geometry. A corrupt image ends it, named: codes belong to images by number.",
        {"--tokenizer": "--image-tokenizer"},
    )
    add = parser.add_argument
    add("--images", required=True, metavar="PREFIX", help="dataset with PREFIX_image.bin")
    add(
        "--image-tokenizer",
        required=True,
        metavar="DIR",
        help="folder of train-image-tokenizer, or a published BEiT v2 .pth file",
    )
    add("--views", type=int, default=1, help="views of every image (%(default)s)")
    add("--seed", type=int, default=0, help="of the crops (%(default)s)")
    add("--output", metavar="PREFIX", help="writes PREFIX_codes.* (default: that of --images)")
    add(
        "--min-scale",
        type=float,
        default=0.2,
        help="smallest crop as a share of the area (%(default)s)",
    )
    add(
        "--flip-probability",
        type=float,
        default=0.5,
        help="share of mirrored views (%(default)s)",
    )
    add("--batch-size", type=int, default=64, help="views encoded at once (%(default)s)")
    add("--workers", type=int, default=0, help="decoding processes (%(default)s)")
    add("--bf16", action="store_true", help="encoder under bf16 autocast")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Encodes and says what it wrote."""
    arguments = build_parser().parse_args(words)
    codes = load("megatron_vlmoe.prepare.codes")
    options = codes.CodesOptions(
        num_views=arguments.views,
        seed=arguments.seed,
        min_scale=arguments.min_scale,
        flip_probability=arguments.flip_probability,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    tokenizer = codes.open_encoder(arguments.image_tokenizer, arguments.bf16)
    if tokenizer.import_report is not None:
        print(tokenizer.import_report.summary())
    manifest = codes.write_codes(arguments.images, tokenizer, options, arguments.output)
    print(
        f"wrote {codes_prefix(arguments.output or arguments.images)}: {manifest.num_views} views "
        f"of {manifest.num_images} images, {manifest.grid}x{manifest.grid} codes each"
    )
