"""Fill a masked word and masked patches of a captioned picture with an exported model, as a PNG.

python tools/fill_masked.py --model runs/quickstart/hf --image-tokenizer corpora/indexed-2000/image_tokenizer \
    --pairs corpora/indexed-2000/pairs_val --number 3 --output runs/quickstart/filled.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.analysis.filling import draw_filled, fill, open_tokenizer, read_pair
from megatron_vlmoe.config.errors import DataError, FillingError


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="export of a pretrained model")
    add("--image-tokenizer", required=True, metavar="DIR", help="that the model was trained with")
    add("--pairs", required=True, metavar="PREFIX", help="indexed dataset of image-text pairs")
    add("--number", type=int, default=0, help="document of it (%(default)s)")
    add("--seed", type=int, default=0, help="of the hidden patches (%(default)s)")
    add("--output", required=True, type=Path, metavar="PNG")
    return parser.parse_args()


def main() -> int:
    """Fills and draws; returns the exit status."""
    arguments = parse_arguments()
    try:
        from transformers import AutoModelForPreTraining, AutoProcessor
    except ImportError:
        print('error: transformers is missing (pip install -e ".[hf]")', file=sys.stderr)
        return 1
    try:
        image, ids = read_pair(arguments.pairs, arguments.number)
        options = {"trust_remote_code": True}
        model = AutoModelForPreTraining.from_pretrained(arguments.model, **options).eval()
        processor = AutoProcessor.from_pretrained(arguments.model, **options)
        tokenizer = open_tokenizer(arguments.image_tokenizer)
        filled = fill(model, processor, tokenizer, image, ids, arguments.seed)
        draw_filled(filled, arguments.output)
    except (FillingError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    guesses = ", ".join(f"{word} {chance:.0%}" for word, chance in filled.guesses)
    print(f"{filled.text}: {guesses} (truth: {filled.truth})")
    print(f"{filled.accuracy:.0%} of {int(filled.hidden.sum())} hidden patches have the right code")
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
