"""Fill a masked word and masked patches of a captioned picture with an exported model, as a PNG.

vlmoe fill-masked --model runs/quickstart/hf --image-tokenizer corpora/indexed-2000/image_tokenizer \
    --pairs corpora/indexed-2000/pairs_val --number 3 --output runs/quickstart/filled.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.analysis.plots import picture_file
from megatron_vlmoe.commands.options import CommandParser, dataset_prefix, output_file
from megatron_vlmoe.config.errors import FillingError, user_files
from megatron_vlmoe.convert.hf_config import architecture, read_config
from megatron_vlmoe.prepare.tool import count
from megatron_vlmoe.runtime.lazy import load


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "fill-masked",
        "Fill a masked word and masked patches of a captioned picture with an exported model, as a PNG.",
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="HF_DIR", help="export of a pretrained model")
    add("--image-tokenizer", required=True, metavar="DIR", help="that the model was trained with")
    add(
        "--pairs",
        type=dataset_prefix,
        required=True,
        metavar="PREFIX",
        help="indexed dataset of image-text pairs",
    )
    add("--number", type=int, default=0, help="document of it (%(default)s)")
    add("--seed", type=count, default=0, help="of the hidden patches (%(default)s)")
    add("--output", required=True, type=output_file, metavar="PNG", help="picture to draw")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Fills and draws."""
    arguments = build_parser().parse_args(words)
    picture_file(arguments.output)
    # Of a folder that is not there, transformers would ask the Hub.
    kinds = read_config(arguments.model).get("architectures")
    if kinds != [architecture()]:
        raise FillingError(f"{arguments.model}: is {kinds}, not the export of a pretrained model")
    try:
        from transformers import AutoModelForPreTraining, AutoProcessor
    except ImportError:
        raise FillingError('transformers is missing (pip install "megatron-vlmoe[hf]")') from None
    filling = load("megatron_vlmoe.analysis.filling")
    image, ids = filling.read_pair(arguments.pairs, arguments.number)
    options = {"trust_remote_code": True}
    model = AutoModelForPreTraining.from_pretrained(arguments.model, **options).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **options)
    tokenizer = filling.open_tokenizer(arguments.image_tokenizer)
    filled = filling.fill(model, processor, tokenizer, image, ids, arguments.seed)
    drawn = filling.draw_filled(filled, arguments.output)
    guesses = ", ".join(f"{word} {chance:.0%}" for word, chance in filled.guesses)
    print(f"{filled.text}: {guesses} (truth: {filled.truth})")
    print(f"{filled.accuracy:.0%} of {int(filled.hidden.sum())} hidden patches have the right code")
    print(f"wrote {drawn}")
