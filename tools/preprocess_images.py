"""Check images and put them into an indexed dataset.

python tools/preprocess_images.py --input imagenet/train --output-prefix data/imagenet --workers 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.images import preprocess_images
from megatron_vlmoe.prepare.tool import run_tool
from megatron_vlmoe.prepare.tool_options import add_image_rules, add_options, run_of


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Check and index images; writes P_image.bin, P_image.idx and P.json."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="DIR_OR_TAR",
        help="folders (recursive), tars of images, WebDataset tars",
    )
    add_options(
        parser, "--output-prefix", "--workers", "--resize-short", "--on-error", rejects="images"
    )
    add_image_rules(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocesses; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(arguments)
    run = run_of(options, "preprocess_images.py", arguments, options.input)
    rules = ImageRules(options.exif, options.alpha)
    inputs = tuple(options.input)
    return run_tool(lambda: preprocess_images(inputs, run, options.resize_short, rules))


if __name__ == "__main__":
    sys.exit(main())
