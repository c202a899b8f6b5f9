"""Train the VQ-KD image tokenizer (BEiT v2); alone or under torchrun.

python tools/train_image_tokenizer.py --images corpora/images --output tokenizers/image \
    --preset tiny --steps 300
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.crops import CropOptions, TokenizerCrops, open_images
from megatron_vlmoe.prepare.tool_options import add_image_rules
from megatron_vlmoe.tokenizers.vqkd.launch import PRESETS, TrainingRequest, train_image_tokenizer


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Train the VQ-KD image tokenizer; writes DIR/config.json, model.safetensors, "
        "metrics.jsonl and training_state.pt. Run again to go on after an interruption.",
        epilog="Published recipe (base): batch 512, learning rate 5e-5 * batch / 128.",
    )
    add = parser.add_argument
    add(
        "--images",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="indexed datasets (PREFIX_image.bin) or folders of images",
    )
    add_image_rules(parser.add_argument_group("images in folders"))
    add("--output", type=Path, required=True, metavar="DIR")
    add("--preset", choices=sorted(PRESETS), default="base")
    add("--image-size", type=int, help="side of the input in pixels")
    add("--patch-size", type=int, help="side of a patch in pixels")
    add("--num-codes", type=int, help="codebook entries")
    add("--code-dim", type=int, help="dimensions of a code")
    add("--restart-threshold", type=float, help="re-seed codes used less than this share; 0: never")
    add("--teacher", default="pixels", help="pixels or hf:DIR, a CLIP or ViT folder in HF format")
    add("--steps", type=int)
    add("--batch-size", type=int, help="images per step over all processes")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup-steps", type=int)
    add("--min-scale", type=float, help="smallest crop as a share of the image's area")
    add("--bf16", action="store_true", help="bf16 autocast")
    add("--deterministic", action="store_true", help="GPU: same seed, same bits; slower")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="decoding processes per rank (%(default)s)")
    add("--log-interval", type=int, default=20)
    add("--save-interval", type=int, default=500)
    return parser.parse_args()


def main() -> int:
    """Trains; returns the exit status."""
    arguments = vars(parse_arguments())
    images, workers = arguments.pop("images"), arguments.pop("workers")
    rules = ImageRules(arguments.pop("exif"), arguments.pop("alpha"))
    try:
        request = TrainingRequest(**arguments)
        crops = CropOptions(
            size=request.build_config().image_size,
            batch_size=request.build_options().batch_size,
            min_scale=request.smallest_crop,
            seed=request.seed,
            workers=workers,
        )
        train_image_tokenizer(request, TokenizerCrops(open_images(images, rules), crops))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
