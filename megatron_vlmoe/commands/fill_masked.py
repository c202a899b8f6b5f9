"""Fill a masked word and masked patches of captioned pictures with an exported model, as a PNG.

vlmoe fill-masked --model runs/quickstart/hf --image-tokenizer corpora/indexed-2000/image_tokenizer \
    --pairs corpora/indexed-2000/pairs_val --output runs/quickstart/filled.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_vlmoe.analysis.plots import picture_file
from megatron_vlmoe.commands.options import CommandParser, dataset_prefix, output_file
from megatron_vlmoe.config.errors import FillingError, user_files
from megatron_vlmoe.convert.hf_config import SPM_FILE, architecture, import_config, read_config
from megatron_vlmoe.data.manifest import check_dataset
from megatron_vlmoe.prepare.tool import count
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.tokenizers.text import TextTokenizer


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "fill-masked",
        "Fill a masked word and masked patches of captioned pictures with an exported model, as a PNG.",
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="HF_DIR", help="export of a pretrained model")
    add(
        "--image-tokenizer",
        required=True,
        metavar="DIR",
        help="that the model was trained with; a code is drawn as the mean of the dataset's patches that have it",
    )
    add(
        "--pairs",
        type=dataset_prefix,
        required=True,
        metavar="PREFIX",
        help="indexed dataset of image-text pairs",
    )
    add("--number", type=int, nargs="+", metavar="N", help="documents of it (three at random)")
    add("--seed", type=count, default=0, help="of pictures and hidden patches (%(default)s)")
    add(
        "--words",
        type=count,
        default=200,
        metavar="N",
        help="captions of which half is hidden, to count by class of word what comes back with their picture and with"
        " another one (%(default)s; 0: none)",
    )
    add("--output", required=True, type=output_file, metavar="PNG", help="picture to draw")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Fills and draws."""
    arguments = build_parser().parse_args(words)
    picture_file(arguments.output)
    # Of a folder that is not there, transformers would ask the Hub.
    config = read_config(arguments.model)
    kinds = config.get("architectures")
    if kinds != [architecture()]:
        raise FillingError(f"{arguments.model}: is {kinds}, not the export of a pretrained model")
    text = TextTokenizer(arguments.model / SPM_FILE)
    check_dataset(arguments.pairs, "pairs", text.fingerprint)
    # transformers would take what is damaged as it is, or end with a traceback.
    import_config(arguments.model, config)
    load("megatron_vlmoe.convert.tensors").SafetensorsFolder(arguments.model).verify_checksums()
    try:
        from transformers import AutoModelForPreTraining, AutoProcessor
    except ImportError:
        raise FillingError('transformers is missing (pip install "megatron-vlmoe[hf]")') from None
    filling = load("megatron_vlmoe.analysis.filling")
    numbers = arguments.number or filling.choose_documents(arguments.pairs, 3, arguments.seed)
    options = {"trust_remote_code": True}
    model = AutoModelForPreTraining.from_pretrained(arguments.model, **options).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **options)
    tokenizer = filling.ImageTokenizer.from_pretrained(arguments.image_tokenizer)
    looks = filling.looks_of_codes(tokenizer, arguments.pairs, numbers)
    filled = []
    for number in numbers:
        image, ids = filling.read_pair(arguments.pairs, number)
        rng = np.random.default_rng((arguments.seed, number))
        one = filling.fill(model, processor, tokenizer, looks, image, ids, rng)
        filled.append(one)
        guesses = ", ".join(f"{word} {chance:.0%}" for word, chance in one.guesses)
        print(f"{number}: {one.text}: {guesses} (truth: {one.truth}); {one.counts()}")
    for words_of_class in filling.read_hidden_words(
        model, processor, arguments.pairs, arguments.words, arguments.seed
    ):
        print(words_of_class.line())
    print(f"wrote {filling.draw_filled(filled, arguments.output)}")
