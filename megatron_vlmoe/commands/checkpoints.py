"""The commands of checkpoints, none of which needs a GPU, a process group or the layout of the run."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser, output_file
from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import ConfigError, UserError, user_files
from megatron_vlmoe.convert.public import FAMILY_NAMES
from megatron_vlmoe.convert.upcycle.plan import UpcycleOptions, sparse_config
from megatron_vlmoe.prepare.tool import count, positive_int
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.memory import give_back_freed_tensors

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
# Options of `import-public` that only some families have.
FAMILY_OPTIONS = {
    "source_vocab": ("vlmo",),
    "source_spm": ("beit3",),
    "same_vocabulary": ("vlmo", "beit3"),
    "attention": ("beit3",),
    "text_ffn": ("beit2",),
    "source_pixels": ("beit2",),
    "topk": ("vlmo",),
}
# As diff and grep: 1 says that something was found, 2 that there was no looking.
FOUND, TROUBLE = 1, 2
PATH_HELP = "run, checkpoint or iteration folder of any layout, or Hugging Face folder"


@user_files()
def export(words: Sequence[str]) -> None:
    """`vlmoe export --load runs/quickstart --output exports/quickstart`."""
    parser = CommandParser("export", "Make a Hugging Face folder of a checkpoint.")
    add = parser.add_argument
    add("--load", required=True, metavar="CKPT", help="run, checkpoint or iteration folder")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as stored; routers are float32)",
    )
    add(
        "--max-shard-gb", type=float, default=5.0, help="largest size of a file in GB (%(default)s)"
    )
    add("--text-tokenizer", default="", metavar="FILE", help="default: that of the run")
    add("--overwrite", action="store_true", help="replace an exported model that is there")
    add("--name", default="", help="of the model, for its card (default: name of DIR)")
    add("--license", default="", help="identifier such as apache-2.0, for the card")
    add("--language", default="en", help="of the texts, for the card (%(default)s)")
    add("--intended-use", default="", help="sentences for the card")
    add("--limitations", default="", help="sentences for the card")
    options = parser.parse_args(words)
    if not 0 < options.max_shard_gb < math.inf:
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb:g}: must be above 0 and finite")
    give_back_freed_tensors()
    exporting = load("megatron_vlmoe.convert.exporting")
    card = exporting.CardOptions(
        name=options.name or options.output.resolve().name,
        license=options.license,
        language=options.language,
        intended_use=options.intended_use,
        limitations=options.limitations,
    )
    made = exporting.export_checkpoint(
        options.load,
        options.output,
        dtype=exporting.DTYPES[options.dtype] if options.dtype else None,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        text_tokenizer=options.text_tokenizer,
        overwrite=options.overwrite,
        card=card,
    )
    print(f"wrote {made}")


@user_files()
def import_exported(words: Sequence[str]) -> None:
    """`vlmoe import --load exports/quickstart --output runs/imported`."""
    parser = CommandParser("import", "Make a checkpoint of a Hugging Face folder.")
    add = parser.add_argument
    add("--load", required=True, metavar="HF_DIR", help="of export, or of save_pretrained")
    add("--output", required=True, type=Path, metavar="CKPT", help="checkpoint folder to make")
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    for name in LAYOUT:
        add(
            f"--{name.replace('_', '-')}",
            type=positive_int,
            metavar="N",
            help="noted in the checkpoint's configuration; it loads at any layout",
        )
    options = parser.parse_args(words)
    give_back_freed_tensors()
    layout = {name: size for name in LAYOUT if (size := getattr(options, name)) is not None}
    importing = load("megatron_vlmoe.convert.importing")
    made = importing.import_checkpoint(
        options.load, options.output, layout, overwrite=options.overwrite
    )
    print(f"wrote {made}")


@user_files()
def import_public(words: Sequence[str]) -> None:
    """`vlmoe import-public vlmo --source vlmo_base.pt --output runs/vlmo`; reports what came of each tensor.

    The defaults of what is not given are those of `ImportOptions`.
    """
    parser = CommandParser(
        "import-public",
        "Make a checkpoint from a public one; docs/importing.md says what each loses.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    about = f"whose layout the source has: {', '.join(FAMILY_NAMES)}"
    add("family", metavar="FAMILY", choices=FAMILY_NAMES, help=about)
    add("--source", type=Path, required=True, metavar="F", help="file, or DeepSpeed folder (vlmo)")
    add("--output", type=Path, required=True, metavar="DIR", help="checkpoint folder to make")
    add("--text-tokenizer", type=Path, metavar="M", help="our SentencePiece model; none: no text")
    add("--source-vocab", type=Path, metavar="F", help="vlmo: the source's WordPiece vocab.txt")
    add("--source-spm", type=Path, metavar="F", help="beit3: the source's SentencePiece model")
    add("--same-vocabulary", action="store_true", help="row i of the source is our piece i")
    add("--image-size", type=int, metavar="N", help="of the new model (the source's, else 224)")
    add("--text-length", type=int, metavar="N", help="of the new model (128)")
    add("--pair-text-length", type=int, metavar="N", help="of the new model (128)")
    add("--visual-vocab-size", type=int, metavar="N", help="(what the source tells, else 8192)")
    add("--num-attention-heads", type=int, metavar="N", help="(what the source tells, else D / 64)")
    add = parser.add_argument_group("what the source lacks or has twice").add_argument
    add("--num-vl-layers", type=int, metavar="F", help="VL blocks if the source has none (3)")
    add("--attention", choices=["vision", "text", "mean"], help="beit3: which one (vision)")
    add("--text-ffn", choices=["vision", "fresh"], help="beit2: where the T-FFN is from (fresh)")
    add(
        "--vl-ffn",
        choices=["vision", "text", "fresh"],
        help="where the VL-FFN is from if the source has none (fresh; beit3: vision)",
    )
    add(
        "--source-pixels",
        choices=["imagenet", "half"],
        help="beit2: pixel mean and deviation of its training; half is 0.5 (imagenet)",
    )
    add("--topk", type=int, metavar="K", help="experts per token of a source with experts (1)")
    add("--seed", type=int, help="of initial values (1234)")
    add = parser.add_argument_group("how").add_argument
    add("--dry-run", action="store_true", default=False, help="report only, write nothing")
    add(
        "--strict",
        action="store_true",
        default=False,
        help="fail if the source has a tensor that this importer does not know",
    )
    add("--overwrite", action="store_true", default=False, help="replace a checkpoint")
    add(
        "--allow-pickle",
        action="store_true",
        help="last resort for files that cannot be read safely: runs whatever code the file names",
    )
    values = vars(parser.parse_args(words))
    for name, families in FAMILY_OPTIONS.items():
        if name in values and values["family"] not in families:
            parser.error(f"--{name.replace('_', '-')} is no option of {values['family']}")
    output, dry_run = values.pop("output"), values.pop("dry_run")
    how = {name: values.pop(name) for name in ("strict", "overwrite")}
    if values["family"] == "beit3":
        values.setdefault("vl_ffn", "vision")
    give_back_freed_tensors()
    importer = load("megatron_vlmoe.convert.public.command")
    options = importer.ImportOptions(**values)
    report = importer.import_public(options, output, write=not dry_run, **how)
    print("\n".join(report.lines()))
    if not dry_run:
        print(f"wrote {output}")


@user_files()
def upcycle(words: Sequence[str]) -> None:
    """Prints what was done. Options of `moe` are left to the training's own parser.

    vlmoe upcycle --load runs/base-dense --preset base-32e --output runs/base-32e-start
    vlmoe upcycle --load runs/base-dense --num-experts 8 --moe.topk 2 --output runs/base-8e-top2
    vlmoe upcycle --load runs/base-8e --num-experts 16 --output runs/base-16e-start
    """
    parser = CommandParser(
        "upcycle",
        "Make a sparse checkpoint of a dense one: every expert a copy of the FFN of its modality; or E experts to 2E.",
        epilog="Any --moe.OPTION VALUE of pretraining may follow. Which defaults and why: docs/upcycling.md.",
    )
    add = parser.add_argument
    add("--load", required=True, metavar="CKPT", help="run, checkpoint or iteration folder")
    add("--output", required=True, type=Path, metavar="CKPT", help="checkpoint folder to make")
    add("--preset", metavar="NAME", help="whose MoE section is taken, such as base-32e")
    add("--num-experts", type=int, default=0, metavar="N", help="experts of every pool")
    add(
        "--router",
        choices=("auto", "small", "fresh", "zero"),
        default="auto",
        help="how new routers start (auto: fresh with moe.normalize_gate, else small)",
    )
    add(
        "--shared-from",
        choices=("vision", "text", "mean"),
        default="vision",
        help="FFN that a shared pool starts from; the function changes with each (%(default)s)",
    )
    add(
        "--noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="of noise, relative to each matrix's own (%(default)s)",
    )
    add(
        "--drop-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of inner channels drawn anew (%(default)s)",
    )
    add("--seed", type=int, default=1234, help="of routers, noise and channels (%(default)s)")
    add(
        "--optimizer",
        choices=("reset", "carry"),
        default="reset",
        help="carry takes moments, schedule and step along (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    arguments, others = parser.parse_passing_on(words)
    give_back_freed_tensors()
    options = UpcycleOptions(
        router=arguments.router,
        shared_from=arguments.shared_from,
        noise=arguments.noise,
        drop_fraction=arguments.drop_fraction,
        seed=arguments.seed,
        carry_optimizer=arguments.optimizer == "carry",
    )
    run = load("megatron_vlmoe.convert.upcycle.run")
    reader = run.read_source(arguments.load)
    config = sparse_config(
        reader.config, str(reader.path), arguments.preset or "", arguments.num_experts, others
    )
    made = run.upcycle_checkpoint(reader, config, arguments.output, options, arguments.overwrite)
    print("\n".join(run.report_lines(made, options)))


def inspect(words: Sequence[str]) -> int:
    """`vlmoe inspect-checkpoint runs/quickstart`; returns the exit status."""
    parser = CommandParser(
        "inspect-checkpoint",
        "Print what a checkpoint holds; exit status 1 if a tensor is missing, unexpected or not finite.",
        epilog="`vlmoe compare-checkpoints A B` (`diff A B` behind the name of the script) shows how two differ.",
    )
    parser.add_argument("path", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--config", action="store_true", help="print the whole configuration too")
    _add_json(parser)
    options = parser.parse_args(words)
    with _trouble():
        report = load("megatron_vlmoe.convert.inspect")
        inspection = report.inspect_checkpoint(options.path)
        lines = report.inspection_lines(inspection)
        if options.config:
            lines += ["", *to_yaml(inspection.source.config).rstrip().split("\n")]
        _output(lines, report.inspection_json(inspection), options.json)
    return FOUND if inspection.problems else 0


def compare(words: Sequence[str]) -> int:
    """`vlmoe compare-checkpoints runs/quickstart exports/quickstart`; returns the exit status."""
    parser = CommandParser(
        "compare-checkpoints",
        "Compare two checkpoints; exit status 0 if all tensors are equal, 1 if not.",
    )
    parser.add_argument("left", metavar="A", help=PATH_HELP)
    parser.add_argument("right", metavar="B", help="likewise")
    parser.add_argument(
        "--top",
        type=count,
        default=20,
        metavar="N",
        help="lines of a list; 0 is all (%(default)s)",
    )
    parser.add_argument("--optimizer", action="store_true", help="compare optimizer states too")
    _add_json(parser)
    options = parser.parse_args(words)
    with _trouble():
        report = load("megatron_vlmoe.convert.compare")
        comparison = report.compare_checkpoints(options.left, options.right, options.optimizer)
        lines = report.comparison_lines(comparison, options.top)
        _output(lines, report.comparison_json(comparison), options.json)
    return 0 if comparison.equal else FOUND


def _add_json(parser: CommandParser) -> None:
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write everything as JSON; - prints it instead of the text",
    )


@contextlib.contextmanager
def _trouble() -> Iterator[None]:
    """Gives errors the status of trouble."""
    try:
        with user_files():
            yield
    except UserError as error:
        error.exit_status = TROUBLE
        raise


def _output(lines: Sequence[str], content: str, json_file: Path | None) -> None:
    on_stdout = json_file == Path("-")
    if json_file and not on_stdout:
        write_text_atomic(json_file, content)
    # Where the reader went away (`... | head`), the exit status still tells what was found.
    with contextlib.suppress(BrokenPipeError):
        print(content.rstrip() if on_stdout else "\n".join(lines), flush=True)
