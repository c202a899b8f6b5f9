"""Store visual codes of every image of an indexed dataset: PREFIX_image -> PREFIX_codes.

python tools/encode_images.py --images corpora/images --tokenizer tokenizers/image --views 4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_vlmoe.data.codes import codes_prefix
from megatron_vlmoe.prepare.codes import CodesOptions, write_codes
from megatron_vlmoe.tokenizers.image import ImageTokenizer


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Encode random crops of every image with the image tokenizer. Training draws "
        "among the stored views and applies exactly their geometry. A corrupt image ends it, "
        "named: codes belong to images by number."
    )
    add = parser.add_argument
    add("--images", required=True, metavar="PREFIX", help="dataset with PREFIX_image.bin")
    add(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="folder of tools/train_image_tokenizer.py, or a published BEiT v2 .pth file",
    )
    add("--views", type=int, default=1, help="views of every image (%(default)s)")
    add("--seed", type=int, default=0, help="of the crops")
    add("--output", metavar="PREFIX", help="writes PREFIX_codes.* (default: that of --images)")
    add("--min-scale", type=float, default=0.2, help="smallest crop, share of the area")
    add("--flip-probability", type=float, default=0.5)
    add("--batch-size", type=int, default=64, help="views encoded at once (%(default)s)")
    add("--workers", type=int, default=0, help="decoding processes (%(default)s)")
    add("--bf16", action="store_true", help="encoder under bf16 autocast")
    return parser.parse_args()


def main() -> int:
    """Encodes; returns the exit status."""
    arguments = parse_arguments()
    try:
        options = CodesOptions(
            num_views=arguments.views,
            seed=arguments.seed,
            min_scale=arguments.min_scale,
            flip_probability=arguments.flip_probability,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
        tokenizer = ImageTokenizer.from_pretrained(
            arguments.tokenizer,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        )
        if tokenizer.import_report is not None:
            print(tokenizer.import_report.summary())
        manifest = write_codes(arguments.images, tokenizer, options, arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"wrote {codes_prefix(arguments.output or arguments.images)}: {manifest.num_views} views "
        f"of {manifest.num_images} images, {manifest.grid}x{manifest.grid} codes each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
