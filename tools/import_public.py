"""Make a checkpoint from a public one: VLMo, BEiT-3, BEiT (v2), or a VLMo-style model with DeepSpeed-MoE layers.

python tools/import_public.py vlmo --source vlmo_base.pt --output runs/vlmo \
    --text-tokenizer tokenizers/text.model --source-vocab vocab.txt
python tools/import_public.py beit2 --source beitv2_base_patch16_224_pt1k.pth --output runs/beit2 \
    --text-tokenizer tokenizers/text.model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.public.command import import_public
from megatron_vlmoe.convert.public.options import FAMILY_NAMES, ImportOptions
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


def build_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of `ImportOptions`."""
    parser = argparse.ArgumentParser(
        description="Make a checkpoint from a public one; docs/importing.md says what each loses.",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Imports; returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    known = {field.name for field in fields(ImportOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    for name, families in FAMILY_OPTIONS.items():
        if name in given and arguments.family not in families:
            parser.error(f"--{name.replace('_', '-')} is no option of {arguments.family}")
    if arguments.family == "beit3":
        given.setdefault("vl_ffn", "vision")
    give_back_freed_tensors()
    try:
        report = import_public(
            ImportOptions(**given),
            arguments.output,
            strict=arguments.strict,
            overwrite=arguments.overwrite,
            write=not arguments.dry_run,
        )
    except (ConvertError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("\n".join(report.lines()))
    if not arguments.dry_run:
        print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
