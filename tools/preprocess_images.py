"""Check images and put them into an indexed dataset.

python tools/preprocess_images.py --input imagenet/train --output-prefix data/imagenet --workers 16
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.data.preprocess import Run, positive_int, run_tool
from megatron_vlmoe.data.preprocess_images import preprocess_images


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
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument(
        "--resize-short",
        type=positive_int,
        metavar="N",
        help="shrink images whose shorter side is over N pixels to it (JPEG quality 95)",
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="processes (%(default)s)")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="skip: leave bad images out and list them in P.rejects.jsonl",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocesses; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(arguments)
    command = shlex.join(["tools/preprocess_images.py", *arguments])
    record = {"command": command, "inputs": options.input}
    run = Run(options.output_prefix, options.workers, options.on_error, record)
    return run_tool(lambda: preprocess_images(tuple(options.input), run, options.resize_short))


if __name__ == "__main__":
    sys.exit(main())
