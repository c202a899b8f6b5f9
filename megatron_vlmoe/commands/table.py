"""Every command: the row that finds it, and the line that `vlmoe --help` prints of it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        group: heading in the list of commands.
        main: `module:function` in this package; takes the words after the command's name and returns an exit status or
            None.
        summary: one line of help.
        cleans_up: see `run_command`.
    """

    group: str
    main: str
    summary: str
    cleans_up: bool = True


_TRAIN, _DATA, _TOKENS = "Train and use a model", "Prepare data", "Tokenizers"
_CHECKPOINTS, _COMPARE = "Checkpoints", "Measure and show"

COMMANDS = MappingProxyType(
    {
        "pretrain": Command(
            _TRAIN, "pretrain:main", "train a VL-MoE from indexed datasets", cleans_up=False
        ),
        "pretrain-random": Command(
            _TRAIN,
            "pretrain:random_main",
            "the same on random numbers, without files",
            cleans_up=False,
        ),
        "finetune": Command(
            _TRAIN, "finetune:main", "train a checkpoint on a downstream task", cleans_up=False
        ),
        "evaluate": Command(
            _TRAIN, "finetune:evaluate_main", "score a fine-tuned checkpoint", cleans_up=False
        ),
        "check-options": Command(
            _TRAIN,
            "check_options:main",
            "find wrong options of a training command, before torchrun",
        ),
        "predict": Command(_TRAIN, "predict:main", "ask a fine-tuned checkpoint", cleans_up=False),
        "index-text": Command(_DATA, "index_text:main", "tokenize text files into a dataset"),
        "index-images": Command(_DATA, "index_images:main", "put images into a dataset"),
        "index-pairs": Command(_DATA, "index_pairs:main", "put captioned images into a dataset"),
        "index-task": Command(
            _DATA, "index_task:main", "prepare a downstream task from its raw data"
        ),
        "merge-data": Command(_DATA, "merge_data:main", "put datasets one after the other"),
        "inspect-data": Command(_DATA, "inspect_data:main", "show what a dataset holds"),
        "sample-corpus": Command(
            _DATA, "sample_corpus:main", "generate a small corpus with five tasks to try things on"
        ),
        "train-text-tokenizer": Command(
            _TOKENS, "train_text_tokenizer:main", "train a SentencePiece model"
        ),
        "train-image-tokenizer": Command(
            _TOKENS, "train_image_tokenizer:main", "train a VQ-KD codebook", cleans_up=False
        ),
        "encode-images": Command(
            _TOKENS, "encode_images:main", "store the visual codes of a dataset's images"
        ),
        "export": Command(_CHECKPOINTS, "convert:export_main", "checkpoint to Hugging Face folder"),
        "import": Command(_CHECKPOINTS, "convert:import_main", "Hugging Face folder to checkpoint"),
        "import-public": Command(
            _CHECKPOINTS, "import_public:main", "start from VLMo, BEiT-3 or BEiT v2 weights"
        ),
        "upcycle": Command(_CHECKPOINTS, "upcycle:main", "make a sparse checkpoint of a dense one"),
        "inspect-checkpoint": Command(
            _CHECKPOINTS,
            "inspect_checkpoint:main",
            "show what a checkpoint holds and whether it is sound",
        ),
        "compare-checkpoints": Command(
            _CHECKPOINTS, "inspect_checkpoint:compare_main", "show how two checkpoints differ"
        ),
        "compare-layouts": Command(
            _COMPARE, "compare_layouts:main", "run a preset at several parallel layouts and compare"
        ),
        "bench": Command(
            _COMPARE,
            "bench:main",
            "time training steps of presets against each other",
            cleans_up=False,
        ),
        "plot-losses": Command(_COMPARE, "plot_losses:main", "draw the losses of runs"),
        "fill-masked": Command(
            _COMPARE, "fill_masked:main", "fill a masked word and masked patches, as a picture"
        ),
        "downstream-table": Command(
            _COMPARE, "downstream_table:main", "put fine-tuning results side by side"
        ),
    }
)
