"""Show which expert each patch and word goes to: the raw decisions, measures, pictures, and one page to click through.

vlmoe routing --load runs/quickstart --images corpora/sample-2000/coco/val2014 \
    --captions corpora/sample-2000/coco/annotations/captions_val2014.json --output runs/quickstart/routing
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_vlmoe.analysis.routing_inputs import find_sources, printable
from megatron_vlmoe.commands.options import CommandParser, add_image_rules, output_folder
from megatron_vlmoe.config.errors import RoutingError, user_files
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.prepare.tool import count, positive_int
from megatron_vlmoe.runtime.lazy import load


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "routing",
        "Show which expert each patch and word goes to: the raw decisions, load, drops, co-activation and "
        "specialisation, pictures, and one page to click through.",
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="run, checkpoint or Hugging Face folder")
    add("--images", metavar="DIR", help="folder of pictures; without it captions are read alone")
    add(
        "--captions",
        metavar="FILE",
        help="captions of the pictures: COCO or Karpathy JSON, JSON lines, a table, lines of file name, tab and "
        "caption, or plain text with as many lines as there are pictures; a tar or folder that has the pictures in it "
        "too; without it pictures are read alone",
    )
    add(
        "--split",
        nargs="+",
        metavar="S",
        help="splits to take of captions that name theirs (train restval)",
    )
    add(
        "--output",
        required=True,
        type=output_folder,
        metavar="DIR",
        help="folder for what is found",
    )
    add(
        "--num-items",
        type=positive_int,
        default=100,
        metavar="N",
        help="pictures, captions or pairs at most, chosen at random (%(default)s)",
    )
    add("--seed", type=count, default=0, help="of the choice and of permutations (%(default)s)")
    add(
        "--permutations",
        type=count,
        default=200,
        metavar="N",
        help="shuffles of the baseline of specialisation; 0 leaves it out (%(default)s)",
    )
    add(
        "--capacity-factor",
        type=float,
        metavar="X",
        help="capacity of experts; 0 drops no token (as the run evaluates)",
    )
    add(
        "--batch-size",
        type=positive_int,
        default=32,
        metavar="N",
        help="items at a time, among which those with the largest gates are served first (%(default)s)",
    )
    add("--text-tokenizer", metavar="FILE", help="text.model, if not in the run folder")
    add_image_rules(parser)
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Reads, measures and draws."""
    parser = build_parser()
    options = parser.parse_args(words)
    if not options.images and not options.captions:
        parser.error("neither --images nor --captions is given")
    for name in ("images", "captions"):
        if getattr(options, name) == "":
            parser.error(f"--{name} is empty")
    if options.capacity_factor is not None and not math.isfinite(options.capacity_factor):
        parser.error(f"--capacity-factor {options.capacity_factor}: not a finite number")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise RoutingError('transformers is missing (pip install "megatron-vlmoe[hf]")') from None
    splits = tuple(options.split) if options.split else None
    found = find_sources(options.images, options.captions, splits)
    routing = load("megatron_vlmoe.analysis.routing")
    model = routing.open_model(options.load, options.text_tokenizer, options.capacity_factor)
    sources = found.choose(options.num_items, options.seed)
    items, damaged = routing.read_items(sources, model, ImageRules(options.exif, options.alpha))
    found.leave_out(damaged)
    print(f"{options.captions or options.images}: {found.line(len(items))}")
    for reason in damaged:
        print(f"left out: {printable(reason)}")
    inputs, unread = routing.inputs_of(items, model)
    if unread:
        print(f"no router reads {' or '.join(unread)}: {options.load} has no experts for them")
    trace = routing.trace(model, items, inputs, options.batch_size)
    summary = routing.summarize(trace, items, model, options.permutations, options.seed)
    routing.write_trace(options.output, trace, items, summary)
    for line in routing.summary_lines(summary):
        print(line)
    figures = load("megatron_vlmoe.analysis.routing_figures")
    for path in figures.draw_all(summary, trace, items, options.output):
        print(f"wrote {path}")
    page = load("megatron_vlmoe.analysis.routing_page")
    print(f"wrote {page.write_routing_page(summary, trace, items, options.output)}")
