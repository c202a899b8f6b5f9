"""A public checkpoint in, a checkpoint of this project and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import ConfigError, ConvertError, conversion_errors
from megatron_vlmoe.convert.checkpoints import check_output, write_checkpoint
from megatron_vlmoe.convert.public import beit2, beit3, vlmo
from megatron_vlmoe.convert.public.planner import ImportOptions, ImportReport, Planner
from megatron_vlmoe.convert.public.torch_files import (
    PublicState,
    read_deepspeed,
    read_public_file,
    some,
)
from megatron_vlmoe.convert.public.vocabulary import RowMap, fairseq_rows, wordpiece_rows
from megatron_vlmoe.convert.tensors import counted
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file

REPORT_FILE = "import_report.json"
CONFIG_FILE = "config.yaml"
# The table of the source's words, whose rows a vocabulary without a file is compared with.
WORDS = {"vlmo": "text_embeddings.word_embeddings.weight", "beit3": "beit3.text_embed.weight"}


def open_source(options: ImportOptions) -> PublicState:
    """The source: a file, or the folder of a DeepSpeed checkpoint.

    Raises:
        ConvertError: it cannot be read.
    """
    if options.source.is_dir():
        return read_deepspeed(options.source, options.allow_pickle)
    return read_public_file(options.source, options.allow_pickle)


def plan_import(options: ImportOptions, source: PublicState) -> tuple[Planner, str]:
    """What becomes of every tensor, decided by names and shapes, and the source in a few words; values are read later.

    Raises:
        ConvertError: the source is not of that family, or an option does not go with it.
    """
    family = {"vlmo": vlmo, "beit3": beit3, "beit2": beit2}[options.family]
    vocab_size, rows = _vocabulary(options, source)
    try:
        config = family.infer(source, options, vocab_size)
    except ConfigError as error:
        raise ConvertError(f"{source.path}: {error}") from None
    planner = Planner(source, config, options, rows)
    what = family.plan(planner)
    if rows is not None:
        planner.remarks.append(rows.summary())
    return planner, what


def import_public(
    options: ImportOptions,
    output: Path,
    strict: bool = False,
    overwrite: bool = False,
    write: bool = True,
) -> ImportReport:
    """Makes a checkpoint of step 0 without optimizer state, with its configuration, tokenizer and report beside it.

    Args:
        options: of the import.
        output: folder of the checkpoint.
        strict: refuses a source with tensors that the importer does not know.
        overwrite: replaces a checkpoint that is there.
        write: False only reports.

    Raises:
        ConvertError: see `open_source` and `plan_import`; or strict, and a tensor is unknown; or a file cannot be
            written. No half checkpoint is left.
    """
    if write:
        check_output(output, overwrite)
    source = open_source(options)
    planner, what = plan_import(options, source)
    unknown = [left.name for left in planner.left() if not left.known]
    if strict and unknown:
        raise ConvertError(
            f"{source.path}: --strict, and {len(unknown)} tensors are unknown to this importer: {some(unknown, 5)}"
        )
    if write:
        with counted(planner.tensors(), "import") as read:
            write_checkpoint(output, read, planner.config, overwrite=overwrite)
        write_text_atomic(output / CONFIG_FILE, to_yaml(planner.config))
        if options.text_tokenizer is not None:
            keep_file(options.text_tokenizer, output, TOKENIZER_FILE)
    report = planner.report(what)
    if write:
        write_text_atomic(output / REPORT_FILE, report.to_json())
    return report


def _vocabulary(options: ImportOptions, source: PublicState) -> tuple[int, Optional[RowMap]]:
    """Pieces of the new model, 0 without text; rows of the source for them, None where nothing tells which."""
    given = [options.source_vocab, options.source_spm, options.same_vocabulary or None]
    count = sum(choice is not None for choice in given)
    if count > 1:
        raise ConvertError("of --source-vocab, --source-spm and --same-vocabulary only one")
    if options.text_tokenizer is None:
        if count:
            raise ConvertError("a vocabulary of the source is of use only with --text-tokenizer")
        return 0, None
    with conversion_errors():
        tokenizer = TextTokenizer(options.text_tokenizer)
    if not count:
        return tokenizer.size, None
    if options.family not in WORDS:
        raise ConvertError(f"a vocabulary of the source: {options.family} has no text")
    num_rows = source.shape(WORDS[options.family], 2)[0]
    if options.source_vocab is not None:
        rows = wordpiece_rows(tokenizer, options.source_vocab)
    elif options.source_spm is not None:
        rows = fairseq_rows(tokenizer, options.source_spm)
    elif num_rows == tokenizer.size:
        rows = RowMap(tuple(range(num_rows)))
    else:
        raise ConvertError(
            f"--same-vocabulary: {source.path} has {num_rows} rows, {options.text_tokenizer} "
            f"{tokenizer.size} pieces"
        )
    return tokenizer.size, rows
