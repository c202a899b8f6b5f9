"""Show what an indexed dataset holds.

python tools/inspect_dataset.py data/coco --tokenizer-model tokenizers/text.model --png coco.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.prepare.inspect import save_contact_sheet
from megatron_vlmoe.prepare.inspect_task import open_view
from megatron_vlmoe.prepare.tool import positive_int, run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Print counts, percentiles and samples.")
    parser.add_argument("prefix", metavar="PREFIX")
    parser.add_argument("--tokenizer-model", metavar="M", help="decode texts with this model")
    parser.add_argument("--num-samples", type=positive_int, default=5, help="(%(default)s)")
    parser.add_argument("--png", type=Path, metavar="OUT", help="draw a contact sheet")
    parser.add_argument(
        "--num-images", type=positive_int, default=24, help="on the contact sheet (%(default)s)"
    )
    parser.add_argument("--checksums", action="store_true", help="verify the checksum of each file")
    return parser.parse_args(argv)


def inspect(options: argparse.Namespace) -> None:
    """Prints, and draws if asked to."""
    view = open_view(options.prefix, options.tokenizer_model, options.checksums)
    for line in (*view.summary(), *view.samples(options.num_samples)):
        print(line)
    if options.png is not None:
        save_contact_sheet(view, options.png, options.num_images)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects; returns the exit status."""
    options = parse_arguments(argv)
    return run_tool(lambda: inspect(options))


if __name__ == "__main__":
    sys.exit(main())
