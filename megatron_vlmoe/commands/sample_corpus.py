"""Generate the sample corpus: pictures of coloured shapes, captions, paragraphs and five downstream tasks.

vlmoe sample-corpus --output corpora/sample --num-images 2000 --seed 0
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.sample_corpus.writer import SampleCorpus, make_sample_corpus


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "sample-corpus", "Generate the sample corpus; the same arguments give the same bytes."
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add(
        "--num-images",
        type=int,
        required=True,
        metavar="N",
        help="N pictures with five captions each, N without, 2 N paragraphs, a tenth of it to "
        "validate; about 3 N pictures for VQA, NLVR2, Flickr30K, ImageNet and MNLI, 108 at least",
    )
    add("--seed", type=int, default=0, metavar="S", help="of all that is drawn (%(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="W",
        help="processes; the number changes no file (%(default)s)",
    )
    return parser


def main(words: Sequence[str]) -> None:
    """Generates."""
    corpus = SampleCorpus(**vars(build_parser().parse_args(words)))
    made = make_sample_corpus(corpus)
    print(f"{'wrote' if made else 'nothing to do: found complete'} sample corpus {corpus.output}")
