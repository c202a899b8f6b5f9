"""A public checkpoint in, a checkpoint of this project and a report out."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import ConfigError, ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.checkpoint_writer import check_output, write_checkpoint
from megatron_vlmoe.convert.parameters import extra_state_keys
from megatron_vlmoe.convert.public import beit2, beit3, vlmo
from megatron_vlmoe.convert.public.deepspeed_reader import read_deepspeed
from megatron_vlmoe.convert.public.options import ImportOptions, Vocabulary
from megatron_vlmoe.convert.public.recipes import Planner
from megatron_vlmoe.convert.public.report import ImportReport
from megatron_vlmoe.convert.public.torch_files import PublicState, read_public_file
from megatron_vlmoe.convert.public.vocabulary import (
    RowMap,
    fairseq_rows,
    same_rows,
    wordpiece_rows,
)
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
    """What becomes of every tensor, decided by names and shapes; values are read later.

    Args:
        options: of the import.
        source: its tensors.

    Returns:
        The plan, and the source in a few words.

    Raises:
        ConvertError: the source is not of that family, or an option does not go with it.
    """
    family = _family(options)
    vocabulary = _vocabulary(options, source)
    try:
        config: RunConfig = family.infer(source, options, vocabulary)
    except ConfigError as error:
        raise ConvertError(f"{source.path}: {error}") from None
    planner = Planner(source, config)
    family.plan(planner, options, vocabulary)
    if vocabulary.rows is not None:
        planner.remarks.append(vocabulary.rows.summary())
    return planner, family.describe(config)


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
        write: false only reports.

    Raises:
        ConvertError: see `open_source` and `plan_import`; or strict, and a tensor is unknown; or a file cannot be
            written. No half checkpoint is left.
    """
    if write:
        check_output(output, overwrite)
    source = open_source(options)
    planner, what = plan_import(options, source)
    if strict:
        _check_known(planner)
    if write:
        _write(planner, output, options, overwrite)
    report = planner.report(what)
    if write:
        write_text_atomic(output / REPORT_FILE, report.to_json())
    return report


def _family(options: ImportOptions) -> ModuleType:
    return {"vlmo": vlmo, "beit3": beit3, "beit2": beit2}[options.family]


def _check_known(planner: Planner) -> None:
    unknown = [left.name for left in planner.left() if not left.known]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ConvertError(
            f"{planner.source.path}: --strict, and {len(unknown)} tensors are unknown to this importer: "
            f"{', '.join(unknown[:5])}{more}"
        )


def _vocabulary(options: ImportOptions, source: PublicState) -> Vocabulary:
    given = [options.source_vocab, options.source_spm, options.same_vocabulary or None]
    if sum(choice is not None for choice in given) > 1:
        raise ConvertError("of --source-vocab, --source-spm and --same-vocabulary only one")
    if options.text_tokenizer is None:
        if any(choice is not None for choice in given):
            raise ConvertError("a vocabulary of the source is of use only with --text-tokenizer")
        return Vocabulary()
    try:
        tokenizer = TextTokenizer(options.text_tokenizer)
    except ValueError as error:
        raise ConvertError(str(error)) from None
    return Vocabulary(tokenizer.size, _rows(options, source, tokenizer))


def _rows(options: ImportOptions, source: PublicState, tokenizer: TextTokenizer) -> RowMap | None:
    if not (options.source_vocab or options.source_spm or options.same_vocabulary):
        return None
    if options.family not in WORDS:
        raise ConvertError(f"a vocabulary of the source: {options.family} has no text")
    rows = source.shape(WORDS[options.family], 2)[0]
    if options.source_vocab is not None:
        return wordpiece_rows(tokenizer, options.source_vocab)
    if options.source_spm is not None:
        return fairseq_rows(tokenizer, options.source_spm)
    if rows != tokenizer.size:
        raise ConvertError(
            f"--same-vocabulary: {source.path} has {rows} rows, {options.text_tokenizer} {tokenizer.size} pieces"
        )
    return same_rows(rows)


def _write(planner: Planner, output: Path, options: ImportOptions, overwrite: bool) -> None:
    tensors = planner.tensors()
    config = planner.config
    with counted(tensors, "import") as read:
        write_checkpoint(output, read, extra_state_keys(config), config, overwrite=overwrite)
    write_text_atomic(output / CONFIG_FILE, to_yaml(config))
    if options.text_tokenizer is not None:
        keep_file(options.text_tokenizer, output, TOKENIZER_FILE)
