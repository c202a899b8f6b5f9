"""The commands of tokenizers: training both, and storing the codes of a dataset's images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import (
    OUTPUT_PREFIX,
    CommandParser,
    add_image_rules,
    add_options,
    add_sharding,
    dataset_prefix,
    execution_of,
    output_prefix,
)
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.data.codes import codes_prefix, load_codes_manifest
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.executors import execute
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.text import read_training_texts
from megatron_vlmoe.prepare.remote import check_local
from megatron_vlmoe.prepare.tool import RejectLog, Run
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer
from megatron_vlmoe.tokenizers.vqkd.config import PRESET_NAMES


@user_files()
def train_text(words: Sequence[str]) -> None:
    """`vlmoe train-text-tokenizer --input text.jsonl captions.json --vocab-size 64000 --output tokenizers/text`."""
    defaults = TextTokenizerTraining
    parser = CommandParser(
        "train-text-tokenizer",
        "Train the SentencePiece (unigram) text tokenizer; writes P.model and P.vocab.",
        OUTPUT_PREFIX,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text as index-text reads it, or captions (docs/data.md)",
    )
    add("--text-key", metavar="K", help="JSON key or column (text, caption or captions)")
    add("--vocab-size", type=int, required=True, help="pieces, special ones included")
    add(
        "--output",
        type=output_prefix,
        required=True,
        metavar="P",
        help="path of the files without suffix",
    )
    add(
        "--character-coverage",
        type=float,
        default=defaults.character_coverage,
        help="share of all characters that get a piece of their own (%(default)s)",
    )
    add("--byte-fallback", action="store_true", help="spell unknown characters as UTF-8 bytes")
    add(
        "--max-sentences",
        type=int,
        default=defaults.max_sentences,
        help="train on a uniform sample of so many lines; bounds the memory (%(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, help="seed of that sample (%(default)s)")
    add(
        "--num-threads",
        type=int,
        default=defaults.num_threads,
        help="another number gives a slightly different model (%(default)s)",
    )
    add_options(parser, "--on-error", rejects="records")
    values = vars(parser.parse_args(words))
    inputs, key, on_error = (values.pop(name) for name in ("input", "text_key", "on_error"))
    training = TextTokenizerTraining(output_prefix=Path(values.pop("output")), **values)
    training.validate()
    training.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    rejects = RejectLog(str(training.output_prefix), on_error)

    def texts() -> Iterator[str]:
        for item in read_training_texts(inputs, key):
            if isinstance(item, Reject):
                rejects.add([item])
            else:
                yield item

    try:
        size = train_text_tokenizer(training, texts())
        rejects.finish()
        rejects.publish()
    finally:
        rejects.abort()
    if size < training.vocab_size:
        print(
            f"warning: the corpus fills only {size} of the {training.vocab_size} pieces asked for; "
            f"the vocabulary has {size}",
            file=sys.stderr,
        )
    if rejects.count:
        print(f"{rejects.count} records left out; the first: {rejects.first}", file=sys.stderr)
    print(
        f"wrote {training.output_prefix}.model ({size} pieces) and {training.output_prefix}.vocab"
    )


@user_files()
def train_image(words: Sequence[str]) -> None:
    """Trains VQ-KD (BEiT v2), alone or under torchrun; what is not given is the preset's.

    vlmoe train-image-tokenizer --images corpora/images --output tokenizers/image --preset tiny --steps 300
    """
    parser = CommandParser(
        "train-image-tokenizer",
        "Train the VQ-KD image tokenizer; writes DIR/config.json, model.safetensors, metrics.jsonl and "
        "training_state.pt. Run again to go on after an interruption.",
        epilog="What is not given is as the preset has it. Published recipe (base): batch 512, learning rate "
        "5e-5 * batch / 128.",
    )
    add = parser.add_argument
    add(
        "--images",
        type=dataset_prefix,
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
    add(
        "--unquantized-steps",
        type=int,
        help="steps before the codes are placed; the decoder then gets the encoder's own vectors",
    )
    add("--min-scale", type=float, help="smallest crop as a share of the image's area")
    add("--bf16", action="store_true", help="bf16 autocast")
    add("--deterministic", action="store_true", help="GPU: same seed, same bits; slower")
    add("--seed", type=int, default=0, help="of weights, order and crops (%(default)s)")
    add("--workers", type=int, default=0, help="decoding processes per rank (%(default)s)")
    add("--log-interval", type=int, default=20, help="steps between log lines (%(default)s)")
    add("--save-interval", type=int, default=500, help="steps between saves (%(default)s)")
    values = vars(parser.parse_args(words))
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


@user_files()
def encode_images(words: Sequence[str]) -> None:
    """Makes PREFIX_codes of PREFIX_image.

    vlmoe encode-images --images corpora/images --image-tokenizer tokenizers/image --views 4
    """
    parser = CommandParser(
        "encode-images",
        "Encode random crops of every image with the image tokenizer. Training draws among the stored views and "
        "applies exactly their geometry. A corrupt image ends it, named: codes belong to images by number.",
        {"--tokenizer": "--image-tokenizer"},
    )
    add = parser.add_argument
    add(
        "--images",
        type=dataset_prefix,
        required=True,
        metavar="PREFIX",
        help="dataset with PREFIX_image.bin",
    )
    add(
        "--image-tokenizer",
        required=True,
        metavar="DIR",
        help="folder of train-image-tokenizer, or a published BEiT v2 .pth file",
    )
    add("--views", type=int, default=1, help="views of every image (%(default)s)")
    add("--seed", type=int, default=0, help="of the crops (%(default)s)")
    add(
        "--output",
        type=output_prefix,
        metavar="PREFIX",
        help="writes PREFIX_codes.* (default: that of --images)",
    )
    add(
        "--min-scale",
        type=float,
        default=0.2,
        help="smallest crop as a share of the area (%(default)s)",
    )
    add(
        "--flip-probability",
        type=float,
        default=0.5,
        help="share of mirrored views (%(default)s)",
    )
    add("--batch-size", type=int, default=64, help="views encoded at once (%(default)s)")
    add("--workers", type=int, default=0, help="decoding processes (%(default)s)")
    add("--bf16", action="store_true", help="encoder under bf16 autocast")
    add_sharding(parser)
    arguments = parser.parse_args(words)
    output = arguments.output or arguments.images
    check_local("--images", arguments.images)
    check_local("--output of codes", output)
    codes = load("megatron_vlmoe.prepare.codes")
    options = codes.CodesOptions(
        num_views=arguments.views,
        seed=arguments.seed,
        min_scale=arguments.min_scale,
        flip_probability=arguments.flip_probability,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    job = codes.EncodeImages(arguments.images, arguments.image_tokenizer, arguments.bf16, options)
    run = Run(output, arguments.workers, "stop", {}, arguments.shard)
    execute(job, run, execution_of(arguments, on_gpus=True), codes_prefix(output))
    prefix = codes_prefix(output)
    path = prefix if run.shard is None else run.shard.of(prefix)
    manifest = load_codes_manifest(path)
    print(
        f"wrote {path}: {manifest.num_views} views "
        f"of {manifest.num_images} images, {manifest.grid}x{manifest.grid} codes each"
    )
