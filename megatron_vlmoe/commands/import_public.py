"""Make a checkpoint from a public one: VLMo, BEiT-3, BEiT (v2), or a VLMo-style model with DeepSpeed-MoE layers.

vlmoe import-public vlmo --source vlmo_base.pt --output runs/vlmo \
    --text-tokenizer tokenizers/text.model --source-vocab vocab.txt
vlmoe import-public beit2 --source beitv2_base_patch16_224_pt1k.pth --output runs/beit2 \
    --text-tokenizer tokenizers/text.model
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.convert.public import FAMILY_NAMES
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.memory import give_back_freed_tensors

# Options that only some families have.
FAMILY_OPTIONS = {
    "source_vocab": ("vlmo",),
    "source_spm": ("beit3",),
    "same_vocabulary": ("vlmo", "beit3"),
    "attention": ("beit3",),
    "text_ffn": ("beit2",),
    "source_pixels": ("beit2",),
    "topk": ("vlmo",),
}


def build_parser() -> CommandParser:
    """The options; their defaults are those of `ImportOptions`."""
    parser = CommandParser(
        "import-public",
        "Make a checkpoint from a public one; docs/importing.md says what each loses.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("family", choices=FAMILY_NAMES, help="whose layout the source has")
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
    group = parser.add_argument_group("what the source lacks or has twice")
    add = group.add_argument
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
    group = parser.add_argument_group("how")
    add = group.add_argument
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
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Imports and reports what came of each tensor."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    values = vars(arguments)
    for name, families in FAMILY_OPTIONS.items():
        if name in values and arguments.family not in families:
            parser.error(f"--{name.replace('_', '-')} is no option of {arguments.family}")
    output, dry_run, strict, overwrite = (
        values.pop(name) for name in ("output", "dry_run", "strict", "overwrite")
    )
    if arguments.family == "beit3":
        values.setdefault("vl_ffn", "vision")
    give_back_freed_tensors()
    importer = load("megatron_vlmoe.convert.public.command")
    report = importer.import_public(
        importer.ImportOptions(**values),
        output,
        strict=strict,
        overwrite=overwrite,
        write=not dry_run,
    )
    print("\n".join(report.lines()))
    if not dry_run:
        print(f"wrote {output}")
