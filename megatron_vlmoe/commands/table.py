"""Every command: the row that finds it, and the line that `vlmoe --help` prints of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        group: heading in the list of commands.
        main: `module:function` in this package; takes the words after the command's name and returns an exit status or
            None.
        summary: one line of help.
        cleans_up: see `run_command`.
        on_ranks: whether the processes of a launcher work together on it; of others, each is a run of its own.
    """

    group: str
    main: str
    summary: str
    cleans_up: bool = True
    on_ranks: bool = False


_train = functools.partial(Command, "Train and use a model")
_ranks = functools.partial(_train, cleans_up=False, on_ranks=True)
_data = functools.partial(Command, "Prepare data")
_tokens = functools.partial(Command, "Tokenizers")
_checkpoints = functools.partial(Command, "Checkpoints")
_show = functools.partial(Command, "Measure and show")

COMMANDS = {
    "pretrain": _ranks("pretrain:main", "train a VL-MoE from indexed datasets"),
    "pretrain-random": _ranks("pretrain:random_main", "the same on random numbers, without files"),
    "finetune": _ranks("finetune:main", "train a checkpoint on a downstream task"),
    "evaluate": _ranks("finetune:evaluate_main", "score a fine-tuned checkpoint"),
    "replay": _train(
        "replay:main", "look for the cause of a step that went wrong", cleans_up=False
    ),
    "check-options": _train(
        "pretrain:check_options", "find wrong options of a training command, before torchrun"
    ),
    "check": _ranks(
        "check:main", "check data, checkpoint, disk, GPUs and network before a run is started"
    ),
    "predict": _train("predict:main", "ask a fine-tuned checkpoint", cleans_up=False),
    "index-text": _data("index_text:main", "tokenize text files into a dataset"),
    "index-images": _data("index_images:main", "put images into a dataset"),
    "index-pairs": _data("index_pairs:main", "put captioned images into a dataset"),
    "index-task": _data("index_task:main", "prepare a downstream task from its raw data"),
    "merge-data": _data("data:merge_data", "put datasets one after the other"),
    "inspect-data": _data("data:inspect", "show what a dataset holds"),
    "sample-corpus": _data(
        "data:sample_corpus", "generate a small corpus with five tasks to try things on"
    ),
    "train-text-tokenizer": _tokens("tokenizers:train_text", "train a SentencePiece model"),
    "train-image-tokenizer": _tokens(
        "tokenizers:train_image", "train a VQ-KD codebook", cleans_up=False, on_ranks=True
    ),
    "encode-images": _tokens(
        "tokenizers:encode_images", "store the visual codes of a dataset's images"
    ),
    "export": _checkpoints("checkpoints:export", "checkpoint to Hugging Face folder"),
    "import": _checkpoints("checkpoints:import_exported", "Hugging Face folder to checkpoint"),
    "import-public": _checkpoints(
        "checkpoints:import_public", "start from VLMo, BEiT-3 or BEiT v2 weights"
    ),
    "upcycle": _checkpoints("checkpoints:upcycle", "make a sparse checkpoint of a dense one"),
    "inspect-checkpoint": _checkpoints(
        "checkpoints:inspect", "show what a checkpoint holds and whether it is sound"
    ),
    "compare-checkpoints": _checkpoints("checkpoints:compare", "show how two checkpoints differ"),
    "plan": _show("plan:main", "find the fastest layout for a number of GPUs, and what it costs"),
    "compare-layouts": _show(
        "measure:layouts", "run a preset at several parallel layouts and compare"
    ),
    "study": _show(
        "study:main",
        "repeat a figure or table of the paper, or compare runs of your own",
        cleans_up=False,
    ),
    "bench": _show(
        "bench:main",
        "time layers and training steps beside other implementations",
        on_ranks=True,
    ),
    "plot": _show("measure:plot", "draw what runs logged: losses, accuracy, speed, experts"),
    "plot-losses": _show("measure:plot_losses", "draw only the losses of runs"),
    "report": _show("measure:report", "compare runs in one page, beside the paper's results"),
    "fill-masked": _show("fill_masked:main", "fill a masked word and masked patches, as a picture"),
    "routing": _show("routing:main", "show which expert each patch and word goes to, as a page"),
    "downstream-table": _show("measure:downstream", "put fine-tuning results side by side"),
}
