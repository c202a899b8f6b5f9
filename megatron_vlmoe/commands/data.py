"""The commands that look at prepared data, join it, and make some to try things on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import (
    OUTPUT_PREFIX,
    TEXT_TOKENIZER,
    CommandParser,
    dataset_prefix,
    output_file,
    output_prefix,
)
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.prepare.inspect import open_view, save_contact_sheet
from megatron_vlmoe.prepare.merge import merge_inputs, merge_shards
from megatron_vlmoe.prepare.tool import positive_int
from megatron_vlmoe.sample_corpus.writer import SampleCorpus, make_sample_corpus


@user_files()
def inspect(words: Sequence[str]) -> None:
    """`vlmoe inspect-data data/coco --text-tokenizer tokenizers/text.model --png coco.png`."""
    parser = CommandParser(
        "inspect-data", "Print counts, percentiles and samples of a dataset.", TEXT_TOKENIZER
    )
    add = parser.add_argument
    add(
        "prefix",
        type=dataset_prefix,
        metavar="PREFIX",
        help="of the dataset, or of a split of a task",
    )
    add("--text-tokenizer", metavar="FILE", help="SentencePiece model; decodes the texts")
    add("--num-samples", type=positive_int, default=5, help="samples to print (%(default)s)")
    add("--png", type=output_file, metavar="FILE", help="draw a contact sheet")
    add(
        "--num-images",
        type=positive_int,
        default=24,
        help="images on the contact sheet (%(default)s)",
    )
    add("--checksums", action="store_true", help="verify the checksum of each file")
    options = parser.parse_args(words)
    view = open_view(options.prefix, options.text_tokenizer, options.checksums)
    for line in (*view.summary(), *view.samples(options.num_samples)):
        print(line)
    if options.png is not None:
        save_contact_sheet(view, options.png, options.num_images)


@user_files()
def merge_data(words: Sequence[str]) -> None:
    """`vlmoe merge-data --input data/coco data/vg --output data/pairs`."""
    parser = CommandParser(
        "merge-data",
        "Concatenate datasets of one kind and one tokenizer, in the given order, or the shards of a run.",
        OUTPUT_PREFIX,
    )
    add = parser.add_argument
    add(
        "--input",
        type=dataset_prefix,
        nargs="+",
        metavar="PREFIX",
        help="datasets to concatenate, local or remote",
    )
    add(
        "--shards",
        type=output_prefix,
        metavar="P",
        help="the --output of a run with --shard (of encode-images P_codes): joins all of its shards",
    )
    add(
        "--output",
        type=output_prefix,
        metavar="PREFIX",
        help="dataset to make (with --shards: what the run without shards would write)",
    )
    options = parser.parse_args(words)
    if (options.input is None) == (options.shards is None):
        parser.error("give either --input or --shards")
    if options.shards is not None:
        count, output = (
            merge_shards(options.shards, options.output),
            options.output or options.shards,
        )
        print(f"wrote {output}: {count} shards, one after the other")
        return
    if options.output is None:
        parser.error("--input needs --output")
    source = {"command": shlex.join(["vlmoe", "merge-data", *words]), "inputs": options.input}
    merge_inputs(options.input, options.output, source)
    print(f"wrote {options.output}: {len(options.input)} datasets, one after the other")


def sample_corpus(words: Sequence[str]) -> None:
    """`vlmoe sample-corpus --output corpora/sample --num-images 2000 --seed 0`."""
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
    corpus = SampleCorpus(**vars(parser.parse_args(words)))
    made = make_sample_corpus(corpus)
    print(f"{'wrote' if made else 'nothing to do: found complete'} sample corpus {corpus.output}")
