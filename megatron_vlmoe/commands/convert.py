"""Checkpoints to Hugging Face folders and back; needs no GPU, no process group and not the layout of the run.

vlmoe export --load runs/quickstart --output exports/quickstart
vlmoe import --load exports/quickstart --output runs/imported
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import ConfigError, user_files
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.memory import give_back_freed_tensors

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


def build_export_parser() -> CommandParser:
    """The options of `export`."""
    parser = CommandParser("export", "Make a Hugging Face folder of a checkpoint.")
    add = parser.add_argument
    add("--load", required=True, metavar="CKPT", help="run, checkpoint or iteration folder")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as stored; routers are float32)",
    )
    add("--max-shard-gb", type=float, default=5.0, help="size of a file (%(default)s)")
    add("--text-tokenizer", default="", metavar="FILE", help="default: that of the run")
    add("--overwrite", action="store_true", help="replace a folder that is there")
    add("--name", default="", help="of the model, for its card (default: name of DIR)")
    add("--license", default="", help="identifier such as apache-2.0, for the card")
    add("--language", default="en", help="of the texts, for the card (%(default)s)")
    add("--intended-use", default="", help="sentences for the card")
    add("--limitations", default="", help="sentences for the card")
    return parser


def build_import_parser() -> CommandParser:
    """The options of `import`."""
    parser = CommandParser("import", "Make a checkpoint of a Hugging Face folder.")
    add = parser.add_argument
    add("--load", required=True, metavar="HF_DIR", help="of export, or of save_pretrained")
    add("--output", required=True, type=Path, metavar="CKPT", help="checkpoint folder to make")
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    for name in LAYOUT:
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help="noted in the checkpoint's configuration; it loads at any layout",
        )
    return parser


@user_files()
def export_main(words: Sequence[str]) -> None:
    """Exports and says where to."""
    options = build_export_parser().parse_args(words)
    if options.max_shard_gb <= 0:
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb:g}: must be above 0")
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
def import_main(words: Sequence[str]) -> None:
    """Imports and says where to."""
    options = build_import_parser().parse_args(words)
    give_back_freed_tensors()
    layout = {name: size for name in LAYOUT if (size := getattr(options, name)) is not None}
    importing = load("megatron_vlmoe.convert.importing")
    made = importing.import_checkpoint(
        options.load, options.output, layout, overwrite=options.overwrite
    )
    print(f"wrote {made}")
