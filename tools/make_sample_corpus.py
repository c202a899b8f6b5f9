"""Generate the sample corpus: pictures of coloured shapes, captions, paragraphs and five downstream tasks.

python tools/make_sample_corpus.py --output corpora/sample --num-images 2000 --seed 0
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.sample_corpus.writer import SampleCorpus, make_sample_corpus


def parse_arguments() -> SampleCorpus:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Generate the sample corpus; the same arguments give the same bytes."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--num-images",
        type=int,
        required=True,
        metavar="N",
        help="N pictures with five captions each, N without, 2 N paragraphs, a tenth of it to "
        "validate; about 3 N pictures for VQA, NLVR2, Flickr30K, ImageNet and MNLI, 108 at least",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="W")
    return SampleCorpus(**vars(parser.parse_args()))


def main() -> int:
    """Generates; returns the exit status."""
    corpus = parse_arguments()
    try:
        made = make_sample_corpus(corpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'wrote' if made else 'nothing to do: found complete'} sample corpus {corpus.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
