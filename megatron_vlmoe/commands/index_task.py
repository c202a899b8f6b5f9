"""Prepare a downstream task from the raw data of its publishers.

vlmoe index-task --task vqa --raw raw/vqa --output data/vqa \
    --text-tokenizer tokenizers/text.model --resize-short 480 --workers 16
"""

from __future__ import annotations

import dataclasses
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
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.config.tasks import find_task, task_names
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.executors import execute
from megatron_vlmoe.prepare.readers.tasks.records import TaskInput
from megatron_vlmoe.prepare.tasks import TaskOptions, prepare_task
from megatron_vlmoe.prepare.tool import positive_int

# Options that only some tasks have.
READER_OPTIONS = tuple(
    field.name for field in dataclasses.fields(TaskInput) if field.name not in ("task", "raw")
)


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "index-task",
        "Prepare the splits S of a task; writes P_S_image.*, P_S_text.*, P_S_samples.arrow and P_S.json for each, "
        "and P_labels.json.",
        OUTPUT_PREFIX | TEXT_TOKENIZER,
    )
    parser.add_argument(
        "--task", choices=task_names(), required=True, help="which task the raw data is of"
    )
    parser.add_argument("--raw", required=True, metavar="DIR", help="folder of the raw data")
    parser.add_argument(
        "--splits", nargs="+", default=[], metavar="S", help="splits to prepare (all)"
    )
    add_options(
        parser,
        *("--output", "--text-tokenizer", "--workers", "--resize-short", "--on-error"),
        rejects="samples",
        prefix="P_S",
        tokenizer="needed but for imagenet",
    )
    add_image_rules(parser)
    add_sharding(parser)
    # Options that only some tasks have; None stands for the default of `TaskInput`.
    group = parser.add_argument_group("options of some tasks")
    group.add_argument(
        "--seed", type=int, help="vqa, imagenet: chooses what is held out of training (0)"
    )
    group.add_argument(
        "--num-val-images",
        type=positive_int,
        metavar="N",
        help="vqa: images of val2014 that make the split val; at most half of them (1000)",
    )
    group.add_argument(
        "--min-answer-count",
        type=positive_int,
        metavar="N",
        help="vqa: how often an answer must occur to be a class (9)",
    )
    group.add_argument(
        "--annotations",
        metavar="F",
        help="retrieval: Karpathy's JSON file, or a list of ALBEF or BLIP "
        "with those of its other splits beside it (what there is in --raw)",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="imagenet: make val from this share of each class of train (0)",
    )
    group.add_argument(
        "--val-labels",
        metavar="F",
        help="imagenet: classes of images that lie in val without folders: a class id, or a file name and "
        "a class id, per line, LOC_val_solution.csv, or the development kit's ground truth with its meta.mat",
    )
    group.add_argument("--words", metavar="F", help="imagenet: class ids and their words")
    group.add_argument(
        "--sentence1", metavar="NAME", help="mnli: column of the premise (sentence1 or premise)"
    )
    group.add_argument(
        "--sentence2",
        metavar="NAME",
        help="mnli: column of the hypothesis (sentence2 or hypothesis)",
    )
    group.add_argument(
        "--label", metavar="NAME", help="mnli: column of the class (gold_label or label)"
    )
    group.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="mnli, nlvr2, imagenet: what the class numbers of a table stand for where its schema does "
        "not tell; for mnli also the classes of another task (entailment neutral contradiction)",
    )
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Prepares."""
    parser = build_parser()
    options = parser.parse_args(words)
    spec = find_task(options.task)
    if spec.texts and options.text_tokenizer is None:
        parser.error(f"--task {options.task} needs --text-tokenizer")
    given = {
        name: value for name in READER_OPTIONS if (value := getattr(options, name)) is not None
    }
    for name in given:
        if name not in spec.reader_options:
            parser.error(f"--{name.replace('_', '-')} is no option of --task {options.task}")
    if "class_names" in given:
        given["class_names"] = tuple(given["class_names"])
    source = TaskInput(options.task, options.raw, **given)
    run = run_of(options, "index-task", words, [options.raw])
    store = TaskOptions(
        options.text_tokenizer,
        options.resize_short,
        tuple(options.splits),
        ImageRules(options.exif, options.alpha),
    )
    execute(partial(prepare_task, source, options=store), run, execution_of(options))
