"""Train the VQ-KD image tokenizer (BEiT v2); alone or under torchrun.

vlmoe train-image-tokenizer --images corpora/images --output tokenizers/image --preset tiny --steps 300
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser, add_image_rules
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.tokenizers.vqkd.config import PRESET_NAMES


def build_parser() -> CommandParser:
    """The options; those that are not given are the preset's."""
    parser = CommandParser(
        "train-image-tokenizer",
        "Train the VQ-KD image tokenizer; writes DIR/config.json, model.safetensors, metrics.jsonl and "
        "training_state.pt. Run again to go on after an interruption.",
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
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make or go on with")
    add("--preset", choices=PRESET_NAMES, default="base", help="sizes and recipe (%(default)s)")
    add("--image-size", type=int, help="side of the input in pixels")
    add("--patch-size", type=int, help="side of a patch in pixels")
    add("--num-codes", type=int, help="codebook entries")
    add("--code-dim", type=int, help="dimensions of a code")
    add("--restart-threshold", type=float, help="re-seed codes used less than this share; 0: never")
    add("--teacher", default="pixels", help="pixels or hf:DIR, a CLIP or ViT folder in HF format")
    add("--steps", type=int, help="training steps")
    add("--batch-size", type=int, help="images per step over all processes")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup-steps", type=int, help="steps over which the learning rate rises")
    add("--min-scale", type=float, help="smallest crop as a share of the image's area")
    add("--bf16", action="store_true", help="bf16 autocast")
    add("--deterministic", action="store_true", help="GPU: same seed, same bits; slower")
    add("--seed", type=int, default=0, help="of weights, order and crops (%(default)s)")
    add("--workers", type=int, default=0, help="decoding processes per rank (%(default)s)")
    add("--log-interval", type=int, default=20, help="steps between log lines (%(default)s)")
    add("--save-interval", type=int, default=500, help="steps between saves (%(default)s)")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Trains."""
    values = vars(build_parser().parse_args(words))
    images, workers = values.pop("images"), values.pop("workers")
    rules = ImageRules(values.pop("exif"), values.pop("alpha"))
    launch, crops = (
        load("megatron_vlmoe.tokenizers.vqkd.training"),
        load("megatron_vlmoe.prepare.codes"),
    )
    request = launch.TrainingRequest(**values)
    options = crops.CropOptions(
        size=request.build_config().image_size,
        batch_size=request.build_options().batch_size,
        min_scale=request.smallest_crop,
        seed=request.seed,
        workers=workers,
    )
    source = crops.open_images(images, rules)
    launch.train_image_tokenizer(request, crops.TokenizerCrops(source, options))
