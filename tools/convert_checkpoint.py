"""Checkpoints to Hugging Face folders and back; needs no GPU, no process group and not the layout of the run.

python tools/convert_checkpoint.py export --load runs/quickstart --output exports/quickstart
python tools/convert_checkpoint.py import --load exports/quickstart --output runs/imported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.exporting import ExportOptions, export_checkpoint
from megatron_vlmoe.convert.importing import import_checkpoint
from megatron_vlmoe.convert.model_card import CardOptions
from megatron_vlmoe.runtime.memory import give_back_freed_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint to Hugging Face folder")
    add = export.add_argument
    add("--load", required=True, metavar="CKPT", help="run, checkpoint or iteration folder")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    add("--dtype", choices=DTYPES, help="of the weights (default: as stored; routers are float32)")
    add("--max-shard-gb", type=float, default=5.0, help="size of a file (%(default)s)")
    add("--text-tokenizer", default="", metavar="MODEL", help="default: that of the run")
    add("--overwrite", action="store_true", help="replace a folder that is there")
    add("--name", default="", help="of the model, for its card (default: name of DIR)")
    add("--license", default="", help="identifier such as apache-2.0, for the card")
    add("--language", default="en", help="of the texts, for the card")
    add("--intended-use", default="", help="sentences for the card")
    add("--limitations", default="", help="sentences for the card")
    back = commands.add_parser("import", help="Hugging Face folder to checkpoint")
    add = back.add_argument
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


def main() -> int:
    """Converts; returns the exit status."""
    arguments = build_parser().parse_args()
    give_back_freed_tensors()
    try:
        if arguments.command == "export":
            made = export_checkpoint(arguments.load, arguments.output, _export_options(arguments))
        else:
            layout = {name: getattr(arguments, name) for name in LAYOUT}
            given = {name: size for name, size in layout.items() if size is not None}
            made = import_checkpoint(
                arguments.load, arguments.output, given, overwrite=arguments.overwrite
            )
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {made}")
    return 0


def _export_options(arguments: argparse.Namespace) -> ExportOptions:
    if arguments.max_shard_gb <= 0:
        raise ConvertError(f"--max-shard-gb {arguments.max_shard_gb:g}: must be above 0")
    return ExportOptions(
        dtype=DTYPES.get(arguments.dtype),
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        text_tokenizer=arguments.text_tokenizer,
        overwrite=arguments.overwrite,
        card=CardOptions(
            name=arguments.name or arguments.output.resolve().name,
            license=arguments.license,
            language=arguments.language,
            intended_use=arguments.intended_use,
            limitations=arguments.limitations,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
